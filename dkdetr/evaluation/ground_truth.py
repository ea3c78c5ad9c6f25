"""What scoring needs to know of a split, read from its annotation file as it stands.

Evaluation keeps the file's own numbers (64-bit boxes, areas of the *segmentations*, which decide
small, medium and large), because a box moved by a rounding error can cross an IoU threshold.
"""

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from dkdetr.errors import DataError

Protocol = Literal["lvis", "coco", "ovcoco"]


class Split(typing.Protocol):
    """What scoring asks of a split."""

    name: str
    protocol: Any
    annotations_path: Path
    categories: Any
    images: Any


@dataclass(frozen=True)
class ScoredCategory:
    """A category and the group it is scored in; `frequency` is r, c, f or ''."""

    category_id: int
    name: str
    frequency: str
    is_base: bool


@dataclass(frozen=True)
class ScoredImage:
    """An image; the two lists say which absent categories can be trusted (LVIS; else empty)."""

    image_id: int
    neg_category_ids: tuple[int, ...]
    not_exhaustive_category_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Everything a protocol compares detections with; boxes are columns, in file order.

    `image_ids` i64[n], `category_ids` i64[n], `boxes_xywh` f64[n, 4] in original pixels,
    `areas` f64[n] of the segmentations, `is_crowd` bool[n].
    """

    name: str
    protocol: Protocol
    categories: tuple[ScoredCategory, ...]
    images: tuple[ScoredImage, ...]
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    notes: tuple[str, ...] = ()

    def of_image(self, image_id: int) -> np.ndarray:
        """Returns the indices of one image's boxes, in file order."""
        return np.flatnonzero(self.image_ids == image_id)


def ground_truth_of(split: Split) -> GroundTruth:
    """Returns a split's ground truth: the boxes of its images in its categories.

    Raises:
        DataError: the annotation file has no list of annotations, or one of them lacks a field.
    """
    categories = tuple(
        ScoredCategory(c.category_id, c.name, c.frequency, c.is_base) for c in split.categories
    )
    images = tuple(
        ScoredImage(
            image.image_id,
            tuple(image.neg_category_ids),
            tuple(image.not_exhaustive_category_ids),
        )
        for image in split.images
    )
    wanted_images = {image.image_id for image in images}
    wanted_categories = {category.category_id for category in categories}
    try:
        records = orjson.loads(split.annotations_path.read_bytes())["annotations"]
        kept = [
            record
            for record in records
            if record["image_id"] in wanted_images and record["category_id"] in wanted_categories
        ]
        columns = _columns(kept)
    except OSError as error:
        raise DataError(f"cannot read '{split.annotations_path}': {error.strerror}") from None
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"'{split.annotations_path}' is no annotation file in COCO or LVIS form: {error!r}; "
            "see `dkdetr data check`"
        ) from None
    without_area = sum("area" not in record for record in kept)
    notes = (
        (f"{without_area} boxes have no area of a segmentation: width x height decides their size",)
        if without_area
        else ()
    )
    return GroundTruth(
        name=split.name,
        protocol=split.protocol,
        categories=categories,
        images=images,
        notes=notes,
        **columns,
    )


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    boxes_xywh = np.array([record["bbox"] for record in records], dtype=np.float64).reshape(-1, 4)
    sides = boxes_xywh[:, 2] * boxes_xywh[:, 3]
    areas = [record.get("area", side) for record, side in zip(records, sides, strict=True)]
    return {
        "image_ids": np.array([record["image_id"] for record in records], dtype=np.int64),
        "category_ids": np.array([record["category_id"] for record in records], dtype=np.int64),
        "boxes_xywh": boxes_xywh,
        "areas": np.array(areas, dtype=np.float64),
        "is_crowd": np.array([bool(record.get("iscrowd", 0)) for record in records], dtype=bool),
    }
