"""The arrays of a cache: their shapes and types, and how rows become blocks and come back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.plan import Plan
from cache.rows import ImageRows

DATA_FOLDER = "data.zarr"
REGION_VIEWS = (
    ("region_embeddings", "embedding_scale"),
    ("flipped_embeddings", "flipped_scale"),
)
"""The arrays of a region's vectors, and those of their scales where they are stored as int8."""


@dataclass(frozen=True)
class ArraySpec:
    """One array: `shape` is that of one image's chunk, without the axis of the images."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: float

    def shard_file(self, shard_index: int) -> str:
        """Returns the path, inside the cache, of one shard of this array."""
        zeros = "/0" * len(self.shape)
        return f"{DATA_FOLDER}/{self.name}/c/{shard_index}{zeros}"

    @property
    def chunk_bytes(self) -> int:
        """Returns the bytes of one image's chunk, without its checksum."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def array_specs(plan: Plan) -> tuple[ArraySpec, ...]:
    """Returns the arrays of a cache, in the order in which they are written."""
    regions, dim, nan = plan.max_regions, plan.embed_dim, float("nan")
    num_gt = max(1, plan.max_gt)  # Zarr knows no chunk of no elements
    views = REGION_VIEWS if plan.flipped else REGION_VIEWS[:1]
    stored = "float16" if plan.storage == "fp16" else "int8"
    empty = nan if plan.storage == "fp16" else 0
    embeddings = [ArraySpec(name, (regions, dim), stored, empty) for name, _ in views]
    if plan.storage == "int8":
        embeddings += [ArraySpec(scale, (regions,), "float16", nan) for _, scale in views]
    return (
        ArraySpec("image_id", (), "int64", -1),
        ArraySpec("image_size_hw", (2,), "int32", -1),
        ArraySpec("num_regions", (), "int32", -1),
        ArraySpec("boxes_xyxy", (regions, 4), "float32", nan),
        ArraySpec("objectness", (regions,), "float32", nan),
        ArraySpec("max_base_iou", (regions,), "float32", nan),
        *embeddings,
        ArraySpec("image_embedding", (dim,), "float16", nan),
        ArraySpec("gt/num_boxes", (), "int32", -1),
        ArraySpec("gt/boxes_xyxy", (num_gt, 4), "float32", nan),
        ArraySpec("gt/category_ids", (num_gt,), "int64", -1),
        ArraySpec("gt/embeddings", (num_gt, dim), "float16", nan),
    )


def blocks_of(images: Sequence[ImageRows], plan: Plan) -> dict[str, NDArray[Any]]:
    """Returns, for every array, the block `[len(images), *shape]` that holds these images."""
    blocks = {
        spec.name: np.full((len(images), *spec.shape), spec.fill, spec.dtype)
        for spec in array_specs(plan)
    }
    for at, rows in enumerate(images):
        n, m = rows.num_regions, len(rows.gt_boxes_xyxy)
        blocks["image_id"][at] = rows.image_id
        blocks["image_size_hw"][at] = rows.image_size_hw
        blocks["num_regions"][at] = n
        blocks["boxes_xyxy"][at, :n] = rows.boxes_xyxy
        blocks["objectness"][at, :n] = rows.objectness
        blocks["max_base_iou"][at, :n] = rows.max_base_iou
        blocks["image_embedding"][at] = rows.image_embedding
        blocks["gt/num_boxes"][at] = m
        blocks["gt/boxes_xyxy"][at, :m] = rows.gt_boxes_xyxy
        blocks["gt/category_ids"][at, :m] = rows.gt_category_ids
        blocks["gt/embeddings"][at, :m] = rows.gt_embeddings
        for name, scale in REGION_VIEWS if plan.flipped else REGION_VIEWS[:1]:
            if plan.storage == "fp16":
                blocks[name][at, :n] = getattr(rows, name)
            else:
                blocks[name][at, :n], blocks[scale][at, :n] = quantize(getattr(rows, name))
    return blocks


def quantize(embeddings: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Returns int8 levels [n, D] and float16 scales [n]: levels * scale ~ the unit embeddings.

    The scale is the one that gives unit norm back, whatever the rounding did.
    """
    greatest = np.abs(embeddings).max(axis=1, initial=0, keepdims=True)
    levels = np.rint(embeddings * (127 / greatest)).astype(np.int8)
    norms = np.linalg.norm(levels.astype(np.float32), axis=1)
    return levels, (1 / norms).astype(np.float16)


def rows_of(chunks: Mapping[str, NDArray[Any]]) -> ImageRows:
    """Returns the rows of one image from its chunk of every array; embeddings as stored."""
    n, m = int(chunks["num_regions"]), int(chunks["gt/num_boxes"])
    height, width = (int(side) for side in chunks["image_size_hw"])
    return ImageRows(
        image_id=int(chunks["image_id"]),
        image_size_hw=(height, width),
        boxes_xyxy=chunks["boxes_xyxy"][:n].copy(),
        objectness=chunks["objectness"][:n].copy(),
        max_base_iou=chunks["max_base_iou"][:n].copy(),
        region_embeddings=_vectors(chunks, *REGION_VIEWS[0], n),
        image_embedding=chunks["image_embedding"].astype(np.float32),
        gt_boxes_xyxy=chunks["gt/boxes_xyxy"][:m].copy(),
        gt_category_ids=chunks["gt/category_ids"][:m].copy(),
        gt_embeddings=chunks["gt/embeddings"][:m].astype(np.float32),
        flipped_embeddings=(
            _vectors(chunks, *REGION_VIEWS[1], n) if REGION_VIEWS[1][0] in chunks else None
        ),
    )


def _vectors(
    chunks: Mapping[str, NDArray[Any]], name: str, scale: str, count: int
) -> NDArray[np.float32]:
    """Returns the first `count` vectors of an image, in float32."""
    vectors = chunks[name][:count].astype(np.float32)
    if scale in chunks:
        vectors *= chunks[scale][:count, None].astype(np.float32)
    return vectors
