"""Average precision by the rules of LVIS, COCO, OV-COCO and VOC, per group and per category."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dkdetr.data.split_sources import Protocol
from dkdetr.errors import DataError
from dkdetr.evaluation.fast import fast_evaluator_name, precision_table
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.official import official_evaluator_name, official_scores
from dkdetr.evaluation.protocols import (
    GROUP_KEYS,
    IOU_TYPES,
    MASK_PREFIX,
    OVERALL_KEYS,
    IouType,
    group_of,
)
from dkdetr.evaluation.results import Results
from dkdetr.evaluation.voc import voc_scores

Evaluator = Literal["fast", "official"]

_NUM_NAMED = 20


@dataclass(frozen=True)
class CategoryMetrics:
    """One category's numbers, of boxes (of masks where there are only these).

    APs are NaN without ground truth, `ap` also in VOC, `segm_ap` is there where both are scored.
    """

    category_id: int
    name: str
    group: str
    ap: float
    ap50: float
    ap75: float
    num_gt: int
    num_detections: int
    segm_ap: float = math.nan


@dataclass(frozen=True)
class Metrics:
    """The numbers of one set of detections on one split; APs are in [0, 1], NaN where undefined."""

    split: str
    protocol: Protocol
    evaluator: str
    values: Mapping[str, float]
    per_category: tuple[CategoryMetrics, ...]
    num_images: int
    num_gt: int
    num_detections: int
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns the keys of `eval --json`: every metric (NaN as null), then what was scored."""
        values = {key: None if math.isnan(value) else value for key, value in self.values.items()}
        return values | {
            "split": self.split,
            "protocol": self.protocol,
            "evaluator": self.evaluator,
            "num_images": self.num_images,
            "num_gt": self.num_gt,
            "num_detections": self.num_detections,
            "notes": list(self.notes),
        }


def score(truth: GroundTruth, results: Results, *, evaluator: Evaluator = "fast") -> Metrics:
    """Returns the metrics of `results` by the protocol of `truth`.

    Boxes are scored if the results have boxes, masks (keys `segm.AP`, ...) if they have masks.
    Detections of categories that the split does not have are left out, as the official tools do,
    and counted in `notes`.

    Args:
        truth: what should have been found.
        results: in file order, which breaks ties of score.
        evaluator: `official` runs the `lvis` or `pycocotools` package itself: slower, the same.

    Raises:
        DataError: results of images that are not in the split, or of no category of it, or masks
            where the annotations have none.
        UsageError: `official` for VOC, which has no official Python package.
    """
    _check_images(truth, results)
    notes = (*truth.notes, *_unknown_category_notes(truth, results), *_mask_notes(results))
    groups = [group_of(truth.protocol, category) for category in truth.categories]
    values: dict[str, float] = {}
    tables: dict[IouType, np.ndarray] = {}
    name_of = official_evaluator_name if evaluator == "official" else fast_evaluator_name
    if truth.protocol == "voc":
        values, precision = voc_scores(truth, results, evaluator)
        tables["bbox"] = precision
    for iou_type in _iou_types(truth, results):
        if evaluator == "official":
            precision, overall = official_scores(truth, results, iou_type)
        else:
            precision, overall = precision_table(truth, results, iou_type=iou_type), {}
        prefix = MASK_PREFIX if iou_type == "segm" else ""
        found = _values(truth.protocol, groups, precision) | overall
        values |= {prefix + key: value for key, value in found.items()}
        tables[iou_type] = precision
    return Metrics(
        split=truth.name,
        protocol=truth.protocol,
        evaluator=name_of(truth.protocol),
        values=values,
        per_category=_per_category(truth, results, groups, tables),
        num_images=len(truth.images),
        num_gt=len(truth.image_ids),
        num_detections=len(results),
        notes=notes,
    )


def _iou_types(truth: GroundTruth, results: Results) -> tuple[IouType, ...]:
    if truth.protocol == "voc":
        return ()
    has = {"bbox": results.has_boxes, "segm": results.masks is not None}
    return tuple(each for each in IOU_TYPES if has[each])


def _values(protocol: Protocol, groups: list[str], precision: np.ndarray) -> dict[str, float]:
    whole = (
        _mean(precision[..., 0]),
        _mean(precision[0, ..., 0]),
        _mean(precision[5, ..., 0]),
        *(_mean(precision[..., size]) for size in (1, 2, 3)),
    )
    values = dict(zip(OVERALL_KEYS, whole, strict=True))
    for key, group in GROUP_KEYS[protocol].items():
        members = [place for place, own in enumerate(groups) if group in (own, "all")]
        thresholds = slice(0, 1) if key.startswith("AP50") else slice(None)
        values[key] = _mean(precision[thresholds][:, :, members, 0])
    return values


def _per_category(
    truth: GroundTruth, results: Results, groups: list[str], tables: Mapping[IouType, np.ndarray]
) -> tuple[CategoryMetrics, ...]:
    num_gt = _counts(truth.category_ids)
    num_detections = _counts(results.category_ids)
    precision = tables["bbox" if "bbox" in tables else "segm"]
    is_voc = truth.protocol == "voc"
    return tuple(
        CategoryMetrics(
            category_id=category.category_id,
            name=category.name,
            group=group,
            ap=math.nan if is_voc else _mean(precision[:, :, place, 0]),
            ap50=_mean(precision[0, :, place, 0]),
            ap75=_mean(precision[1 if is_voc else 5, :, place, 0]),
            num_gt=num_gt.get(category.category_id, 0),
            num_detections=num_detections.get(category.category_id, 0),
            segm_ap=_mean(tables["segm"][:, :, place, 0]) if len(tables) > 1 else math.nan,
        )
        for place, (category, group) in enumerate(zip(truth.categories, groups, strict=True))
    )


def _mean(precision: np.ndarray) -> float:
    # -1 marks categories that no image shows at this size: they have no precision.
    defined = precision[precision > -1]
    return float(np.mean(defined)) if defined.size else math.nan


def _counts(ids: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(ids, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _check_images(truth: GroundTruth, results: Results) -> None:
    known = np.array([image.image_id for image in truth.images], dtype=np.int64)
    unknown = np.setdiff1d(results.image_ids, known)
    if len(unknown):
        first = ", ".join(str(image_id) for image_id in unknown[:_NUM_NAMED])
        raise DataError(
            f"the results name {len(unknown)} images that split '{truth.name}' does not have "
            f"(first: {first}): they belong to another split"
        )


def _mask_notes(results: Results) -> tuple[str, ...]:
    if results.masks is None or not results.has_boxes:
        return ()
    return (
        "the records hold boxes and masks: as in the official tools, the areas of the boxes decide "
        "which masks are small, medium and large",
    )


def _unknown_category_notes(truth: GroundTruth, results: Results) -> tuple[str, ...]:
    known = [category.category_id for category in truth.categories]
    strange = ~np.isin(results.category_ids, known)
    if not strange.any():
        return ()
    ids = np.unique(results.category_ids[strange])
    first = ", ".join(str(category_id) for category_id in ids[:_NUM_NAMED])
    if strange.all():
        raise DataError(
            f"no detection is of a category of split '{truth.name}' (ids in the results: {first}): "
            "category_id must be the data set's own number, not an index"
        )
    return (
        f"{int(strange.sum())} detections of {len(ids)} categories that '{truth.name}' does not "
        f"have are left out (ids: {first})",
    )
