"""What scoring needs to know of a split, read from its annotation file as it stands.

Evaluation keeps the file's own numbers (64-bit boxes, areas of the *segmentations*, which decide
small, medium and large), because a box moved by a rounding error can cross an IoU threshold.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from dkdetr.data.annotations import Category, ImageInfo
from dkdetr.data.splits import Protocol, Split
from dkdetr.errors import DataError
from dkdetr.run_lengths import segmentation_rle


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Everything a protocol compares detections with; boxes are columns, in file order.

    `image_ids` i64[n], `category_ids` i64[n], `boxes_xywh` f64[n, 4] in original pixels,
    `areas` f64[n] of the segmentations, `is_crowd` bool[n]; `masks` are run lengths, object[n],
    where masks are scored.
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
    masks: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def of_image(self, image_id: int) -> np.ndarray:
        """Returns the indices of one image's boxes, in file order."""
        return np.flatnonzero(self.image_ids == image_id)


def ground_truth_of(split: Split, *, with_masks: bool = False) -> GroundTruth:
    """Returns a split's ground truth: the boxes of its images in its categories, and their masks.

    Raises:
        DataError: the annotation file has no list of annotations, or one of them lacks a field.
    """
    wanted_images = {image.image_id for image in split.images}
    wanted_categories = {category.category_id for category in split.categories}
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
        categories=split.categories,
        images=split.images,
        notes=notes,
        masks=_masks(kept, split) if with_masks else None,
        **columns,
    )


def _masks(records: list[dict[str, Any]], split: Split) -> np.ndarray:
    sizes = {image.image_id: (image.height, image.width) for image in split.images}
    masks = np.empty(len(records), dtype=object)
    for index, record in enumerate(records):
        try:
            masks[index] = segmentation_rle(record.get("segmentation"), sizes[record["image_id"]])
        except ValueError as error:
            raise DataError(
                f"'{split.annotations_path}': annotation {record.get('id', index)} has no mask to "
                f"score against ({error}); score boxes, or mend the file"
            ) from None
    return masks


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
