"""Precision over recall at IoU .5, by group, and what each kind of error costs.

A group's curve is the mean over its categories of precision at the 101 recalls that COCO and LVIS
average, so that the mean of the curve is the group's AP50.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.protocols import group_of, in_group_order
from dkdetr.evaluation.verdicts import Judged, Verdict

RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)

ERROR_KINDS = {
    "classification": "lies on an object of another name",
    "localisation": "near an object of its name, IoU .1 to .5",
    "duplicate": "its object was found by a better one",
    "both": "near an object of another name",
    "background": "near no object",
    "missed": "objects that no detection found, nor nearly",
}

_VERDICT_OF = {
    "classification": Verdict.CLASSIFICATION,
    "localisation": Verdict.LOCALISATION,
    "duplicate": Verdict.DUPLICATE,
    "both": Verdict.BOTH,
    "background": Verdict.BACKGROUND,
}
_MENDABLE = ("classification", "localisation")


@dataclass(frozen=True, eq=False)
class GroupCurve:
    """A group's precision at each of `RECALL_THRESHOLDS`, NaN without objects; its mean is AP50."""

    group: str
    precision: np.ndarray
    num_objects: int
    recall: float
    """Share of objects found under their name."""
    reached: float
    """Share of objects with a box on them, whatever its name."""


@dataclass(frozen=True)
class ErrorKind:
    """A kind of error: how often among the best detections, and AP50 won by its absence.

    `share`: of the detections looked at, by group; `cost`: AP50 with this kind mended, less AP50.
    """

    kind: str
    count: int
    share: float
    cost: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class _Columns:
    """What precision needs: one line a detection, and the objects of each category."""

    category_ids: np.ndarray
    scores: np.ndarray
    is_right: np.ndarray
    num_objects: Mapping[int, int]


def group_curves(truth: GroundTruth, judged: Judged) -> list[GroupCurve]:
    """Returns a curve for `all` and one for each group of the protocol."""
    members = _members(truth)
    precision = _precision_by_category(_columns(truth, judged))
    undefined = np.full(len(RECALL_THRESHOLDS), np.nan)
    curves = []
    for group, ids in members.items():
        inside = judged.counted & np.isin(truth.category_ids, ids)
        count = int(inside.sum())
        rows = [precision[number] for number in ids if number in precision]
        curves.append(
            GroupCurve(
                group=group,
                precision=np.mean(rows, axis=0) if rows else undefined,
                num_objects=count,
                recall=float((judged.finder[inside] >= 0).mean()) if count else float("nan"),
                reached=float(judged.reached[inside].mean()) if count else float("nan"),
            )
        )
    return curves


def error_kinds(truth: GroundTruth, judged: Judged) -> list[ErrorKind]:
    """Returns each kind of error by TIDE's measure, and its share among the best detections.

    The cost of a kind is the AP50 that mending it alone would win. A wrong name or a loose box is
    mended by putting it right, if its object is not found otherwise (else the detection goes); a
    duplicate, a background or a 'both' goes; a missed object is no longer asked for.

    Shares are among as many detections of an image as it has objects, best first, so that no
    threshold is set; those the protocol ignores are left out. `missed` is a share of the objects.
    """
    members = _members(truth)
    before = _ap_by_group(_columns(truth, judged), members)
    objects = judged.counted
    per_image = dict(zip(*np.unique(truth.image_ids[objects], return_counts=True), strict=True))
    looked_at = judged.rank < np.array(
        [per_image.get(number, 0) for number in judged.results.image_ids], dtype=np.int64
    )
    looked_at &= judged.verdicts != Verdict.IGNORED
    missed = _missed(judged)
    kinds = []
    for kind in ERROR_KINDS:
        after = _ap_by_group(_mended(truth, judged, kind), members)
        if kind == "missed":
            count, total = int(missed.sum()), int(objects.sum())
        else:
            count = int((looked_at & (judged.verdicts == _VERDICT_OF[kind])).sum())
            total = int(looked_at.sum())
        cost = {group: after[group] - before[group] for group in members}
        kinds.append(ErrorKind(kind, count, count / total if total else float("nan"), cost))
    return kinds


def _members(truth: GroundTruth) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {"all": [c.category_id for c in truth.categories]}
    named = [(group_of(truth.protocol, c), c.category_id) for c in truth.categories]
    for group in in_group_order(own for own, _ in named if own):
        groups[group] = [number for own, number in named if own == group]
    return groups


def _columns(truth: GroundTruth, judged: Judged) -> _Columns:
    keep = judged.verdicts != Verdict.IGNORED
    return _Columns(
        category_ids=judged.results.category_ids[keep],
        scores=judged.results.scores[keep],
        is_right=judged.verdicts[keep] == Verdict.FOUND,
        num_objects=_counts(truth.category_ids[judged.counted]),
    )


def _mended(truth: GroundTruth, judged: Judged, kind: str) -> _Columns:
    if kind == "missed":
        plain = _columns(truth, judged)
        left = judged.counted & ~_missed(judged)
        return _Columns(
            plain.category_ids, plain.scores, plain.is_right, _counts(truth.category_ids[left])
        )
    verdicts, names = judged.verdicts.copy(), judged.results.category_ids.copy()
    wrong = np.flatnonzero(verdicts == _VERDICT_OF[kind])
    verdicts[wrong] = Verdict.IGNORED
    if kind in _MENDABLE:
        free = judged.finder < 0
        for row in wrong[np.argsort(-judged.results.scores[wrong], kind="stable")].tolist():
            thing = judged.partner[row]
            if free[thing]:
                free[thing] = False
                verdicts[row], names[row] = Verdict.FOUND, truth.category_ids[thing]
    keep = verdicts != Verdict.IGNORED
    return _Columns(
        names[keep],
        judged.results.scores[keep],
        verdicts[keep] == Verdict.FOUND,
        _counts(truth.category_ids[judged.counted]),
    )


def _missed(judged: Judged) -> np.ndarray:
    """Returns the objects that nothing found and that no mendable error is about (TIDE)."""
    nearly = np.isin(judged.verdicts, [_VERDICT_OF[kind] for kind in _MENDABLE])
    missed = judged.counted & (judged.finder < 0)
    missed[judged.partner[nearly]] = False
    return missed


def _ap_by_group(columns: _Columns, members: Mapping[str, Sequence[int]]) -> dict[str, float]:
    precision = {n: float(p.mean()) for n, p in _precision_by_category(columns).items()}
    return {
        group: float(np.mean(found)) if (found := [precision[n] for n in ids if n in precision])
        else float("nan")
        for group, ids in members.items()
    }  # fmt: skip


def _precision_by_category(columns: _Columns) -> dict[int, np.ndarray]:
    """Returns the interpolated precision at `RECALL_THRESHOLDS` of each category with objects."""
    order = np.lexsort((-columns.scores, columns.category_ids))
    names, right = columns.category_ids[order], columns.is_right[order]
    table = {}
    for number, count in columns.num_objects.items():
        low, high = np.searchsorted(names, [number, number + 1])
        table[number] = _interpolated(right[low:high], count)
    return table


def _interpolated(is_right: np.ndarray, num_objects: int) -> np.ndarray:
    hits = np.cumsum(is_right)
    recall = hits / num_objects
    precision = hits / np.maximum(np.arange(1, len(hits) + 1), 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALL_THRESHOLDS, side="left")
    padded = np.append(falling, 0.0)
    return padded[np.minimum(places, len(falling))]


def _counts(ids: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(ids, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
