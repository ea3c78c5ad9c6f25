"""How many images a second one process reads from a cache: python -m tests.benchmarks.cache_reader

Each way reads the same images in random order: what training asks for (an image's boxes and
scores, and the embeddings of twenty of its regions), and everything there is. The files are in the
page cache, so this is the price of checks and conversions and not that of the disk. Two peers read
what training asks for, and are seen to read the same: zarr-python, from the cache's own arrays,
and plain NumPy from mapped files of the same numbers, which checks nothing at all: the limit.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cache.arrays import DATA_FOLDER
from cache.export import export_cache
from cache.plan import make_plan
from cache.regions import RegionRows
from cache.resident import load_resident
from cache.rows import ImageRows
from cache.spec import PART_NAMES
from cache.store import open_cache
from cache.writer import create_or_resume

REGIONS, DIM, CHOSEN = 300, 512, 20
Choose = Callable[[int], np.ndarray]
"""From the number of an image's regions: which of them are asked for."""
Asked = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Boxes and objectness of all regions, embeddings of the chosen ones as float32."""
Read = Callable[[int, Choose], Asked]
_ASKED = ("boxes_xyxy", "objectness", "region_embeddings")


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--storage", choices=("fp16", "int8"), default="fp16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        _write(path, options.images, options.storage)
        reader = open_cache(path)
        export_cache(reader, Path(folder) / "export")
        exported = open_cache(Path(folder) / "export")
        print(
            f"{options.images} images of {REGIONS} regions, {DIM} numbers, {options.storage}; "
            f"{platform.machine()}, one process, numpy {np.__version__}"
        )
        arrays = _arrays(path)
        with load_resident(reader, max_base_iou=0.5) as resident:
            asked: dict[str, Read] = {
                "Zarr": _ours(reader.regions),
                "export": _ours(exported.regions),
                "peer: zarr-python": _theirs(arrays),
                "peer: numpy, mapped": _theirs(_mapped(arrays, Path(folder) / "mapped")),
            }
            _require_equal(asked, options.images)
            asked["resident"] = _ours(resident.regions)  # which has fewer: those to choose from
            ways: dict[str, Callable[[int], object]] = {
                f"{name}, what training asks for": _of_chosen(read) for name, read in asked.items()
            }
            ways |= {"Zarr, everything": reader.rows, "export, everything": exported.rows}
            for name, read in ways.items():
                rate = _rate(read, reader.image_ids.tolist(), options.seconds)
                print(f"{name:42s} {rate:9,.0f} images/s")


def _of_chosen(read: Read) -> Callable[[int], object]:
    generator = np.random.default_rng(1)

    def choose(count: int) -> np.ndarray:
        return np.sort(generator.permutation(count)[:CHOSEN])

    return lambda image_id: read(image_id, choose)


def _ours(regions: Callable[[int], RegionRows]) -> Read:
    def read(image_id: int, choose: Choose) -> Asked:
        found = regions(image_id)
        rows = found.embeddings(choose(len(found.objectness)))
        # Copied, as the mapped peer's are: a view of a mapped file has read nothing yet.
        return np.array(found.boxes_xyxy), np.array(found.objectness), rows

    return read


def _theirs(arrays: Mapping[str, Any]) -> Read:
    boxes, objectness, stored = (arrays[name] for name in _ASKED)
    scales = arrays.get("embedding_scale")

    def read(image_id: int, choose: Choose) -> Asked:
        scale = None if scales is None else scales[image_id]
        rows = _unit_rows(stored[image_id], scale, choose(REGIONS))
        return np.array(boxes[image_id]), np.array(objectness[image_id]), rows

    return read


def _mapped(arrays: Mapping[str, zarr.Array], folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array[:])
    return {each.stem: np.load(each, mmap_mode="r") for each in folder.iterdir()}


def _arrays(path: Path) -> dict[str, zarr.Array]:
    """Returns what training reads, row i that of image i: the images are numbered from 0 here."""
    group = zarr.open_group(path / DATA_FOLDER, mode="r")
    return {name: group[name] for name in (*_ASKED, "embedding_scale") if name in group}


def _unit_rows(stored: np.ndarray, scales: np.ndarray | None, chosen: np.ndarray) -> np.ndarray:
    rows = stored[chosen].astype(np.float32)
    return rows if scales is None else rows * scales[chosen, None].astype(np.float32)


def _require_equal(asked: Mapping[str, Read], num_images: int) -> None:
    def choose(count: int) -> np.ndarray:
        return np.arange(0, count, count // CHOSEN)

    for image_id in range(0, num_images, 7):
        wanted, *others = (read(image_id, choose) for read in asked.values())
        for found in others:
            for ours, theirs in zip(wanted, found, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def _rate(read: Callable[[int], object], ids: list[int], seconds: float) -> float:
    generator = np.random.default_rng(0)
    for image_id in ids:  # shards are hashed at their first touch
        read(image_id)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for image_id in generator.permutation(ids)[:64].tolist():
            read(image_id)
            done += 1
    return done / (time.perf_counter() - started)


def _write(path: Path, num_images: int, storage: str) -> None:
    plan = make_plan(
        range(num_images), max_regions=REGIONS, embed_dim=DIM, max_gt=60, storage=storage,
        batch_layout={},
    )  # fmt: skip
    parts = {name: {} for name in PART_NAMES}
    with create_or_resume(path, parts=parts, plan=plan, provenance={}) as writer:
        for shard in writer.missing_shards():
            writer.commit_shard(shard, [_image(i) for i in plan.shard_image_ids(shard)])
        writer.write_text({}, _unit(np.random.default_rng(0), 2))
        writer.seal()


def _image(image_id: int) -> ImageRows:
    generator = np.random.default_rng(image_id)
    return ImageRows(
        image_id=image_id,
        image_size_hw=(480, 640),
        boxes_xyxy=_boxes(generator, REGIONS),
        objectness=np.sort(generator.random(REGIONS, np.float32))[::-1].copy(),
        max_base_iou=generator.random(REGIONS, np.float32),
        region_embeddings=_unit(generator, REGIONS),
        image_embedding=_unit(generator, 1)[0],
        gt_boxes_xyxy=_boxes(generator, 12),
        gt_category_ids=generator.integers(1, 1203, 12),
        gt_embeddings=_unit(generator, 12),
    )


def _boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    low = generator.uniform(0, [320, 240], (count, 2))
    return np.concatenate([low, low + generator.uniform(8, 240, (count, 2))], axis=1).astype("f4")


def _unit(generator: np.random.Generator, count: int) -> np.ndarray:
    rows = generator.standard_normal((count, DIM), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
