"""Overlaps and areas of boxes and masks, in the arithmetic of the COCO tools."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from dkdetr.errors import DataError
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.mask_column import MaskColumn, mask_areas, mask_boxes, mask_ious
from dkdetr.evaluation.matching import IOU_THRESHOLDS
from dkdetr.evaluation.results import Results

IouType = Literal["bbox", "segm"]
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")


@runtime_checkable
class Geometry(Protocol):
    """What scoring asks of shapes; rows are those of the results and the ground truth."""

    @property
    def detection_areas(self) -> np.ndarray:
        """f64[num_detections]; they decide small, medium and large."""
        ...

    def overlaps(
        self, detections: np.ndarray, boxes: np.ndarray, is_crowd: np.ndarray
    ) -> np.ndarray:
        """Returns the IoU of each pair; with a crowd, the covered part of the detection."""
        ...


def geometry_of(truth: GroundTruth, results: Results, iou_type: IouType) -> Geometry:
    """Returns the overlaps of boxes or of masks.

    Raises:
        DataError: masks are asked for, and a side has none or of another size than its image.
    """
    if iou_type == "bbox":
        return _Boxes(truth.boxes_xywh, results.boxes_xywh)
    if truth.masks is None:
        raise DataError(f"the annotations of '{truth.name}' have no segmentations to score against")
    if results.masks is None:
        raise DataError("the results have no segmentations to score")
    _check_sizes(truth, results, results.masks)
    areas = mask_areas(results.masks)
    return _Masks(
        truth.masks,
        results.masks,
        detection_areas=_sides(results.boxes_xywh) if results.has_boxes else areas,
        areas=areas,
        box_areas=mask_areas(truth.masks),
        boxes_xywh=mask_boxes(truth.masks),
        detection_boxes_xywh=mask_boxes(results.masks),
    )


def _sides(boxes_xywh: np.ndarray) -> np.ndarray:
    return boxes_xywh[:, 2] * boxes_xywh[:, 3]


def _intersections(first_xywh: np.ndarray, second_xywh: np.ndarray) -> np.ndarray:
    first_ends = first_xywh[:, :2] + first_xywh[:, 2:]
    ends = np.minimum(first_ends, second_xywh[:, :2] + second_xywh[:, 2:])
    sides = ends - np.maximum(first_xywh[:, :2], second_xywh[:, :2])
    return np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)


class _Boxes:
    def __init__(self, boxes_xywh: np.ndarray, detection_boxes_xywh: np.ndarray) -> None:
        self._boxes = boxes_xywh
        self._detections = detection_boxes_xywh
        self.detection_areas = _sides(detection_boxes_xywh)

    def overlaps(
        self, detections: np.ndarray, boxes: np.ndarray, is_crowd: np.ndarray
    ) -> np.ndarray:
        first, second = self._detections[detections], self._boxes[boxes]
        shared = _intersections(first, second)
        own = self.detection_areas[detections]
        union = np.where(is_crowd, own, own + _sides(second) - shared)
        return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


@dataclass(frozen=True, eq=False)
class _Masks:
    """`areas` are pixels; `detection_areas` may be those of boxes (see the README)."""

    truth: MaskColumn
    results: MaskColumn
    detection_areas: np.ndarray
    areas: np.ndarray
    box_areas: np.ndarray
    boxes_xywh: np.ndarray
    detection_boxes_xywh: np.ndarray

    def overlaps(
        self, detections: np.ndarray, boxes: np.ndarray, is_crowd: np.ndarray
    ) -> np.ndarray:
        own, others = self.areas[detections], self.box_areas[boxes]
        frames = _intersections(self.detection_boxes_xywh[detections], self.boxes_xywh[boxes])
        # Two masks share at most the smaller one and the overlap of their frames.
        shared = np.minimum(np.minimum(own, others), frames)
        union = np.where(is_crowd, own, own + others - shared)
        most = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
        ious = np.zeros(len(detections))
        near = np.flatnonzero(most >= IOU_THRESHOLDS[0] - 1e-9)
        ious[near] = mask_ious(
            self.results, self.truth, detections[near], boxes[near], is_crowd[near]
        )
        return ious


def _check_sizes(truth: GroundTruth, results: Results, masks: MaskColumn) -> None:
    image_ids = np.array([image.image_id for image in truth.images], dtype=np.int64)
    sizes = np.array([(image.height, image.width) for image in truth.images]).reshape(-1, 2)
    order = np.argsort(image_ids)
    wanted = sizes[order[np.searchsorted(image_ids[order], results.image_ids)]]
    wrong = np.flatnonzero((masks.sizes_hw != wanted).any(axis=1))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{len(wrong)} masks have another size than their image; the first, of image "
            f"{results.image_ids[first]}, is {masks.sizes_hw[first].tolist()} (height, width), its "
            f"image {wanted[first].tolist()}: they would lie elsewhere"
        )
