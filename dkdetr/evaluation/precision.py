"""Precision at 101 recalls from matches, with the arithmetic of the official tools.

Their curves run over all detections, but precision only rises, and recall only moves, where a
detection is right: so only those places are computed, and the numbers stay the same, every bit.
"""

from dataclasses import dataclass

import numpy as np

from dkdetr.evaluation.matching import IOU_THRESHOLDS, NUM_SIZES, Cells, Matches, outside_sizes

RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, eq=False)
class RankedDetections:
    """The rows of `Cells` by category: those of `category` lie in ranks[edges[c]:edges[c + 1]].

    `rank_of` gives each row its place among its category's detections, best score first, equal
    scores by image id and then file order.
    """

    edges: np.ndarray
    rank_of: np.ndarray
    by_rank: np.ndarray


def rank_detections(
    categories: np.ndarray, scores: np.ndarray, num_categories: int
) -> RankedDetections:
    """Returns the order in which precision is counted; rows are sorted by cell already.

    Args:
        categories: i64[n] ascending, from 0.
        scores: f64[n].
        num_categories: how many there are.
    """
    by_rank = np.lexsort((-scores, categories))
    edges = np.searchsorted(categories, np.arange(num_categories + 1))
    rank_of = np.empty(len(by_rank), dtype=np.int64)
    rank_of[by_rank] = np.arange(len(by_rank)) - edges[categories]
    return RankedDetections(edges, rank_of, by_rank)


def precision_of_categories(
    cells: Cells,
    matches: Matches,
    ranked: RankedDetections,
    box_categories: np.ndarray,
) -> np.ndarray:
    """Returns f64[10 IoUs, 101 recalls, categories, 4 sizes]; -1 where there is nothing to find."""
    num_categories = len(ranked.edges) - 1
    counted = ~(outside_sizes(cells.box_areas) | cells.is_crowd[:, None])
    num_boxes = np.stack(
        [np.bincount(box_categories[counted[:, s]], minlength=num_categories)
         for s in range(NUM_SIZES)]
    )  # fmt: skip
    wrong = ~outside_sizes(cells.detection_areas) & cells.can_miss[:, None]
    # Matched rows in the order of (category, rank), so that a category's are one slice.
    category_of = np.searchsorted(ranked.edges, matches.detections, side="right") - 1
    order = np.lexsort((ranked.rank_of[matches.detections], category_of))
    edges = np.searchsorted(category_of[order], np.arange(num_categories + 1))
    table = np.full((len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), num_categories, NUM_SIZES), -1.0)
    for category in np.flatnonzero(num_boxes.any(axis=0)).tolist():
        rows = ranked.by_rank[ranked.edges[category] : ranked.edges[category + 1]]
        mine = order[edges[category] : edges[category + 1]]
        places = ranked.rank_of[matches.detections[mine]]
        if_unmatched = np.cumsum(wrong[rows], axis=0)[places]
        matched = matches.is_matched[mine]
        # Those that found something are no false alarms after all.
        saved = np.cumsum(matched & wrong[rows][places][:, :, None], axis=0)
        false = if_unmatched[:, :, None] - saved
        right = matches.is_right[mine]
        for size in np.flatnonzero(num_boxes[:, category]).tolist():
            for threshold in range(len(IOU_THRESHOLDS)):
                table[threshold, :, category, size] = _curve(
                    false[right[:, size, threshold], size, threshold],
                    int(num_boxes[size, category]),
                )
    return table


def _curve(num_false: np.ndarray, num_boxes: int) -> np.ndarray:
    """Returns precision at the recalls; `num_false` alarms precede each right detection."""
    num_right = np.arange(1, len(num_false) + 1, dtype=np.float64)
    precision = num_right / (num_false + num_right + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    found = np.searchsorted(num_right / num_boxes, RECALL_THRESHOLDS, side="left")
    return np.append(envelope, 0.0)[found]
