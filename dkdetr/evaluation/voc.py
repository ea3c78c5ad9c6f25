"""Pascal VOC 2007's average precision, as mmdetection computes it and the paper's Table 4 with it.

Eleven recalls, boxes that include their last pixel (so sides are one longer than the difference of
corners), difficult objects neither found nor missed. Unlike in COCO a detection looks at the one
object that it overlaps most, taken or not.
"""

from typing import Literal

import numpy as np

from dkdetr.errors import UsageError
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.protocols import VOC_KEYS
from dkdetr.evaluation.results import Results

IOU_THRESHOLDS = (0.5, 0.75)
# mmdetection's own: 0.1 added up, so that the recalls 3/10, 6/10 and 7/10 fall short of theirs.
_RECALLS = np.arange(0, 1 + 1e-3, 0.1)


def voc_scores(
    truth: GroundTruth, results: Results, evaluator: Literal["fast", "official"]
) -> tuple[dict[str, float], np.ndarray]:
    """Returns the mean AP at each IoU threshold, and precision f64[2 IoUs, 11, categories, 1].

    Categories without an object (difficult ones do not count) are -1 in the table and in no mean.

    Raises:
        UsageError: the official evaluator is asked for; VOC's is MATLAB.
    """
    if evaluator == "official":
        raise UsageError(
            "--evaluator official: VOC has no official Python package; `fast` computes its AP as "
            "mmdetection does"
        )
    table = np.full((len(IOU_THRESHOLDS), len(_RECALLS), len(truth.categories), 1), -1.0)
    for place, category in enumerate(truth.categories):
        objects = np.flatnonzero(truth.category_ids == category.category_id)
        if truth.is_crowd[objects].all():
            continue
        found = results.take(results.category_ids == category.category_id)
        # Equal scores by image and then file order, as in the other protocols.
        found = found.take(np.lexsort((found.image_ids, -found.scores)))
        best, overlap = _nearest(truth, objects, found)
        for row, threshold in enumerate(IOU_THRESHOLDS):
            table[row, :, place, 0] = _curve(truth, objects, best, overlap >= threshold)
    defined = table[:, :, :, 0].mean(axis=1)
    means = [row[row >= 0].mean() if (row >= 0).any() else np.nan for row in defined]
    return {key: float(mean) for key, mean in zip(VOC_KEYS, means, strict=True)}, table


def _nearest(
    truth: GroundTruth, objects: np.ndarray, found: Results
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each detection the object of its image it overlaps most, and the IoU or 0."""
    best = np.full(len(found), -1)
    overlap = np.zeros(len(found))
    order = np.argsort(truth.image_ids[objects], kind="stable")
    image_ids = truth.image_ids[objects][order]
    corners = _corners(truth.boxes_xywh[objects], includes_last=True)
    others = _corners(found.boxes_xywh, includes_last=False)
    rows = np.argsort(found.image_ids, kind="stable")
    edges = np.flatnonzero(np.diff(found.image_ids[rows], prepend=-1, append=-1))
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        own = rows[start:stop]
        image_id = found.image_ids[own[0]]
        here = order[slice(*np.searchsorted(image_ids, [image_id, image_id + 1]))]
        if len(here):
            ious = _legacy_ious(others[own], corners[here])
            choice = ious.argmax(axis=1)
            best[own], overlap[own] = here[choice], ious[np.arange(len(own)), choice]
    return best, overlap


def _corners(boxes_xywh: np.ndarray, *, includes_last: bool) -> np.ndarray:
    """Returns the first and last corner; annotations name the last pixel, detections its end."""
    ends = boxes_xywh[:, :2] + boxes_xywh[:, 2:] - int(includes_last)
    return np.concatenate((boxes_xywh[:, :2], ends), axis=1)


def _legacy_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    start = np.maximum(first[:, None, :2], second[None, :, :2])
    end = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (end - start + 1).clip(min=0).prod(axis=2)
    sizes = [(each[:, 2:] - each[:, :2] + 1).prod(axis=1) for each in (first, second)]
    return shared / (sizes[0][:, None] + sizes[1][None, :] - shared)


def _curve(
    truth: GroundTruth, objects: np.ndarray, best: np.ndarray, is_near: np.ndarray
) -> np.ndarray:
    """Returns the highest precision at or beyond each recall; detections descend by score."""
    difficult = truth.is_crowd[objects]
    num_objects = int((~difficult).sum())
    counts = is_near & ~difficult[best]
    # The first detection of an object finds it, later ones are false alarms.
    right = np.zeros(len(best), dtype=bool)
    finders = np.flatnonzero(counts)
    right[finders[np.unique(best[finders], return_index=True)[1]]] = True
    wrong = ~right & ~(is_near & difficult[best])
    num_right, num_wrong = np.cumsum(right), np.cumsum(wrong)
    recall = num_right / num_objects
    precision = num_right / np.maximum(num_right + num_wrong, np.finfo(np.float32).eps)
    return np.array([precision[recall >= each].max(initial=0.0) for each in _RECALLS])
