"""What became of every detection and every object at one IoU threshold.

The metrics come from the evaluators; this asks *why*: which detections found something, which
are false and of what kind, what was missed. The kinds are TIDE's (arXiv 2008.08115), at its two
thresholds; `curves` of these verdicts is the evaluators' AP50 (a test).
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from dkdetr.boxes import pairwise_intersection, pairwise_iou
from dkdetr.data.annotations import ImageInfo
from dkdetr.evaluation.fast import is_known, keep_best_per_image, rank_in_run
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.protocols import MAX_DETECTIONS_PER_CLASS, MAX_DETECTIONS_PER_IMAGE
from dkdetr.evaluation.results import Results

FOUND_IOU = 0.5
"""An object counts as found from here on."""
NEAR_IOU = 0.1
"""Below this overlap with every object a false detection is of the background."""


class Verdict(IntEnum):
    """What a detection is. Those that the protocol does not judge are IGNORED."""

    FOUND = 0
    CLASSIFICATION = 1
    """An object of another name is there (IoU >= .5)."""
    LOCALISATION = 2
    """An object of its name is near (.1 <= IoU < .5)."""
    DUPLICATE = 3
    """The object it lies on was found by a better detection."""
    BOTH = 4
    """An object of another name is near, none of its own."""
    BACKGROUND = 5
    """No object is near."""
    IGNORED = 6


@dataclass(frozen=True, eq=False)
class Judged:
    """The detections that count, in file order, with their verdicts; and the objects.

    `partner[d]`: the object that detection d found or, if it errs, the one that its error is
    about; -1: none. `rank[d]`: its place among its image's detections by score, from 0. `finder[g]`
    the detection that found object g, -1: none. `reached[g]`: some detection of whatever name lies
    on it. `counted[g]`: it is an object to be found, not a crowd.
    """

    results: Results
    verdicts: np.ndarray
    partner: np.ndarray
    rank: np.ndarray
    finder: np.ndarray
    reached: np.ndarray
    counted: np.ndarray


def judge(truth: GroundTruth, results: Results) -> Judged:
    """Returns every detection's verdict by the protocol of `truth`, at IoU .5.

    The protocol's limits hold (LVIS: the best 300 of an image; COCO: the best 100 of a name in an
    image), and what it does not judge is ignored: names that an LVIS image was not checked for,
    names of which not every instance is marked, and what lies in a crowd.
    """
    results = within_limits(truth, results)
    rank = rank_in_run(results.image_ids)
    counted = counted_objects(truth)
    judged = Judged(
        results=results,
        verdicts=np.full(len(results), Verdict.IGNORED, dtype=np.int64),
        partner=np.full(len(results), -1, dtype=np.int64),
        rank=rank,
        finder=np.full(len(truth.image_ids), -1, dtype=np.int64),
        reached=np.zeros(len(truth.image_ids), dtype=bool),
        counted=counted,
    )
    objects_of = rows_by_image(truth.image_ids)
    detections_of = rows_by_image(results.image_ids)
    nothing = np.zeros(0, dtype=np.int64)
    for image in truth.images:
        rows = detections_of.get(image.image_id, nothing)
        if not len(rows):
            continue
        objects = objects_of.get(image.image_id, nothing)
        names = results.category_ids[rows]
        ignored = np.zeros(len(rows), dtype=bool)
        if truth.protocol == "lvis":
            there = truth.category_ids[objects[counted[objects]]]
            ignored = ~is_checked(image, names, there)
        _judge_image(truth, judged, rows, objects, ignored, image.not_exhaustive_category_ids)
    return judged


def counted_objects(truth: GroundTruth) -> np.ndarray:
    """Returns which objects the protocol counts, bool[num_objects]; the others are crowds."""
    # LVIS's official tool does not look at iscrowd, and loads no object without area.
    return truth.areas > 0 if truth.protocol == "lvis" else ~truth.is_crowd


def is_checked(image: ImageInfo, names: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Returns which names an LVIS image was checked for: those `there`, and those said absent."""
    return np.isin(names, np.union1d(there, image.neg_category_ids))


def within_limits(truth: GroundTruth, results: Results) -> Results:
    """Returns the detections that the protocol looks at, by image, best first."""
    order = np.lexsort((np.arange(len(results)), -results.scores, results.image_ids))
    results = results.take(order)
    if truth.protocol == "lvis":
        # The official tool cuts before it filters.
        results = keep_best_per_image(results, MAX_DETECTIONS_PER_IMAGE)
        results = results.take(results.boxes_xywh[:, 2:].prod(axis=1) > 0)
    results = results.take(is_known(truth, results))
    if truth.protocol != "lvis":
        results = results.take(_places_of_pairs(results) < MAX_DETECTIONS_PER_CLASS)
    return results


def _judge_image(
    truth: GroundTruth,
    judged: Judged,
    rows: np.ndarray,
    objects: np.ndarray,
    unchecked: np.ndarray,
    not_exhaustive: tuple[int, ...],
) -> None:
    """Fills in one image's verdicts; `rows` are its detections, best first."""
    names = judged.results.category_ids[rows]
    boxes = box_corners(judged.results.boxes_xywh[rows])
    crowds = objects[~judged.counted[objects]] if truth.protocol != "lvis" else objects[:0]
    objects = objects[judged.counted[objects]]
    overlaps = pairwise_iou(boxes, box_corners(truth.boxes_xywh[objects])).numpy()
    own = names[:, None] == truth.category_ids[objects][None, :]
    judged.reached[objects] = (overlaps >= FOUND_IOU).any(axis=0)
    of_own, of_others = np.where(own, overlaps, 0.0), np.where(own, 0.0, overlaps)
    hidden = in_crowd(truth, boxes, names, crowds)
    lenient = np.isin(names, not_exhaustive) if truth.protocol == "lvis" else hidden
    free = np.ones(len(objects), dtype=bool)
    for place, row in enumerate(rows.tolist()):
        if unchecked[place]:
            continue
        mine = of_own[place]
        best = last_best(np.where(free, mine, 0.0))
        if best >= 0 and mine[best] >= FOUND_IOU:
            free[best] = False
            judged.finder[objects[best]] = row
            judged.verdicts[row], judged.partner[row] = Verdict.FOUND, objects[best]
        elif not lenient[place]:
            verdict, partner = _kind_of_error(mine, of_others[place])
            judged.verdicts[row] = verdict
            judged.partner[row] = objects[partner] if partner >= 0 else -1


def _kind_of_error(own: np.ndarray, others: np.ndarray) -> tuple[Verdict, int]:
    """Returns why a detection that found nothing is false, and the object this is about.

    TIDE's order: near its own name, then on another name, then a duplicate, then nothing near.
    """
    if not len(own):
        return Verdict.BACKGROUND, -1
    mine, other = int(own.argmax()), int(others.argmax())
    if NEAR_IOU <= own[mine] < FOUND_IOU:
        return Verdict.LOCALISATION, mine
    if others[other] >= FOUND_IOU:
        return Verdict.CLASSIFICATION, other
    if own[mine] >= FOUND_IOU:
        return Verdict.DUPLICATE, mine
    if others[other] >= NEAR_IOU:
        return Verdict.BOTH, other
    return Verdict.BACKGROUND, -1


def in_crowd(
    truth: GroundTruth, boxes: torch.Tensor, names: np.ndarray, crowds: np.ndarray
) -> np.ndarray:
    """Returns which detections lie by half or more in a crowd of their name (COCO ignores them)."""
    if not len(crowds):
        return np.zeros(len(names), dtype=bool)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=1e-12)
    share = pairwise_intersection(boxes, box_corners(truth.boxes_xywh[crowds])) / areas[:, None]
    same = names[:, None] == truth.category_ids[crowds][None, :]
    return ((share.numpy() >= FOUND_IOU) & same).any(axis=1)


def last_best(values: np.ndarray) -> int:
    """Returns the last place of the largest value, as the official tools do; -1: all are 0."""
    if not len(values) or values.max() <= 0:
        return -1
    return len(values) - 1 - int(values[::-1].argmax())


def box_corners(boxes_xywh: np.ndarray) -> torch.Tensor:
    """Returns boxes f64[n, 4] by their corners, xyxy."""
    corners = torch.from_numpy(boxes_xywh.reshape(-1, 4).copy())
    corners[:, 2:] += corners[:, :2]
    return corners


def rows_by_image(image_ids: np.ndarray) -> dict[int, np.ndarray]:
    """Returns by image id the rows it has, in their order."""
    order = np.argsort(image_ids, kind="stable")
    ids, starts = np.unique(image_ids[order], return_index=True)
    return dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=False))


def _places_of_pairs(results: Results) -> np.ndarray:
    """Returns each detection's place among those of its image and name; rows are best first."""
    order = np.lexsort((np.arange(len(results)), results.category_ids, results.image_ids))
    pairs = np.stack((results.image_ids[order], results.category_ids[order]), axis=1)
    places = np.empty(len(order), dtype=np.int64)
    if len(order):
        _, inverse = np.unique(pairs, axis=0, return_inverse=True)
        places[order] = rank_in_run(inverse.reshape(-1))
    return places
