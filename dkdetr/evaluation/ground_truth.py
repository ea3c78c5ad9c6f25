"""What scoring needs to know of a split, read from its annotation file as it stands.

Evaluation keeps the file's own numbers (64-bit boxes, areas of the *segmentations*, which decide
small, medium and large), because a box moved by a rounding error can cross an IoU threshold.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dkdetr.data.annotation_file import parse_annotation_file
from dkdetr.data.annotations import Category, ImageInfo
from dkdetr.data.split_sources import Protocol
from dkdetr.data.splits import Split
from dkdetr.data.voc import read_voc_objects
from dkdetr.errors import DataError
from dkdetr.evaluation.mask_column import MaskColumn, encode_segmentation, join_masks

_NUM_NAMED = 20


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Everything a protocol compares detections with; boxes are columns, in file order.

    `image_ids` i64[n], `category_ids` i64[n], `boxes_xywh` f64[n, 4] in original pixels,
    `areas` f64[n] of the segmentations, `is_crowd` bool[n] (VOC's difficult objects). `masks` are
    there if they were asked for.
    """

    name: str
    protocol: Protocol
    categories: tuple[Category, ...]
    images: tuple[ImageInfo, ...]
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    notes: tuple[str, ...] = ()
    masks: MaskColumn | None = None

    def of_image(self, image_id: int) -> np.ndarray:
        """Returns the indices of one image's boxes, in file order."""
        return np.flatnonzero(self.image_ids == image_id)


def ground_truth_of(split: Split, *, with_masks: bool = False) -> GroundTruth:
    """Returns a split's ground truth: the boxes of its images in its categories.

    Args:
        split: read again from its files.
        with_masks: read the segmentations too.

    Raises:
        DataError: the annotation file has no list of annotations, or one of them lacks a field;
            masks are wanted and the split has none.
    """
    if split.protocol == "voc":
        return _voc_ground_truth(split, with_masks)
    wanted_images = {image.image_id for image in split.images}
    wanted_categories = {category.category_id for category in split.categories}
    path = split.annotations_path
    try:
        records = parse_annotation_file(path, with_polygons=with_masks)["annotations"]
        kept = [
            record
            for record in records
            if record["image_id"] in wanted_images and record["category_id"] in wanted_categories
        ]
        columns = _columns(kept)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"'{path}' is no annotation file in COCO or LVIS form: {error!r}; "
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
        categories=split.categories,
        images=split.images,
        notes=notes,
        masks=_masks(kept, split, path) if with_masks else None,
        **columns,
    )


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    boxes_xywh = np.array([record["bbox"] for record in records], dtype=np.float64).reshape(-1, 4)
    sides = boxes_xywh[:, 2] * boxes_xywh[:, 3]
    areas = [record.get("area", side) for record, side in zip(records, sides.tolist(), strict=True)]
    if set(map(type, areas)) - {int, float} or not all(map(math.isfinite, areas)):
        raise ValueError("an area is not a finite number")
    return {
        "image_ids": np.array([record["image_id"] for record in records], dtype=np.int64),
        "category_ids": np.array([record["category_id"] for record in records], dtype=np.int64),
        "boxes_xywh": boxes_xywh,
        "areas": np.array(areas, dtype=np.float64),
        "is_crowd": np.array([bool(record.get("iscrowd", 0)) for record in records], dtype=bool),
    }


def _masks(records: list[dict[str, Any]], split: Split, path: Path) -> MaskColumn:
    sizes = {image.image_id: (image.height, image.width) for image in split.images}
    sizes_hw = [sizes[record["image_id"]] for record in records]
    counts: list[bytes] = []
    bad: list[str] = []
    for index, (record, size) in enumerate(zip(records, sizes_hw, strict=True)):
        try:
            counts.append(encode_segmentation(record["segmentation"], *size))
        except (KeyError, TypeError, ValueError, AttributeError):
            bad.append(str(record.get("id", f"#{index}")))
    if bad:
        more = f" and {len(bad) - _NUM_NAMED} more" if len(bad) > _NUM_NAMED else ""
        raise DataError(
            f"'{path}': {len(bad)} of {len(records)} annotations have no segmentation of polygons "
            f"or run lengths to score masks against: id {', '.join(bad[:_NUM_NAMED])}{more}"
        )
    return join_masks(counts, np.array(sizes_hw).reshape(-1, 2))


def _voc_ground_truth(split: Split, with_masks: bool) -> GroundTruth:
    if with_masks:
        raise DataError(f"{split.name}: the VOC protocol scores boxes only")
    objects = read_voc_objects(split.annotations_path)
    return GroundTruth(
        name=split.name,
        protocol="voc",
        categories=split.categories,
        images=split.images,
        image_ids=objects.image_ids,
        category_ids=objects.category_ids,
        boxes_xywh=objects.boxes_xywh,
        areas=objects.boxes_xywh[:, 2] * objects.boxes_xywh[:, 3],
        is_crowd=objects.is_difficult,
    )
