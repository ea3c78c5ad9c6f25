"""A cache of 64 images whose every number is exact in binary, and the hash it must have.

The same rows give the same bytes on every processor, so another hash means another format: of
ours, or of zarr's. A deliberate change is recorded by `python -m tests.golden.golden_cache`.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import zarr

from cache.plan import Plan, make_plan
from cache.rows import ImageRows
from cache.writer import create_or_resume

RECORD = Path(__file__).with_name("cache_roots.json")
STORAGES = ("fp16", "int8")
_DIM = 16


def zarr_major() -> str:
    """Returns the key under which this zarr's hashes are recorded."""
    return f"zarr {zarr.__version__.partition('.')[0]}"


def golden_root(folder: Path, storage: str) -> str:
    """Writes the cache and returns its Merkle root."""
    plan = make_plan(
        range(64), max_regions=8, embed_dim=_DIM, max_gt=3, batch_layout={"crops": 8},
        storage=storage,
    )  # fmt: skip
    parts = {name: {"golden": name} for name in _PARTS} | {"schema": 2}
    with create_or_resume(folder, parts=parts, plan=plan, provenance={}) as writer:
        for shard in writer.missing_shards():
            rows = [_rows(image_id, plan) for image_id in plan.shard_image_ids(shard)]
            writer.commit_shard(shard, rows)
        writer.write_text({"names": ["cat", "dog"]}, _unit_vectors(0, 2))
        return writer.seal().merkle_root


_PARTS = (
    "split", "images", "proposals", "crops", "teacher", "storage", "batch_layout", "text",
)  # fmt: skip


def _rows(image_id: int, plan: Plan) -> ImageRows:
    regions, objects = image_id % (plan.max_regions + 1), image_id % (plan.max_gt + 1)
    return ImageRows(
        image_id=image_id,
        image_size_hw=(96, 128),
        boxes_xyxy=_boxes(image_id, regions),
        objectness=(np.arange(regions, 0, -1) / 64).astype(np.float32),
        max_base_iou=(np.arange(regions) / 32).astype(np.float32),
        region_embeddings=_unit_vectors(image_id, regions),
        image_embedding=_unit_vectors(image_id, 1)[0],
        gt_boxes_xyxy=_boxes(image_id + 7, objects),
        gt_category_ids=np.arange(1, objects + 1),
        gt_embeddings=_unit_vectors(image_id + 7, objects),
    )


def _boxes(start: int, count: int) -> np.ndarray:
    corner = np.arange(start, start + count, dtype=np.float32)[:, None] % 48
    return np.concatenate((corner, corner, corner + 16, corner + 24.5), axis=1)


def _unit_vectors(start: int, count: int) -> np.ndarray:
    """Four halves of alternating sign, in places that differ: unit vectors without rounding."""
    vectors = np.zeros((count, _DIM), dtype=np.float32)
    for row in range(count):
        for place in range(4):
            vectors[row, (start + row + 5 * place) % _DIM] = 0.5 * (-1) ** (row + place)
    return vectors


def main() -> None:
    """Records the hashes of this zarr beside those of others."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    with TemporaryDirectory() as folder:
        known[zarr_major()] = {
            storage: golden_root(Path(folder) / storage, storage) for storage in STORAGES
        }
    RECORD.write_text(json.dumps(known, indent=2) + "\n")
    sys.stdout.write(RECORD.read_text())


if __name__ == "__main__":
    main()
