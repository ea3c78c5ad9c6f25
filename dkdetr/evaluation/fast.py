"""The precision table of a data set, by `hotcoco` (its one home).

The numbers are those of `lvis` and `pycocotools` to 1e-12, which tests hold on random sets and on
real annotations. Where hotcoco is not what `lvis` is, or asks for more, it is done here:
the cut to the best 300 detections of an image before all else, what has no area, crowds, and ids.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from dkdetr.data.annotations import ImageInfo
from dkdetr.data.split_sources import Protocol
from dkdetr.errors import DataError
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.mask_column import MaskColumn
from dkdetr.evaluation.protocols import (
    MAX_DETECTIONS_PER_CLASS,
    MAX_DETECTIONS_PER_IMAGE,
    IouType,
)
from dkdetr.evaluation.results import Results
from dkdetr.progress import progress

_IMAGES_AT_ONCE = 200
_LONG_SCORING = 500_000


def fast_evaluator_name(protocol: Protocol) -> str:
    """Returns what computes a protocol's numbers and its version, as reports print it."""
    if protocol != "voc":
        return f"hotcoco {version('hotcoco')}"
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

    Raises:
        DataError: masks are asked for, and a side has none or of another size than its image.
    """
    import hotcoco

    is_lvis = truth.protocol == "lvis"
    if is_lvis:
        results = keep_best_per_image(results, MAX_DETECTIONS_PER_IMAGE)
    results = results.take(is_known(truth, results))
    if iou_type == "segm":
        _check_masks(truth, results)
    rows = np.argsort(results.image_ids, kind="stable")
    boxes = np.argsort(truth.image_ids, kind="stable")
    if is_lvis:
        # The official tool loads nothing without area; a mask without has a frame without.
        rows = rows[results.boxes_xywh[rows, 2:].prod(axis=1) > 0]
        boxes = boxes[truth.areas[boxes] > 0]
    found, wanted = results.image_ids[rows], truth.image_ids[boxes]
    problem = _Problem(truth, results, iou_type)
    params = hotcoco.Params(iou_type)
    params.max_dets = [MAX_DETECTIONS_PER_IMAGE if is_lvis else MAX_DETECTIONS_PER_CLASS]
    categories = [{"id": place, "name": str(place)} for place in range(len(truth.categories))]
    evaluation = hotcoco.StreamingEval(categories, iou_type, lvis_style=is_lvis, params=params)
    images = sorted(truth.images, key=lambda image: image.image_id)
    with progress("scoring images", len(images), quiet=len(results) < _LONG_SCORING) as advance:
        # Images do not influence each other's matches; some at a time bound the memory.
        for first in range(0, len(images), _IMAGES_AT_ONCE):
            block = images[first : first + _IMAGES_AT_ONCE]
            evaluation.update(
                [problem.image(image, first + place) for place, image in enumerate(block)],
                problem.objects(boxes[_of_images(wanted, block)]),
                **problem.detections(rows[_of_images(found, block)]),
            )
            advance(first + len(block), "")
    done = evaluation.finalize()
    done.accumulate()
    assert done.eval is not None
    return done.eval["precision"][..., 0]


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


class _Problem:
    """Images, objects and detections as hotcoco takes them.

    It takes no negative ids, and reads those in an array as floating-point numbers. So its ids are
    places: of an image in the order of the ids, of a category in the split.
    """

    def __init__(self, truth: GroundTruth, results: Results, iou_type: IouType) -> None:
        self._truth = truth
        self._results = results
        self._with_masks = iou_type == "segm"
        self._image_ids = np.sort([image.image_id for image in truth.images])
        category_ids = [category.category_id for category in truth.categories]
        self._places = {category_id: place for place, category_id in enumerate(category_ids)}
        self._order = np.argsort(category_ids)
        self._category_ids = np.array(category_ids)[self._order]

    def image(self, image: ImageInfo, place: int) -> dict[str, Any]:
        """Returns an image and what LVIS's annotators say of it."""
        return {
            "id": place,
            "height": image.height,
            "width": image.width,
            "neg_category_ids": self._known(image.neg_category_ids),
            "not_exhaustive_category_ids": self._known(image.not_exhaustive_category_ids),
        }

    def objects(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Returns what should have been found."""
        truth = self._truth
        # LVIS has no crowds: its tool never looks at the flag.
        is_crowd = truth.is_crowd[rows] & (truth.protocol != "lvis")
        columns = {
            "id": range(1, len(rows) + 1),
            "image_id": self._images(truth.image_ids[rows]).tolist(),
            "category_id": self._categories(truth.category_ids[rows]).tolist(),
            "bbox": truth.boxes_xywh[rows].tolist(),
            "area": truth.areas[rows].tolist(),
            "iscrowd": is_crowd.astype(int).tolist(),
        }
        return _records(columns | self._segmentations(truth.masks, rows))

    def detections(self, rows: np.ndarray) -> dict[str, Any]:
        """Returns detections, as arguments of `hotcoco.StreamingEval.update`."""
        results = self._results
        images = self._images(results.image_ids[rows])
        categories = self._categories(results.category_ids[rows])
        masks = self._segmentations(results.masks, rows)
        if results.has_boxes:
            columns = (images, results.boxes_xywh[rows], results.scores[rows], categories)
            return {"dt_anns": np.column_stack(columns), **masks}
        # Where there is a box, its area decides the size.
        columns = {
            "image_id": images.tolist(),
            "category_id": categories.tolist(),
            "score": results.scores[rows].tolist(),
        }
        return {"dt_anns": _records(columns | masks)}

    def _segmentations(self, masks: MaskColumn | None, rows: np.ndarray) -> dict[str, Any]:
        if not self._with_masks:
            return {}
        assert masks is not None
        return {"segmentation": masks.objects(rows)}

    def _known(self, category_ids: tuple[int, ...]) -> list[int]:
        return [self._places[each] for each in category_ids if each in self._places]

    def _images(self, image_ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._image_ids, image_ids)

    def _categories(self, category_ids: np.ndarray) -> np.ndarray:
        return self._order[np.searchsorted(self._category_ids, category_ids)]


def _of_images(image_ids: np.ndarray, images: Sequence[ImageInfo]) -> slice:
    """Returns where the ids of consecutive images lie; all ascend."""
    start = np.searchsorted(image_ids, images[0].image_id, side="left")
    return slice(start, np.searchsorted(image_ids, images[-1].image_id, side="right"))


def _records(columns: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _check_masks(truth: GroundTruth, results: Results) -> None:
    if truth.masks is None:
        raise DataError(f"the annotations of '{truth.name}' have no segmentations to score against")
    if results.masks is None:
        raise DataError("the results have no segmentations to score")
    image_ids = np.array([image.image_id for image in truth.images], dtype=np.int64)
    sizes = np.array([(image.height, image.width) for image in truth.images]).reshape(-1, 2)
    order = np.argsort(image_ids)
    wanted = sizes[order[np.searchsorted(image_ids[order], results.image_ids)]]
    wrong = np.flatnonzero((results.masks.sizes_hw != wanted).any(axis=1))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{len(wrong)} masks have another size than their image; the first, of image "
            f"{results.image_ids[first]}, is {results.masks.sizes_hw[first].tolist()} (height, "
            f"width), its image {wanted[first].tolist()}: they would lie elsewhere"
        )
