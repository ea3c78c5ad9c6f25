"""Average precision by LVIS's, COCO's and OV-COCO's rules, per group and per category."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dkdetr.data.splits import Protocol
from dkdetr.errors import DataError
from dkdetr.evaluation.fast import fast_evaluator_name, precision_table
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.official import official_evaluator_name, official_scores
from dkdetr.evaluation.protocols import GROUP_KEYS, MASK_PREFIX, OVERALL_KEYS, group_of
from dkdetr.evaluation.results import Results

Evaluator = Literal["fast", "official"]

_NUM_NAMED = 20


@dataclass(frozen=True)
class CategoryMetrics:
    """One category's numbers; AP and AP50 are NaN without ground truth."""

    category_id: int
    name: str
    group: str
    ap: float
    ap50: float
    num_gt: int
    num_detections: int


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

    Results of masks are compared with masks; their keys begin with `segm.`.

    Detections of categories that the split does not have are left out, as the official tools do,
    and counted in `notes`.

    Args:
        truth: what should have been found.
        results: in file order, which breaks ties of score.
        evaluator: `official` runs the `lvis` or `pycocotools` package itself: slower, the same.

    Raises:
        DataError: results of images that are not in the split, or of no category of it, or masks
            of another size than their image.
    """
    _check_images(truth, results)
    _check_mask_sizes(truth, results)
    prefix = "" if results.masks is None else MASK_PREFIX
    left_out = _unknown_category_notes(truth, results)
    if evaluator == "official":
        name = official_evaluator_name(truth.protocol)
        precision, overall = official_scores(truth, results)
    else:
        name = fast_evaluator_name()
        precision, overall = precision_table(truth, results), {}
    groups = [group_of(truth.protocol, category) for category in truth.categories]
    values = _values(truth.protocol, groups, precision) | overall
    return Metrics(
        split=truth.name,
        protocol=truth.protocol,
        evaluator=name,
        values={prefix + key: value for key, value in values.items()},
        per_category=_per_category(truth, results, groups, precision),
        num_images=len(truth.images),
        num_gt=len(truth.image_ids),
        num_detections=len(results),
        notes=(*truth.notes, *left_out),
    )


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
    truth: GroundTruth, results: Results, groups: list[str], precision: np.ndarray
) -> tuple[CategoryMetrics, ...]:
    num_gt = _counts(truth.category_ids)
    num_detections = _counts(results.category_ids)
    return tuple(
        CategoryMetrics(
            category_id=category.category_id,
            name=category.name,
            group=group,
            ap=_mean(precision[:, :, place, 0]),
            ap50=_mean(precision[0, :, place, 0]),
            num_gt=num_gt.get(category.category_id, 0),
            num_detections=num_detections.get(category.category_id, 0),
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


def _check_mask_sizes(truth: GroundTruth, results: Results) -> None:
    if results.masks is None:
        return
    assert truth.masks is not None, "masks are scored against ground truth without masks"
    sizes = {image.image_id: [image.height, image.width] for image in truth.images}
    pairs = zip(results.image_ids.tolist(), results.masks, strict=True)
    bad = [image_id for image_id, mask in pairs if mask["size"] != sizes[image_id]]
    if bad:
        raise DataError(
            f"{len(bad)} masks have another size than their image in '{truth.name}' (first "
            f"images: {', '.join(map(str, bad[:_NUM_NAMED]))}): masks are of the original file"
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
