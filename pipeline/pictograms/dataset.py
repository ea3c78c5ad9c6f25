"""Writes a world as a data set in LVIS or COCO form, once, whole or not at all.

ROOT/pictograms/SIZE/
    images/train/000001.jpg ...   images/val/...   [images/held/...]
    annotations/train.json  val.json  [held.json]
    ATTRIBUTION.txt
    dataset.json                  written last: protocol, size, seed, hashes
"""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from filelock import FileLock
from pycocotools import mask as coco_mask

from dkdetr.errors import CorruptArtefactError, DataError, MismatchError, UsageError
from dkdetr.progress import progress
from pipeline.pictograms.drawings import attribution
from pipeline.pictograms.scenes import Scene, SpriteBank, render_scene
from pipeline.pictograms.worlds import (
    GENERATOR_VERSION,
    PROTOCOLS,
    SIZES,
    PlannedImage,
    Protocol,
    World,
    WorldSize,
    plan_world,
)

MARKER = "dataset.json"
_PROTOCOL_KEYS: Mapping[Protocol, str] = {"lvis-like": "lvis", "coco-like": "ovcoco"}


def prepare_pictograms(root: Path, *, size: str, protocol: str, seed: int) -> Path:
    """Returns the folder ROOT/pictograms/SIZE, made now or found complete.

    Args:
        root: the data root.
        size: tiny, small, full, or full70 (full with 70 base names).
        protocol: lvis-like or coco-like.
        seed: draws the names and everything else.

    Raises:
        UsageError: unknown size or protocol, or the extra `demo` is missing.
        MismatchError: the folder holds another world.
        CorruptArtefactError: the folder's files are not what its dataset.json says.
        DataError: the folder exists without a dataset.json, so it is none of ours.
    """
    if size not in SIZES:
        raise UsageError(f"unknown size '{size}'; known: {', '.join(SIZES)}")
    if not _is_protocol(protocol):
        raise UsageError(f"unknown protocol '{protocol}'; known: {', '.join(PROTOCOLS)}")
    parent = root / "pictograms"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / size
    with FileLock(parent / f".{size}.lock"):
        if _is_reusable(folder, size=size, protocol=protocol, seed=seed):
            return folder
        world = plan_world(SIZES[size], protocol=protocol, seed=seed)
        partial = parent / f".{size}.partial"
        if partial.exists():
            shutil.rmtree(partial)
        try:
            write_world(partial, world, size_name=size)
            if folder.exists():
                folder.rmdir()
            partial.replace(folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def write_world(folder: Path, world: World, *, size_name: str) -> None:
    """Renders every scene of a world into a new folder; dataset.json comes last."""
    bank = SpriteBank([category.drawing for category in world.categories])
    annotations: dict[str, list[dict[str, Any]]] = defaultdict(list)
    folder.mkdir(parents=True)
    with progress(f"pictograms {size_name}", len(world.images)) as advance:
        for done, image in enumerate(world.images, start=1):
            scene = render_scene(image.plan, bank)
            path = folder / "images" / image.part / _file_name(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(scene.jpeg)
            annotations[image.part] += _image_annotations(image, scene)
            advance(done, "")
    (folder / "annotations").mkdir()
    hashes: dict[str, str] = {}
    for part in dict.fromkeys(image.part for image in world.images):
        data = _to_json(_annotation_file(world, part, annotations[part]))
        _write(folder / "annotations" / f"{part}.json", data)
        hashes[f"annotations/{part}.json"] = hashlib.sha256(data).hexdigest()
    _write(folder / "ATTRIBUTION.txt", (attribution() + "\n").encode())
    os.sync()  # the marker must not outlive the images
    _write(folder / MARKER, _to_json(_description(world, size_name, hashes), indent=2))


def _is_protocol(protocol: str) -> TypeGuard[Protocol]:
    return protocol in PROTOCOLS


def _is_reusable(folder: Path, *, size: str, protocol: Protocol, seed: int) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    marker = folder / MARKER
    if not marker.is_file():
        raise DataError(
            f"'{folder}' holds files but no {MARKER}, so it was not made by this command or was "
            "changed since: move it away, or choose another --data-root"
        )
    try:
        found: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        described = {key: found[key] for key in ("protocol", "seed", "generator_version")}
        images: Mapping[str, int] = found["num_images"]
        hashes: Mapping[str, str] = found["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtefactError(
            f"'{marker}' is damaged ({error!r}): delete '{folder}' and run the command again"
        ) from None
    wanted = {
        "protocol": _PROTOCOL_KEYS[protocol],
        "seed": seed,
        "generator_version": GENERATOR_VERSION,
    }
    if described != wanted:
        raise MismatchError(
            f"'{folder}' holds another world: {_in_words(described)}; asked for: "
            f"{_in_words(wanted)}. Split names and caches refer to that folder, so it is never "
            f"overwritten: delete it, or keep both with another --data-root (size {size})"
        )
    _check_files(folder, images, hashes)
    return True


def _check_files(folder: Path, images: Mapping[str, int], hashes: Mapping[str, str]) -> None:
    remedy = f"delete '{folder}' and run the command again"
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise CorruptArtefactError(f"'{path}' is missing or was changed: {remedy}")
    for part, expected_count in images.items():
        count = sum(1 for _ in (folder / "images" / part).glob("*.jpg"))
        if count != expected_count:
            raise CorruptArtefactError(
                f"'{folder / 'images' / part}' has {count} images instead of {expected_count}: "
                f"{remedy}"
            )


def _in_words(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in parameters.items())


def _file_name(image: PlannedImage) -> str:
    return f"{image.image_id:06d}.jpg"


def _image_annotations(image: PlannedImage, scene: Scene) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    rows = zip(image.plan.objects, image.annotated, scene.masks, scene.boxes_xyxy, strict=True)
    for planned, annotated, mask, box in rows:
        if not annotated:
            continue
        left, top, right, bottom = (int(edge) for edge in box)
        encoded: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        records.append(
            {
                "image_id": image.image_id,
                "category_id": planned.label + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": int(mask.sum()),
                "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                "iscrowd": 0,
            }
        )
    return records


def _annotation_file(
    world: World, part: str, annotations: list[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    numbered = [{"id": number, **record} for number, record in enumerate(annotations, start=1)]
    instances = Counter(record["category_id"] for record in annotations)
    pairs = {(record["image_id"], record["category_id"]) for record in annotations}
    images = Counter(category_id for _, category_id in pairs)
    lvis = world.protocol == "lvis-like"
    categories: list[dict[str, Any]] = []
    for category in world.categories:
        record: dict[str, Any] = {"id": category.category_id, "name": category.drawing.name}
        if lvis:
            record |= {
                "synset": f"openmoji.{category.drawing.stem}",
                "synonyms": [category.drawing.name],
                "def": "",
                "frequency": category.group,
                "image_count": images[category.category_id],
                "instance_count": instances[category.category_id],
            }
        else:
            record |= {"supercategory": "pictogram", "split": category.group}
        categories.append(record)
    image_records: list[dict[str, Any]] = []
    for image in world.images:
        if image.part != part:
            continue
        side = world.size.image_size
        record = {
            "id": image.image_id, "file_name": _file_name(image), "width": side, "height": side,
        }  # fmt: skip
        if lvis:
            record["neg_category_ids"] = list(image.neg_category_ids)
            record["not_exhaustive_category_ids"] = list(image.not_exhaustive_category_ids)
        image_records.append(record)
    return {"images": image_records, "categories": categories, "annotations": numbered}


def _description(world: World, size_name: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    size: WorldSize = world.size
    base = {category.category_id - 1 for category in world.categories if category.is_base}
    train = [image for image in world.images if image.part == "train"]
    labels = [each.label for image in train for each in image.plan.objects]
    return {
        "protocol": _PROTOCOL_KEYS[world.protocol],
        "size": size_name,
        "seed": world.seed,
        "generator_version": GENERATOR_VERSION,
        "split_hash": world.split_hash,
        "image_size": size.image_size,
        "num_images": dict(Counter(image.part for image in world.images)),
        "num_names": {"base": len(base), "novel": size.num_names - len(base)},
        "train_objects": {
            "base": sum(label in base for label in labels),
            "novel_never_annotated": sum(label not in base for label in labels),
        },
        "sha256": dict(hashes),
        "attribution": attribution(),
    }


def _to_json(content: Any, indent: int | None = None) -> bytes:
    separators = None if indent else (",", ":")
    return json.dumps(content, indent=indent, separators=separators).encode() + b"\n"


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
