"""Trains the small CLIP that ships with the package, on crops of every name.

    python -m pipeline.pictograms.teacher_training

As CLIP has seen the web, it sees all names and all styles but the held-out one. It writes
open_clip's own form: a model configuration, a merges file for the tokenizer, and weights.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from dkdetr.progress import progress
from pipeline.pictograms.asset_training import Descent, Recipe, asset_parser, recipe_of, write_log
from pipeline.pictograms.captions import caption, merges_file, plain_captions
from pipeline.pictograms.crop_pool import (
    CropPool,
    jittered_windows,
    make_pool,
    pool_of_scenes,
    scaled_windows,
    soften,
)
from pipeline.pictograms.drawings import Drawing, named_drawings
from pipeline.pictograms.scenes import SpriteBank, render_scene
from pipeline.pictograms.teacher_assets import (
    TEACHER_NAME,
    assets_folder,
    config_path,
    merges_path,
    save_half,
    weights_path,
)
from pipeline.pictograms.worlds import SIZES, World, plan_world

_IMAGE_SIZE = 64
_FRESH_SEED = 7001
_FRESH_CROPS = 2500
_MAX_LOGIT_SCALE = 100.0


def main() -> None:
    """Trains, measures on fresh crops, writes the assets and a log of the measurements."""
    parser = asset_parser(__doc__, out=assets_folder(), batch_size=192, seed=0)
    parser.add_argument(
        "--world",
        choices=sorted(SIZES),
        help="only its names (seed 0): a control that knows them better",
    )
    arguments = parser.parse_args()
    shipped = arguments.out.resolve() == assets_folder().resolve()
    if arguments.world is not None and shipped:
        parser.error("--world makes a control, not the shipped teacher: say where, with --out")
    recipe = recipe_of(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    drawings = named_drawings()
    if arguments.world is not None:
        drawings = tuple(category.drawing for category in _world(arguments.world).categories)
    model, tokenize = create_teacher(arguments.out, drawings)
    started = time.process_time()
    pool = make_pool(drawings, recipe.crops, seed=recipe.seed, held_out_style=False, title="crops")
    rendered = time.process_time()
    train(model, tokenize, pool, [drawing.name for drawing in drawings], recipe)
    trained = time.process_time()
    log = {
        **asdict(recipe),
        "world": arguments.world,
        "cpu_seconds": {"crops": round(rendered - started), "steps": round(trained - rendered)},
        "parameters": sum(p.numel() for p in model.parameters()),
        **measure(model, tokenize, drawings, arguments.world or "tiny"),
    }
    save_half(model.state_dict(), weights_path(arguments.out))
    write_log(arguments.out / "teacher_training.log", log)


def _world(size: str) -> World:
    return plan_world(SIZES[size], protocol="lvis-like", seed=0)


def create_teacher(folder: Path, drawings: tuple[Drawing, ...]) -> tuple[Any, Any]:
    """Returns a new model and its tokenizer; writes configuration and merges into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = merges_file(drawing.name for drawing in drawings)
    merges_path(folder).write_bytes(merges)
    tokenize = open_clip.SimpleTokenizer(bpe_path=str(merges_path(folder)), context_length=20)
    config = {
        "embed_dim": 128,
        "vision_cfg": {
            "layers": [1, 1, 2, 1], "width": 16, "head_width": 64, "image_size": _IMAGE_SIZE,
        },
        "text_cfg": {
            "context_length": 20,
            "vocab_size": tokenize.vocab_size,
            "width": 128,
            "heads": 4,
            "layers": 2,
            "tokenizer_kwargs": {"bpe_path": merges_path(folder).name},
        },
    }  # fmt: skip
    text = json.dumps(config, indent=2) + "\n"
    config_path(folder).write_text(text, encoding="utf-8")
    open_clip.add_model_config(config_path(folder))
    return open_clip.create_model(TEACHER_NAME, load_weights=False), tokenize


def train(model: Any, tokenize: Any, pool: CropPool, names: list[str], recipe: Recipe) -> None:
    """Trains in place: a batch holds distinct names, one crop and one caption each."""
    generator = torch.Generator().manual_seed(recipe.seed)
    words = np.random.default_rng(recipe.seed)
    descent = Descent(model, recipe, betas=(0.9, 0.98))
    crops_of = [torch.nonzero(pool.labels == n).flatten() for n in range(len(names))]
    model.train()
    model.to(memory_format=torch.channels_last)
    with progress("teacher", recipe.steps) as advance:
        for step in range(recipe.steps):
            chosen = torch.randperm(len(names), generator=generator)[: recipe.batch_size]
            indices = torch.stack([
                crops_of[n][torch.randint(len(crops_of[n]), (), generator=generator)]
                for n in chosen.tolist()
            ])  # fmt: skip
            windows = jittered_windows(pool.boxes_xyxy[indices], generator)
            pixels = soften(pool.cut(indices, windows, _IMAGE_SIZE), generator)
            texts = tokenize([caption(names[n], words) for n in chosen.tolist()])
            loss = _contrast(model, pixels, texts, bf16=recipe.bf16)
            recent = descent.step(loss)
            with torch.no_grad():
                model.logit_scale.clamp_(max=float(np.log(_MAX_LOGIT_SCALE)))
            advance(step + 1, f"loss {recent:.3f}")


def measure(model: Any, tokenize: Any, drawings: tuple[Drawing, ...], size: str) -> dict[str, Any]:
    """Returns accuracies on scenes that training never saw, crops as the pipeline cuts them.

    `size` names the world whose validation boxes are tried.
    """
    names = [drawing.name for drawing in drawings]
    results: dict[str, Any] = {"names": len(names)}
    for key, held in (("fresh_scenes", False), ("held_out_style", True)):
        pool = make_pool(drawings, _FRESH_CROPS, seed=_FRESH_SEED, held_out_style=held, title=key)
        results[key] = _accuracy(model, tokenize, pool, names)
    world = _world(size)
    bank = SpriteBank([category.drawing for category in world.categories])
    scenes = [
        (render_scene(image.plan, bank), [each.label for each in image.plan.objects])
        for image in world.images
        if image.part == "val"
    ]
    own_names = [category.drawing.name for category in world.categories]
    results[f"{size}_val_boxes"] = _accuracy(model, tokenize, pool_of_scenes(scenes), own_names)
    results["mean_text_cosine"] = _mean_cosine(encode_names(model, tokenize, names))
    return results


@torch.inference_mode()
def encode_names(model: Any, tokenize: Any, names: list[str]) -> Tensor:
    """Returns unit text embeddings [num_names, embed_dim], averaged over a few sentences."""
    model.eval()
    sentences = plain_captions(names)
    texts = tokenize([sentence for group in sentences for sentence in group])
    rows = nn.functional.normalize(model.encode_text(texts), dim=-1)
    return nn.functional.normalize(rows.view(len(names), -1, rows.shape[-1]).mean(1), dim=-1)


@torch.inference_mode()
def encode_boxes(model: Any, pool: CropPool) -> Tensor:
    """Returns unit embeddings [num, embed_dim]: mean over crops at scales 1.0 and 1.5."""
    model.eval()
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    rows: list[Tensor] = []
    for indices in torch.arange(len(pool.labels)).split(256):
        features = 0
        for scale in (1.0, 1.5):
            windows = scaled_windows(pool.boxes_xyxy[indices], scale)
            pixels = (pool.cut(indices, windows, _IMAGE_SIZE) - mean) / std
            features = features + nn.functional.normalize(model.encode_image(pixels), dim=-1)
        rows.append(nn.functional.normalize(features, dim=-1))
    return torch.cat(rows)


def _contrast(model: Any, pixels: Tensor, texts: Tensor, *, bf16: bool) -> Tensor:
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    normalised = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        image_features, text_features = model.encode_image(normalised), model.encode_text(texts)
    images = nn.functional.normalize(image_features.float(), dim=-1)
    words = nn.functional.normalize(text_features.float(), dim=-1)
    logits = model.logit_scale.exp() * images @ words.T
    target = torch.arange(len(logits))
    return (
        nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
    ) / 2


def _accuracy(model: Any, tokenize: Any, pool: CropPool, names: list[str]) -> dict[str, float]:
    similarities = encode_boxes(model, pool) @ encode_names(model, tokenize, names).T
    ranks = similarities.topk(5, dim=-1).indices == pool.labels[:, None]
    top1, top5 = ranks[:, 0].float().mean().item(), ranks.any(1).float().mean().item()
    return {"crops": len(ranks), "top1": round(top1, 3), "top5": round(top5, 3)}


def _mean_cosine(embeddings: Tensor) -> float:
    num = len(embeddings)
    total = (embeddings @ embeddings.T).sum().item() - num
    return round(total / (num * (num - 1)), 3)


if __name__ == "__main__":
    main()
