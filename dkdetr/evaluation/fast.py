"""The precision table of a data set, by our own vectorised matcher.

The numbers are those of `lvis` and `pycocotools` to 1e-12, which tests hold on random sets and on
real annotations. This file does what those tools do before they match: LVIS's cut to the best 300
detections of an image and its federated filter, COCO's best 100 of a class in an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.matching import Cells, match
from dkdetr.evaluation.overlaps import Geometry, IouType, geometry_of
from dkdetr.evaluation.precision import precision_of_categories, rank_detections
from dkdetr.evaluation.protocols import MAX_DETECTIONS_PER_CLASS, MAX_DETECTIONS_PER_IMAGE
from dkdetr.evaluation.results import Results
from dkdetr.progress import progress

_DETECTIONS_AT_ONCE = 500_000
_LONG_SCORING = 500_000


def fast_evaluator_name() -> str:
    """Returns what computes the numbers and its version, as reports print it."""
    try:
        return f"dkdetr {version('dkdetr')}"
    except PackageNotFoundError:  # a checkout that was never installed
        return "dkdetr"


def precision_table(
    truth: GroundTruth, results: Results, *, iou_type: IouType = "bbox"
) -> np.ndarray:
    """Returns precision f64[10 IoUs, 101 recalls, categories, 4 sizes]; -1 without ground truth.

    IoU thresholds are .50 to .95; sizes are all, small, medium, large; categories are in the order
    of `truth.categories`.

    Args:
        truth: what should have been found.
        results: in file order, which breaks ties of score.
        iou_type: `bbox`, or `segm` for masks, which both sides must then have.
    """
    if truth.protocol == "lvis":
        results = keep_best_per_image(results, MAX_DETECTIONS_PER_IMAGE)
    results = results.take(is_known(truth, results))
    geometry = geometry_of(truth, results, iou_type)
    boxes = np.arange(len(truth.image_ids))
    detections = np.arange(len(results))
    if truth.protocol == "lvis":
        # The official tool asks for areas strictly between 0 and infinity on both sides.
        boxes = boxes[truth.areas > 0]
        detections = detections[geometry.detection_areas > 0]
        detections = detections[_is_judged(truth, boxes, results, detections)]
    problem = _Problem(truth, results, geometry)
    table = np.full((10, 101, len(truth.categories), 4), -1.0)
    keys, box_keys = problem.keys(results), problem.keys(truth)
    detections = detections[np.lexsort((-results.scores[detections], keys[detections]))]
    if truth.protocol != "lvis":
        detections = detections[rank_in_run(keys[detections]) < MAX_DETECTIONS_PER_CLASS]
    boxes = boxes[np.argsort(box_keys[boxes], kind="stable")]
    edges = np.arange(len(truth.categories) + 1) * len(truth.images)
    starts = np.searchsorted(keys[detections], edges)
    box_starts = np.searchsorted(box_keys[boxes], edges)
    is_quick = len(results) < _LONG_SCORING
    with progress("scoring categories", len(truth.categories), quiet=is_quick) as advance:
        # Categories do not influence each other; a block at a time bounds the memory.
        for first, last in _blocks(starts):
            table[:, :, problem.order[first:last], :] = problem.block(
                detections[starts[first] : starts[last]],
                boxes[box_starts[first] : box_starts[last]],
                keys, box_keys, first, last,
            )  # fmt: skip
            advance(last, "")
    return table


def keep_best_per_image(results: Results, limit: int) -> Results:
    """Returns at most `limit` detections an image, the best; equal scores go by file order.

    As the official LVIS tool cuts: over all categories together, before anything else is asked.
    """
    order = np.lexsort((-results.scores, results.image_ids))
    kept = order[rank_in_run(results.image_ids[order]) < limit]
    return results if len(kept) == len(results) else results.take(np.sort(kept))


def rank_in_run(values: np.ndarray) -> np.ndarray:
    """Returns the place of each value in its run of equals; values ascend."""
    return np.arange(len(values)) - np.searchsorted(values, values, side="left")


def is_known(truth: GroundTruth, results: Results) -> np.ndarray:
    """Returns which detections are of the split's categories."""
    known = [category.category_id for category in truth.categories]
    return np.isin(results.category_ids, known)


def _is_judged(
    truth: GroundTruth, boxes: np.ndarray, results: Results, detections: np.ndarray
) -> np.ndarray:
    """Returns which detections say something that the image's annotations can confirm or deny."""
    image_ids = np.array([image.image_id for image in truth.images])
    category_ids = np.array([category.category_id for category in truth.categories])
    images, categories = _Lookup(image_ids), _Lookup(category_ids)
    judged = np.zeros((len(image_ids), len(category_ids)), dtype=bool)
    judged[images(truth.image_ids[boxes]), categories(truth.category_ids[boxes])] = True
    known = set(category_ids.tolist())
    for place, image in enumerate(truth.images):
        absent = [each for each in image.neg_category_ids if each in known]
        judged[place, categories(np.array(absent, dtype=np.int64))] = True
    return judged[
        images(results.image_ids[detections]), categories(results.category_ids[detections])
    ]


def _blocks(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (first, last) of runs of categories that have about as many detections."""
    first, num_categories = 0, len(starts) - 1
    while first < num_categories:
        last = int(np.searchsorted(starts, starts[first] + _DETECTIONS_AT_ONCE, side="right")) - 1
        last = min(max(last, first + 1), num_categories)
        yield first, last
        first = last


class _Lookup:
    """Gives values of a set their places in it as it was given."""

    def __init__(self, values: np.ndarray) -> None:
        self._order = np.argsort(values, kind="stable")
        self._sorted = values[self._order]

    def __call__(self, wanted: np.ndarray) -> np.ndarray:
        return self._order[np.searchsorted(self._sorted, wanted)]


@dataclass(frozen=True, eq=False)
class _Problem:
    """Cells are numbered category by category, ids ascending, and in each by ascending image id."""

    truth: GroundTruth
    results: Results
    geometry: Geometry

    @property
    def order(self) -> np.ndarray:
        """The places of the categories in the order of their ids."""
        return np.argsort([category.category_id for category in self.truth.categories])

    def keys(self, columns: GroundTruth | Results) -> np.ndarray:
        """Returns the number of the cell of each detection or box."""
        image_ids = np.sort([image.image_id for image in self.truth.images])
        category_ids = np.sort([each.category_id for each in self.truth.categories])
        images = np.searchsorted(image_ids, columns.image_ids)
        return np.searchsorted(category_ids, columns.category_ids) * len(image_ids) + images

    def block(
        self, detections: np.ndarray, boxes: np.ndarray, keys: np.ndarray, box_keys: np.ndarray,
        first: int, last: int,
    ) -> np.ndarray:  # fmt: skip
        """Returns the table of the categories first to last; rows are sorted by cell."""
        federated = self.truth.protocol == "lvis"
        num_images = len(self.truth.images)
        own_keys = keys[detections]
        cells = Cells(
            detection_keys=own_keys,
            detection_areas=self.geometry.detection_areas[detections],
            can_miss=self._is_exhaustive(own_keys),
            box_keys=box_keys[boxes],
            box_areas=self.truth.areas[boxes],
            # LVIS has no crowds: its tool never looks at the flag.
            is_crowd=self.truth.is_crowd[boxes] & (not federated),
        )

        def overlaps(rows: np.ndarray, box_rows: np.ndarray) -> np.ndarray:
            return self.geometry.overlaps(
                detections[rows], boxes[box_rows], cells.is_crowd[box_rows]
            )

        matches = match(cells, overlaps)
        categories = own_keys // num_images - first
        ranked = rank_detections(categories, self.results.scores[detections], last - first)
        box_categories = cells.box_keys // num_images - first
        return precision_of_categories(cells, matches, ranked, box_categories)

    def _is_exhaustive(self, keys: np.ndarray) -> np.ndarray:
        if self.truth.protocol != "lvis":
            return np.ones(len(keys), dtype=bool)
        return ~np.isin(keys, self._unsure_cells())

    def _unsure_cells(self) -> np.ndarray:
        category_ids = np.sort([each.category_id for each in self.truth.categories])
        places = {category_id: place for place, category_id in enumerate(category_ids.tolist())}
        images = sorted(self.truth.images, key=lambda image: image.image_id)
        unsure = [
            places[category_id] * len(images) + place
            for place, image in enumerate(images)
            for category_id in image.not_exhaustive_category_ids
            if category_id in places
        ]
        return np.array(unsure, dtype=np.int64)
