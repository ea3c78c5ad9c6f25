"""Detections matched to ground truth as `lvis` and `pycocotools` do it, for all cells at once.

A cell is one category in one image; cells never influence each other. Within a cell detections
choose in the order of their scores, so the n-th choices of all cells can be made in one NumPy step.
Only pairs that overlap by the lowest threshold can ever match: all else stays out of the steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_AREA_EDGES = (0.0, 32.0**2, 96.0**2, 1e10)
NUM_SIZES = 4
"""All, small, medium, large."""
_PAIRS_AT_ONCE = 2_000_000

Overlaps = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`overlaps(detections, boxes)`: the IoU of each pair of rows, or of a detection with a crowd."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Detections and boxes sorted by cell; `keys` name the cells and ascend.

    Detections of a cell descend by score; its boxes are in file order. `*_areas` decide the size;
    `can_miss` is False on detections that, unmatched, say nothing (a category that is not marked
    exhaustively in their image).
    """

    detection_keys: np.ndarray
    detection_areas: np.ndarray
    can_miss: np.ndarray
    box_keys: np.ndarray
    box_areas: np.ndarray
    is_crowd: np.ndarray


@dataclass(frozen=True, eq=False)
class Matches:
    """The outcome for the detections that overlap anything enough; all others stay unmatched.

    `detections` are rows of the cells, ascending. `is_matched` and `is_right` are
    bool[rows, 4 sizes, 10 thresholds]; matched but not right is a detection of an ignored box.
    """

    detections: np.ndarray
    is_matched: np.ndarray
    is_right: np.ndarray


def outside_sizes(areas: np.ndarray) -> np.ndarray:
    """Returns bool[n, 4 sizes]: whether an area is outside the range; edges belong to both."""
    smallest, largest = (0.0, 0.0, *_AREA_EDGES[1:3]), (_AREA_EDGES[3], *_AREA_EDGES[1:])
    column = areas[:, None]
    return (column < np.array(smallest)) | (column > np.array(largest))


def match(cells: Cells, overlaps: Overlaps) -> Matches:
    """Returns what each detection is matched to at every size and threshold.

    Among the boxes that are free and overlap enough, a detection takes one that counts before one
    that is ignored (a crowd, or of another size), then the one of the highest overlap, then the
    last in file order. A crowd is never used up.
    """
    ignored = outside_sizes(cells.box_areas) | cells.is_crowd[:, None]
    detections, boxes, ious = _candidates(cells, overlaps)
    # The last allowed pair of a detection is then its best.
    order = np.lexsort((boxes, ious, detections))
    detections, boxes, ious = detections[order], boxes[order], ious[order]
    rows, first, counts = np.unique(detections, return_index=True, return_counts=True)
    shape = (len(rows), NUM_SIZES, len(IOU_THRESHOLDS))
    matches = Matches(rows, np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool))
    taken = np.zeros((len(cells.box_keys), *shape[1:]), dtype=bool)
    for turn in _turns(cells.detection_keys[rows]):
        pairs, starts = _ragged(first[turn], counts[turn])
        own = boxes[pairs]
        allowed = (ious[pairs, None] >= IOU_THRESHOLDS)[:, None, :] & ~taken[own]
        places = np.arange(1, len(pairs) + 1, dtype=np.int32)[:, None, None]
        counting = np.maximum.reduceat(
            np.where(allowed & ~ignored[own][:, :, None], places, 0), starts, axis=0
        )
        ignoring = np.maximum.reduceat(
            np.where(allowed & ignored[own][:, :, None], places, 0), starts, axis=0
        )
        chosen = np.where(counting > 0, counting, ignoring)
        matches.is_right[turn] = counting > 0
        matches.is_matched[turn] = chosen > 0
        _, size, threshold = np.nonzero(chosen)
        winners = own[chosen[chosen > 0] - 1]
        taken[winners, size, threshold] = ~cells.is_crowd[winners]
    return matches


def _candidates(cells: Cells, overlaps: Overlaps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the pairs (detection, box, IoU) of a cell that overlap by the lowest threshold."""
    start = np.searchsorted(cells.box_keys, cells.detection_keys, side="left")
    stop = np.searchsorted(cells.box_keys, cells.detection_keys, side="right")
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for rows in _slices(stop - start):
        counts = (stop - start)[rows]
        boxes, _ = _ragged(start[rows], counts)
        detections = np.repeat(np.arange(rows.start, rows.stop), counts)
        ious = overlaps(detections, boxes)
        near = ious >= IOU_THRESHOLDS[0]
        parts.append((detections[near], boxes[near], ious[near]))
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return none, none, np.zeros(0)
    detections, boxes, ious = zip(*parts, strict=True)
    return np.concatenate(detections), np.concatenate(boxes), np.concatenate(ious)


def _slices(counts: np.ndarray) -> Iterator[slice]:
    """Yields slices of rows that together have a bounded number of pairs."""
    total = np.concatenate(([0], np.cumsum(counts)))
    start = 0
    while start < len(counts):
        stop = int(np.searchsorted(total, total[start] + _PAIRS_AT_ONCE, side="right")) - 1
        stop = min(max(stop, start + 1), len(counts))
        yield slice(start, stop)
        start = stop


def _ragged(start: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns start[0] .. start[0] + counts[0] - 1, start[1] .. and where each run begins."""
    ends = np.cumsum(counts)
    begins = ends - counts
    flat = np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - begins, counts)
    return flat, begins


def _turns(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the first row of every cell, then the second of each, and so on; `keys` ascend."""
    ranks = np.arange(len(keys)) - np.searchsorted(keys, keys, side="left")
    order = np.argsort(ranks, kind="stable")
    edges = np.cumsum(np.bincount(ranks)) if len(keys) else []
    start = 0
    for stop in edges:
        yield order[start:stop]
        start = stop
