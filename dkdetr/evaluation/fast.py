"""The precision table of a data set, from faster-coco-eval (this is its one home).

The numbers are those of `lvis` and `pycocotools` to 1e-12, which tests hold on random sets. What
faster-coco-eval leaves to its caller is done here: the cut to the best 300 detections of an image,
the federated filter, boxes without area, and the absence of crowds in LVIS.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.protocols import MAX_DETECTIONS_PER_CLASS, MAX_DETECTIONS_PER_IMAGE
from dkdetr.evaluation.results import Results

_CATEGORIES_AT_ONCE = 100


def fast_evaluator_name() -> str:
    """Returns the library and its version, as reports print it."""
    return f"faster-coco-eval {version('faster-coco-eval')}"


def precision_table(truth: GroundTruth, results: Results) -> np.ndarray:
    """Returns precision f64[10 IoUs, 101 recalls, categories, 4 sizes]; -1 without ground truth.

    IoU thresholds are .50 to .95, of masks where the results hold masks; sizes are all, small,
    medium, large; categories are in the order of `truth.categories`.
    """
    boxes = np.arange(len(truth.image_ids))
    if truth.protocol == "lvis":
        results = keep_best_per_image(results, MAX_DETECTIONS_PER_IMAGE)
        # The official tool asks for areas strictly between 0 and infinity on both sides.
        boxes = boxes[truth.areas > 0]
        results = results.take(results.areas > 0)
        results = results.take(_is_judged(truth, boxes, results))
    order = np.argsort([category.category_id for category in truth.categories])
    table = np.full((10, 101, len(truth.categories), 4), -1.0)
    for places in _blocks(order):
        # Categories do not influence each other; a block at a time bounds the memory, which
        # grows with images x categories even where both are empty.
        table[:, :, places, :] = _precision_of(truth, boxes, results, places)
    return table


def keep_best_per_image(results: Results, limit: int) -> Results:
    """Returns at most `limit` detections an image, the best; equal scores go by file order.

    As the official LVIS tool cuts: over all categories together, before anything else is asked.
    """
    order = np.lexsort((np.arange(len(results)), -results.scores, results.image_ids))
    sorted_ids = results.image_ids[order]
    ranks = np.arange(len(order)) - np.searchsorted(sorted_ids, sorted_ids, side="left")
    return results.take(np.sort(order[ranks < limit]))


def _is_judged(truth: GroundTruth, boxes: np.ndarray, results: Results) -> np.ndarray:
    """Returns which detections say something that the image's annotations can confirm or deny."""
    judged = set(
        zip(truth.image_ids[boxes].tolist(), truth.category_ids[boxes].tolist(), strict=True)
    )
    for image in truth.images:
        judged.update((image.image_id, category_id) for category_id in image.neg_category_ids)
    pairs = zip(results.image_ids.tolist(), results.category_ids.tolist(), strict=True)
    return np.fromiter((pair in judged for pair in pairs), dtype=bool, count=len(results))


def _blocks(order: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(order), _CATEGORIES_AT_ONCE):
        yield order[start : start + _CATEGORIES_AT_ONCE]


def _precision_of(
    truth: GroundTruth, boxes: np.ndarray, results: Results, places: np.ndarray
) -> np.ndarray:
    """Returns the table's part for the categories at `places`, which ascend by category id."""
    federated = truth.protocol == "lvis"
    category_ids = [truth.categories[place].category_id for place in places]
    boxes = boxes[np.isin(truth.category_ids[boxes], category_ids)]
    results = results.take(np.isin(results.category_ids, category_ids))
    present = set(truth.image_ids[boxes].tolist()) | set(results.image_ids.tolist())
    head = {
        "images": [
            {
                "id": image.image_id,
                "height": image.height,
                "width": image.width,
                "neg_category_ids": image.neg_category_ids,
                "not_exhaustive_category_ids": image.not_exhaustive_category_ids,
            }
            for image in truth.images
            if image.image_id in present
        ],
        # Groups are averaged by our own code; the library only wants the key to be there.
        "categories": [{"id": category_id, "frequency": "f"} for category_id in category_ids],
    }
    ground_truth = COCO({**head, "annotations": _truth_records(truth, boxes, federated)})
    detections = COCO({**head, "annotations": _result_records(results)})
    kind = "bbox" if results.masks is None else "segm"
    evaluation = COCOeval_faster(ground_truth, detections, kind, lvis_style=federated)
    limit = MAX_DETECTIONS_PER_IMAGE if federated else MAX_DETECTIONS_PER_CLASS
    evaluation.params.maxDets = [limit]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[..., 0]


def _truth_records(truth: GroundTruth, boxes: np.ndarray, federated: bool) -> list[dict[str, Any]]:
    columns = zip(
        truth.image_ids[boxes].tolist(),
        truth.category_ids[boxes].tolist(),
        truth.boxes_xywh[boxes].tolist(),
        truth.areas[boxes].tolist(),
        truth.is_crowd[boxes].tolist(),
        strict=True,
    )
    records: list[dict[str, Any]] = [
        {
            "id": number,  # from 1: the library reads a match with 0 as no match
            "image_id": image_id,
            "category_id": category_id,
            "bbox": bbox,
            "area": area,
            # LVIS has no crowds: its tool never looks at the flag.
            "iscrowd": 0 if federated else int(is_crowd),
        }
        for number, (image_id, category_id, bbox, area, is_crowd) in enumerate(columns, start=1)
    ]
    return _with_masks(records, None if truth.masks is None else truth.masks[boxes])


def _result_records(results: Results) -> list[dict[str, Any]]:
    columns = zip(
        results.image_ids.tolist(),
        results.category_ids.tolist(),
        results.boxes_xywh.tolist(),
        results.scores.tolist(),
        results.areas.tolist(),
        strict=True,
    )
    records: list[dict[str, Any]] = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": bbox,
            "area": area,
            "iscrowd": 0,
            "score": score,
        }
        for number, (image_id, category_id, bbox, score, area) in enumerate(columns, start=1)
    ]
    return _with_masks(records, results.masks)


def _with_masks(records: list[dict[str, Any]], masks: np.ndarray | None) -> list[dict[str, Any]]:
    if masks is not None:
        for record, mask in zip(records, masks, strict=True):
            record["segmentation"] = dict(mask)
    return records
