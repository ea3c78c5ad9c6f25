r"""Compares the losses of SKD and RKD on cached embeddings, without a detector around them.

    python -m pipeline.pictograms.loss_study CACHE --val SPLIT [--json FILE]
    python -m pipeline.pictograms.loss_study CACHE --val SPLIT --spaces cone \
        --losses none,bce,bce_biased --skd-bias -4

The student is a small network on the frozen backbone's features of a box. Like the detector's
projection it learns two things at once: to name base objects (focal loss, cached regions being
background), and to imitate the teacher on cached regions, of which none is named. It is scored on
the true boxes of the validation split, novel ones included: mean over classes of the average
precision of "which boxes are it?" and top-1 among all names. Boxes being given, only recognition
is measured: in seconds a loss, so that every loss meets every weight.

Spaces: the teacher's own (`plain`); the same with CLIP's cones added (`cone`: pairs of crops
have cosine .5, pairs of names .75, crop and name .2); reduced to its first dimensions (`dim32`);
and turned at random in a larger space (`dim512`), which changes nothing but L1.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import nms, roi_align

from cache.location import cache_path
from cache.store import CacheReader, open_cache
from dkdetr.data.splits import Split, load_split
from dkdetr.losses.detection import focal_loss
from dkdetr.losses.relational_kd import batch_relational_loss, lay_end_to_end, relational_loss
from dkdetr.losses.semantic_kd import semantic_bce_loss, semantic_infonce_loss, semantic_l1_loss
from dkdetr.progress import progress
from dkdetr.student.backbone import slim_resnet
from pipeline.pictograms.loss_study_rows import TEMPERATURE, Recipe, selected

_REGIONS = 12
_GT_PLACES = 10
_FEATURES = 256
_RELATION_TEMPERATURE = 0.2
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Material:
    """What is learned from (by image, places left empty are not valid) and what is scored."""

    region_features: Tensor  # [images, _REGIONS, F]
    region_embeddings: Tensor  # [images, _REGIONS, D]
    region_valid: Tensor
    base_features: Tensor  # [images, _GT_PLACES, F]
    base_labels: Tensor  # in the order of base names; -1 where empty
    val_features: Tensor  # [objects, F]
    val_labels: Tensor  # in the order of all names
    text: Tensor  # [names, D]
    is_base: Tensor  # [names]


@dataclass(frozen=True)
class Scores:
    """Percent."""

    map_novel: float
    map_base: float
    top1_novel: float
    top1_base: float


def gather(reader: CacheReader, train: Split, val: Split, num_images: int) -> Material:
    """Returns features and embeddings of the first images of the cache and all objects of `val`."""
    backbone = slim_resnet(
        weights="pictograms", norm="batch", frozen_stages=0, used_stages=(3, 4), width=32
    ).eval()
    metadata, text = reader.text()
    is_base = torch.tensor(metadata["is_base"])
    label_of = {int(number): place for place, number in enumerate(metadata["category_ids"])}
    base_label = torch.cumsum(is_base.int(), 0) - 1
    features: dict[str, list[Tensor]] = {"region": [], "base": [], "val": []}
    embeddings, valid, base_labels, val_labels = [], [], [], []
    images = [*train.images[:num_images], *val.images]
    with progress("features", len(images)) as advance:
        for done, image in enumerate(images, start=1):
            is_train = done <= num_images
            split = train if is_train else val
            pixels = split.read(image)
            true = split.base_boxes(image.image_id) if is_train else split.all_boxes(image.image_id)
            labels = torch.tensor([label_of[int(c)] for c in true.category_ids], dtype=torch.int64)
            boxes = torch.tensor(true.boxes_xyxy, dtype=torch.float32).reshape(-1, 4)
            if not is_train:
                features["val"].append(_box_features(backbone, pixels, boxes))
                val_labels.append(labels)
                advance(done, "")
                continue
            rows = reader.rows(image.image_id)
            chosen = _kd_regions(rows.boxes_xyxy, rows.max_base_iou)
            regions = torch.tensor(rows.boxes_xyxy)[chosen]
            both = _box_features(backbone, pixels, torch.cat([regions, boxes[:_GT_PLACES]]))
            count = len(chosen)
            features["region"].append(_padded(both[:count], _REGIONS))
            embeddings.append(_padded(torch.tensor(rows.region_embeddings)[chosen], _REGIONS))
            valid.append(torch.arange(_REGIONS) < count)
            features["base"].append(_padded(both[count:], _GT_PLACES))
            places = torch.full((_GT_PLACES,), -1)
            places[: len(labels)] = base_label[labels[:_GT_PLACES]]
            base_labels.append(places)
            advance(done, "")
    reduced = _reduce({name: torch.stack(rows) if name != "val" else torch.cat(rows)
                       for name, rows in features.items()})  # fmt: skip
    return Material(
        reduced["region"], torch.stack(embeddings), torch.stack(valid),
        reduced["base"], torch.stack(base_labels), reduced["val"], torch.cat(val_labels),
        torch.tensor(text), is_base,
    )  # fmt: skip


def spaces(material: Material, names: Sequence[str]) -> Iterator[tuple[str, Material]]:
    """Returns the material once for each space of the teacher's that is asked for."""
    embeddings, text = material.region_embeddings, material.text
    generator = torch.Generator().manual_seed(7)
    for name in names:
        if name == "plain":
            yield name, material
        elif name == "cone":
            yield name, _moved(material, _cone(embeddings, 1.0, 0.0), _cone(text, 1.7, 0.79))
        elif name == "dim32":
            _, _, basis = torch.linalg.svd(embeddings[material.region_valid], full_matrices=False)
            first = basis[:32].T
            yield name, _moved(material, embeddings @ first, text @ first)
        else:
            big = torch.linalg.qr(torch.randn(512, 512, generator=generator))[0]
            turn = big[: embeddings.shape[-1]]
            yield name, _moved(material, embeddings @ turn, text @ turn)


def learn(material: Material, recipe: Recipe, *, seed: int, steps: int, bias_init: float) -> Scores:
    """Returns what a student scores that has learned by the recipe."""
    torch.manual_seed(seed)
    dim = material.text.shape[1]
    student = nn.Sequential(
        nn.Linear(_FEATURES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, dim)
    )
    bias = nn.Parameter(torch.tensor(bias_init))
    optimizer = torch.optim.AdamW([*student.parameters(), bias], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    base_text = material.text[material.is_base]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(material.region_valid), (16,), generator=generator)
        features = torch.cat([material.region_features[chosen], material.base_features[chosen]], 1)
        projected = student(features)
        regions, base = projected.split([_REGIONS, _GT_PLACES], dim=1)
        valid, labels = material.region_valid[chosen], material.base_labels[chosen]
        named = labels >= 0
        rows = torch.cat([base[named], regions[valid]])
        targets = torch.zeros(len(rows), len(base_text))
        targets[torch.arange(int(named.sum())), labels[named]] = 1
        logits = functional.normalize(rows, dim=-1) @ base_text.T / TEMPERATURE + bias
        loss = 2 * focal_loss(logits, targets, alpha=0.25, gamma=2.0) / named.sum().clamp(min=1)
        taught = material.region_embeddings[chosen]
        loss = loss + _distilled(recipe, regions, taught, valid) / valid.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return _scored(student, material)


def _distilled(recipe: Recipe, features: Tensor, taught: Tensor, valid: Tensor) -> Tensor:
    total = features.sum() * 0
    if recipe.skd_weight:
        if recipe.skd == "l1":
            loss = semantic_l1_loss(features, taught, valid)
        elif recipe.skd == "infonce":
            loss = semantic_infonce_loss(features, taught, valid, temperature=recipe.temperature)
        else:
            loss = semantic_bce_loss(
                features, taught, valid, scale=1 / recipe.temperature, bias=recipe.skd_bias
            )
        total = total + recipe.skd_weight * loss
    if recipe.rkd_weight:
        rows = lay_end_to_end(features, taught, valid)
        among = relational_loss(features, taught, valid, temperature=_RELATION_TEMPERATURE)
        across = batch_relational_loss(
            rows, rows, first_column=0, temperature=_RELATION_TEMPERATURE
        )
        total = total + recipe.rkd_weight * (among + across)
    return total


@torch.inference_mode()
def _scored(student: nn.Module, material: Material) -> Scores:
    similarity = functional.normalize(student(material.val_features), dim=-1) @ material.text.T
    labels, is_base = material.val_labels, material.is_base
    right = similarity.argmax(-1) == labels
    precision = torch.tensor(
        [_average_precision(similarity[:, c], labels == c) for c in range(len(is_base))]
    )
    of_base = is_base[labels]
    return Scores(
        map_novel=100 * precision[~is_base].nanmean().item(),
        map_base=100 * precision[is_base].nanmean().item(),
        top1_novel=100 * right[~of_base].float().mean().item(),
        top1_base=100 * right[of_base].float().mean().item(),
    )


def _average_precision(scores: Tensor, wanted: Tensor) -> float:
    found = wanted[scores.argsort(descending=True, stable=True)].float()
    ranks = torch.arange(1, len(found) + 1)
    return ((found.cumsum(0) / ranks * found).sum() / found.sum()).item()


def _kd_regions(boxes_xyxy: np.ndarray, max_base_iou: np.ndarray) -> Tensor:
    """Returns rows as training selects them: no base object, no duplicate, most object-like."""
    free = torch.tensor(max_base_iou < 0.5).nonzero().squeeze(1)
    boxes = torch.tensor(boxes_xyxy)[free]
    return free[nms(boxes, -torch.arange(len(free), dtype=boxes.dtype), 0.5)[:_REGIONS]]


@torch.inference_mode()
def _box_features(backbone: nn.Module, pixels: np.ndarray, boxes: Tensor) -> Tensor:
    """Returns 3x3 cells of C3 and C4 for each box, side by side."""
    image = torch.tensor(pixels).permute(2, 0, 1).float()[None] / 255
    image = (image - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    maps = zip(backbone(image), (8, 16), strict=True)
    cells = [roi_align(m, [boxes], 3, 1 / s, aligned=True).flatten(1) for m, s in maps]
    return torch.cat(cells, dim=1)


def _reduce(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns all features in the principal directions of the regions', of unit variance."""
    flat = features["region"].flatten(0, -2)
    flat = flat[flat.abs().sum(-1) > 0]
    mean = flat.mean(0)
    values, basis = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    keep = basis[:, -_FEATURES:] / values[-_FEATURES:].clamp(min=1e-6).sqrt()
    return {name: (rows - mean) @ keep for name, rows in features.items()}


def _cone(unit: Tensor, strength: float, angle: float) -> Tensor:
    """Adds a common direction in two new dimensions; crops' and names' lie `angle` apart."""
    turned = torch.tensor((np.cos(np.pi * angle / 2), np.sin(np.pi * angle / 2)), dtype=unit.dtype)
    return torch.cat([unit, (strength * turned).expand(*unit.shape[:-1], 2)], dim=-1)


def _moved(material: Material, embeddings: Tensor, text: Tensor) -> Material:
    rows: dict[str, Any] = {name: getattr(material, name) for name in Material.__annotations__}
    rows["region_embeddings"] = functional.normalize(embeddings, dim=-1)
    rows["text"] = functional.normalize(text, dim=-1)
    return Material(**rows)


def _padded(rows: Tensor, places: int) -> Tensor:
    return functional.pad(rows, (0, 0, 0, places - len(rows)))


def main() -> None:
    """Prints a line a row and writes all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=cache_path)
    parser.add_argument("--val", required=True)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--spaces", type=_names, default=["plain", "cone"])
    parser.add_argument("--losses", type=_names, help="only these: none,bce,bce_biased,...")
    parser.add_argument("--weights", type=_numbers, help="of SKD, only these: 0.3,1,...")
    parser.add_argument("--skd-bias", type=float, help="of SKD alone (0 in cone, else -4)")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    try:
        rows = selected(words.spaces, words.losses, words.weights, words.skd_bias)
    except ValueError as error:
        parser.error(str(error))
    reader = open_cache(words.cache)
    train, val = (load_split(name, words.data_root) for name in (reader.info.split, words.val))
    material = gather(reader, train, val, min(words.images, len(train.images)))
    turned = dict(spaces(material, words.spaces))
    records: list[dict[str, Any]] = []
    for space, bias, recipe in rows:
        began = time.process_time()
        scores = [
            learn(turned[space], recipe, seed=seed, steps=words.steps, bias_init=bias)
            for seed in range(words.seeds)
        ]
        mean = {
            key: round(statistics.fmean(asdict(each)[key] for each in scores), 1)
            for key in Scores.__annotations__
        }
        records.append({"space": space, **asdict(recipe), **mean})
        seconds = time.process_time() - began
        print(json.dumps(records[-1]), f"{seconds:.1f} s", flush=True)
        if words.json:
            words.json.write_text("\n".join(json.dumps(each) for each in records) + "\n")


def _names(words: str) -> list[str]:
    return words.split(",")


def _numbers(words: str) -> list[float]:
    return [float(word) for word in words.split(",")]


if __name__ == "__main__":
    main()
