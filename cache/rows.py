"""What the cache holds of one image, and the checks it passes before it is written."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.plan import Plan
from cache.spec import CorruptCacheError

NORM_TOLERANCE = 2e-3
"""How far the norm of a stored embedding may be from 1."""

_BOX_TOLERANCE = 1e-2
_GT_TOLERANCE = 1.0  # annotations are often drawn a part of a pixel over the edge

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Everything cached of one image. Boxes are in pixels of the original file.

    `gt_*` are the *base* ground truth alone: no box or name of a novel category enters a cache.
    An image without regions is legal; a quarantined one has none, no size, and a NaN embedding.
    """

    image_id: int
    image_size_hw: tuple[int, int]
    boxes_xyxy: Floats
    """[n, 4], sorted by objectness, best first."""
    objectness: Floats
    """[n]"""
    max_base_iou: Floats
    """[n], the best overlap with a base ground-truth box."""
    region_embeddings: Floats
    """[n, embed_dim], unit norm."""
    image_embedding: Floats
    """[embed_dim], unit norm."""
    gt_boxes_xyxy: Floats
    """[m, 4]"""
    gt_category_ids: NDArray[np.int64]
    """[m]"""
    gt_embeddings: Floats
    """[m, embed_dim], unit norm."""
    flipped_embeddings: Floats | None = None
    """[n, embed_dim], unit norm: of the mirrored crops; None where the plan has none."""

    @property
    def num_regions(self) -> int:
        """Returns the number of regions."""
        return len(self.boxes_xyxy)


def empty_rows(image_id: int, plan: Plan) -> ImageRows:
    """Returns what is written for a quarantined image: no regions, no size, a NaN embedding."""
    none = np.zeros(0, np.float32)
    return ImageRows(
        image_id=image_id,
        image_size_hw=(0, 0),
        boxes_xyxy=np.zeros((0, 4), np.float32),
        objectness=none,
        max_base_iou=none,
        region_embeddings=np.zeros((0, plan.embed_dim), np.float32),
        image_embedding=np.full(plan.embed_dim, np.nan, np.float32),
        gt_boxes_xyxy=np.zeros((0, 4), np.float32),
        gt_category_ids=np.zeros(0, np.int64),
        gt_embeddings=np.zeros((0, plan.embed_dim), np.float32),
        flipped_embeddings=np.zeros((0, plan.embed_dim), np.float32) if plan.flipped else None,
    )


def check_rows(rows: ImageRows, plan: Plan) -> None:
    """Returns if the rows may be written.

    Raises:
        CorruptCacheError: names the image, the array and what is wrong with it.
    """
    problem = rows_problem(rows, plan)
    if problem is not None:
        raise CorruptCacheError(f"image {rows.image_id} must not be cached: {problem}")


def rows_problem(rows: ImageRows, plan: Plan) -> str | None:
    """Returns the first thing wrong with an image's rows, naming the array, or None."""
    n, m, dim = len(rows.boxes_xyxy), len(rows.gt_boxes_xyxy), plan.embed_dim
    shapes = {
        "boxes_xyxy": (n, 4),
        "objectness": (n,),
        "max_base_iou": (n,),
        "region_embeddings": (n, dim),
        "image_embedding": (dim,),
        "gt_boxes_xyxy": (m, 4),
        "gt_category_ids": (m,),
        "gt_embeddings": (m, dim),
    }
    if plan.flipped != (rows.flipped_embeddings is not None):
        return f"flipped_embeddings are {'lacking' if plan.flipped else 'not'} in the plan"
    if plan.flipped:
        shapes["flipped_embeddings"] = (n, dim)
    for name, shape in shapes.items():
        array = getattr(rows, name)
        if array.shape != shape:
            return f"{name} has shape {array.shape} instead of {shape}"
        if not np.isfinite(array).all():
            return f"{name} has a value that is not finite"
    if n > plan.max_regions:
        return f"{n} regions, and the plan has room for {plan.max_regions}"
    if m > plan.max_gt:
        return f"{m} ground-truth boxes, and the plan has room for {plan.max_gt}"
    height, width = rows.image_size_hw
    if height < 1 or width < 1:
        return f"image_size_hw is {rows.image_size_hw}"
    return (
        _box_problem("boxes_xyxy", rows.boxes_xyxy, height, width, _BOX_TOLERANCE)
        or _box_problem("gt_boxes_xyxy", rows.gt_boxes_xyxy, height, width, _GT_TOLERANCE)
        or _score_problem(rows)
        or norm_problem("region_embeddings", rows.region_embeddings)
        or norm_problem("image_embedding", rows.image_embedding[None])
        or norm_problem("gt_embeddings", rows.gt_embeddings)
        or flipped_problem(rows)
    )


def flipped_problem(rows: ImageRows) -> str | None:
    """Returns what is wrong with the embeddings of mirrored crops, where there are any, or None."""
    if rows.flipped_embeddings is None:
        return None
    return norm_problem("flipped_embeddings", rows.flipped_embeddings)


def norm_problem(name: str, embeddings: Floats) -> str | None:
    """Returns which row of `[rows, embed_dim]` is not of unit norm (NaN included), or None."""
    norms = np.linalg.norm(embeddings.astype(np.float32, copy=False), axis=1)
    bad = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
    if not bad.any():
        return None
    row = int(bad.argmax())
    return f"{name} row {row} has norm {norms[row]:.4g}, outside 1 +- {NORM_TOLERANCE}"


def _box_problem(name: str, boxes: Floats, height: int, width: int, slack: float) -> str | None:
    x1, y1, x2, y2 = boxes.T
    outside = (np.minimum(x1, y1) < -slack) | (x2 > width + slack) | (y2 > height + slack)
    bad = outside | (x2 <= x1) | (y2 <= y1)
    if not bad.any():
        return None
    row = int(bad.argmax())
    why = "lies outside" if outside[row] else "has no area in"
    box = [round(float(side), 2) for side in boxes[row]]
    return f"{name} row {row} {box} {why} the image of {width}x{height} pixels"


def _score_problem(rows: ImageRows) -> str | None:
    falls = np.diff(rows.objectness) <= 0
    if not falls.all():
        return f"objectness is not sorted: it rises at row {int((~falls).argmax()) + 1}"
    overlap = rows.max_base_iou
    if ((overlap < 0) | (overlap > 1 + 1e-5)).any():
        return "max_base_iou has a value outside 0..1"
    return None
