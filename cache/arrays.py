"""The arrays of a cache: their shapes and types, and how rows become blocks and come back.

Most arrays hold one chunk an image. Ground truth is ragged: a shard's boxes lie one after the
other, image by image, and `gt/first_row` says where an image's begin. So an image with three
hundred objects costs its own rows, and no padding of every other image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.codec import quantize
from cache.plan import Plan
from cache.rows import ImageRows

DATA_FOLDER = "data.zarr"
GT_CHUNK_ROWS = 64
"""Ground-truth boxes of one chunk: small enough to be read for one image's sake."""

REGION_VIEWS = (
    ("region_embeddings", "embedding_scale"),
    ("flipped_embeddings", "flipped_scale"),
)
"""The arrays of a region's vectors, and those of their scales where they are stored as int8."""

GT_FIELDS: Mapping[str, str] = {
    "gt/boxes_xyxy": "gt_boxes_xyxy",
    "gt/category_ids": "gt_category_ids",
    "gt/embeddings": "gt_embeddings",
}
"""The ragged arrays, and the field of ImageRows that each holds."""


@dataclass(frozen=True)
class ArraySpec:
    """One array: `shape` is that of one row: an image's, or, if `ragged`, a ground-truth box's."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: float
    ragged: bool = False

    def shard_file(self, shard_index: int) -> str:
        """Returns the path, inside the cache, of one shard of this array."""
        zeros = "/0" * len(self.shape)
        return f"{DATA_FOLDER}/{self.name}/c/{shard_index}{zeros}"

    @property
    def chunk_rows(self) -> int:
        """Returns how many rows one chunk holds."""
        return GT_CHUNK_ROWS if self.ragged else 1

    @property
    def chunk_bytes(self) -> int:
        """Returns the bytes of one chunk, without its checksum."""
        return self.chunk_rows * prod(self.shape) * np.dtype(self.dtype).itemsize


def array_specs(plan: Plan) -> tuple[ArraySpec, ...]:
    """Returns the arrays of a cache, in the order in which they are written."""
    regions, dim, nan = plan.max_regions, plan.embed_dim, float("nan")
    views = region_views(plan)
    stored = "float16" if plan.storage == "fp16" else "int8"
    empty = nan if plan.storage == "fp16" else 0
    embeddings = [ArraySpec(name, (regions, dim), stored, empty) for name, _ in views]
    if plan.storage == "int8":
        embeddings += [ArraySpec(scale, (regions,), "float16", nan) for _, scale in views]
    whole_images = (
        (ArraySpec("image_embedding", (dim,), "float16", nan),) if plan.image_embeddings else ()
    )
    return (
        ArraySpec("image_id", (), "int64", -1),
        ArraySpec("image_size_hw", (2,), "int32", -1),
        ArraySpec("num_regions", (), "int32", -1),
        ArraySpec("boxes_xyxy", (regions, 4), "float32", nan),
        ArraySpec("objectness", (regions,), "float32", nan),
        ArraySpec("max_base_iou", (regions,), "float32", nan),
        *embeddings,
        *whole_images,
        ArraySpec("gt/num_boxes", (), "int32", -1),
        ArraySpec("gt/first_row", (), "int64", -1),
        ArraySpec("gt/boxes_xyxy", (4,), "float32", nan, ragged=True),
        ArraySpec("gt/category_ids", (), "int64", -1, ragged=True),
        ArraySpec("gt/embeddings", (dim,), "float16", nan, ragged=True),
    )


def region_views(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Returns the vectors and scales that a region has: of its crop, and of the mirrored one."""
    return REGION_VIEWS if plan.flipped else REGION_VIEWS[:1]


def gt_rows_of_shard(plan: Plan) -> int:
    """Returns the ground-truth rows a shard has room for; chunks that are not used take no room."""
    most = plan.shard_size * max(1, plan.max_gt)
    return -(-most // GT_CHUNK_ROWS) * GT_CHUNK_ROWS


def blocks_of(images: Sequence[ImageRows], plan: Plan) -> dict[str, NDArray[Any]]:
    """Returns, for every array, the block `[rows, *shape]` that holds these images.

    `gt/first_row` counts from the first of these images.
    """
    num_gt = [len(rows.gt_boxes_xyxy) for rows in images]
    first_row = np.concatenate([[0], np.cumsum(num_gt, dtype=np.int64)])
    # One row at least, so that every shard has a file of every array.
    lengths = {True: max(1, int(first_row[-1])), False: len(images)}
    blocks = {
        spec.name: np.full((lengths[spec.ragged], *spec.shape), spec.fill, spec.dtype)
        for spec in array_specs(plan)
    }
    blocks["gt/num_boxes"][:] = num_gt
    blocks["gt/first_row"][:] = first_row[:-1]
    for at, rows in enumerate(images):
        n = rows.num_regions
        blocks["image_id"][at] = rows.image_id
        blocks["image_size_hw"][at] = rows.image_size_hw
        blocks["num_regions"][at] = n
        blocks["boxes_xyxy"][at, :n] = rows.boxes_xyxy
        blocks["objectness"][at, :n] = rows.objectness
        blocks["max_base_iou"][at, :n] = rows.max_base_iou
        if plan.image_embeddings:
            blocks["image_embedding"][at] = rows.image_embedding
        for name, field in GT_FIELDS.items():
            blocks[name][first_row[at] : first_row[at + 1]] = getattr(rows, field)
        for name, scale in region_views(plan):
            if plan.storage == "fp16":
                blocks[name][at, :n] = getattr(rows, name)
            else:
                blocks[name][at, :n], blocks[scale][at, :n] = quantize(getattr(rows, name))
    return blocks
