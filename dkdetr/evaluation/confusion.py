"""Which names are taken for which others: pairs, not a matrix of all names by all names."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dkdetr.boxes import pairwise_iou
from dkdetr.data.annotations import ImageInfo
from dkdetr.defaults import DEFAULT_THRESHOLD
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.protocols import group_of
from dkdetr.evaluation.results import Results
from dkdetr.evaluation.verdicts import (
    FOUND_IOU,
    box_corners,
    counted_objects,
    in_crowd,
    is_checked,
    last_best,
    rows_by_image,
    within_limits,
)

LEAST_SCORE = DEFAULT_THRESHOLD
"""What `dkdetr predict` shows by default."""

_HEADER = (
    "category_id", "name", "group", "named_category_id", "named_as", "named_group", "count",
    "num_objects", "share", "least_score",
)  # fmt: skip


@dataclass(frozen=True)
class ConfusedPair:
    """Objects of `name` that a detection calls `named_as`: `count` of its `num_objects`.

    Groups are the protocol's, '' where it has none.
    """

    category_id: int
    name: str
    group: str
    named_category_id: int
    named_as: str
    named_group: str
    count: int
    num_objects: int

    @property
    def share(self) -> float:
        """Of the objects of the true name, on the whole split."""
        return self.count / self.num_objects


def confused_pairs(
    truth: GroundTruth, results: Results, *, least_score: float = LEAST_SCORE
) -> list[ConfusedPair]:
    """Returns every pair of a true name and another that it was given, the most frequent first.

    Detections from `least_score` on claim objects at IoU .5, in the order of their scores, an
    object and a detection each once: one of their own name, or else, where none of their own lies
    there at all, one of another name, and that is the pair. So an object counts by the best-scored
    name alone that it was given.

    What the protocol does not judge claims no object of another name (`verdicts.judge`): in LVIS
    names that an image has neither boxes of nor says to be absent, and those of which not every
    instance is marked; elsewhere what lies in a crowd of its name. Crowds are no objects.
    """
    results = within_limits(truth, results.take(results.scores >= least_score))
    is_lvis = truth.protocol == "lvis"
    counted = counted_objects(truth)
    objects_of, detections_of = rows_by_image(truth.image_ids), rows_by_image(results.image_ids)
    pairs: Counter[tuple[int, int]] = Counter()
    for image in truth.images:
        objects = objects_of.get(image.image_id)
        rows = detections_of.get(image.image_id)
        if objects is None or rows is None:
            continue
        real, crowds = objects[counted[objects]], objects[~counted[objects]]
        names = results.category_ids[rows]
        boxes = box_corners(results.boxes_xywh[rows])
        there = truth.category_ids[real]
        judged = (
            _may_be_wrong(image, names, there) if is_lvis
            else ~in_crowd(truth, boxes, names, crowds)
        )  # fmt: skip
        overlaps = pairwise_iou(boxes, box_corners(truth.boxes_xywh[real])).numpy()
        for true, named in _claims(overlaps, there, names, judged):
            pairs[true, named] += 1
    return _described(truth, pairs, truth.category_ids[counted])


def _may_be_wrong(image: ImageInfo, names: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Returns which names an LVIS image was checked for, every instance of them."""
    whole = ~np.isin(names, image.not_exhaustive_category_ids)
    return is_checked(image, names, there) & whole


def _claims(
    overlaps: np.ndarray, there: np.ndarray, names: np.ndarray, judged: np.ndarray
) -> list[tuple[int, int]]:
    """Returns (true name, given name) of one image's objects; detections come best first.

    `overlaps` f64[num_detections, num_objects] are IoUs.
    """
    free = np.ones(len(there), dtype=bool)
    wrong: list[tuple[int, int]] = []
    near = np.where(overlaps >= FOUND_IOU, overlaps, 0.0)
    for row in np.flatnonzero(near.any(axis=1)).tolist():
        own = there == names[row]
        claimed = last_best(np.where(free & own, near[row], 0.0))
        if claimed < 0 and judged[row] and not near[row][own].any():
            claimed = last_best(np.where(free, near[row], 0.0))
            if claimed >= 0:
                wrong.append((int(there[claimed]), int(names[row])))
        if claimed >= 0:
            free[claimed] = False
    return wrong


def _described(
    truth: GroundTruth, pairs: Counter[tuple[int, int]], objects: np.ndarray
) -> list[ConfusedPair]:
    known = {category.category_id: category for category in truth.categories}
    ids, counts = np.unique(objects, return_counts=True)
    num_objects = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    found = [
        ConfusedPair(
            category_id=true,
            name=known[true].name,
            group=group_of(truth.protocol, known[true]),
            named_category_id=named,
            named_as=known[named].name,
            named_group=group_of(truth.protocol, known[named]),
            count=count,
            num_objects=num_objects[true],
        )
        for (true, named), count in pairs.items()
    ]
    return sorted(found, key=lambda each: (-each.count, -each.share, each.name, each.named_as))


def confusion_csv(pairs: Sequence[ConfusedPair], *, least_score: float = LEAST_SCORE) -> str:
    """Returns one line a pair, as they come; `share` in [0, 1]."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    for each in pairs:
        true = (each.category_id, each.name, each.group)
        named = (each.named_category_id, each.named_as, each.named_group)
        writer.writerow(
            (*true, *named, each.count, each.num_objects, repr(each.share), least_score)
        )
    return text.getvalue()
