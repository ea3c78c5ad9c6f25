"""The official packages themselves, `lvis` and `pycocotools` (their one home).

Imported only when asked for. `lvis` 0.5.3, the last release, needs two shims, both here: it uses
`np.float`, which NumPy took out in 1.24, and its drawing part imports OpenCV, whose windows want
libraries (libGL) that a server does not have.
"""

import contextlib
import importlib
import io
import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import orjson

from dkdetr.data.split_sources import Protocol
from dkdetr.errors import DataError
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.mask_column import MaskColumn
from dkdetr.evaluation.protocols import GROUP_KEYS, OVERALL_KEYS, IouType
from dkdetr.evaluation.results import Results


def official_evaluator_name(protocol: Protocol) -> str:
    """Returns the package that defines a protocol, and its version."""
    package = "lvis" if protocol == "lvis" else "pycocotools"
    return f"{package} {version(package)}"


def official_scores(
    truth: GroundTruth, results: Results, iou_type: IouType = "bbox"
) -> tuple[np.ndarray, dict[str, float]]:
    """Returns the precision table (as `fast.precision_table`) and the package's own summary.

    The summary holds the keys that the package itself prints; what it does not know (novel and
    base of OV-COCO) is averaged from the table.

    Raises:
        DataError: no detections at all, or an LVIS category without frequency: the official
            packages cannot read these.
    """
    if not len(results):
        raise DataError("the official packages cannot read results without a detection")
    if truth.protocol == "lvis":
        return _lvis_scores(truth, results, iou_type)
    return _coco_scores(truth, results, iou_type)


@contextlib.contextmanager
def numpy_float_alias() -> Iterator[None]:
    """Gives NumPy its old alias `np.float` for as long as `lvis` 0.5.3 runs."""
    present = hasattr(np, "float")
    if not present:
        np.float = float  # noqa: NPY001  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        if not present:
            del np.float  # noqa: NPY001  # pyright: ignore[reportAttributeAccessIssue]


def import_lvis() -> ModuleType:
    """Returns the package `lvis` without its drawing part, leaving logging as it was.

    Its import also gives the root logger a handler, which is for programs to decide.
    """
    drawing, root = "lvis.vis", logging.getLogger()
    handlers, level = list(root.handlers), root.level
    placed = drawing not in sys.modules
    if placed:
        stand_in = ModuleType(drawing)
        stand_in.LVISVis = None  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules[drawing] = stand_in
    try:
        return importlib.import_module("lvis")
    finally:
        if placed:
            del sys.modules[drawing]
        root.handlers[:] = handlers
        root.setLevel(level)


def _lvis_scores(
    truth: GroundTruth, results: Results, iou_type: IouType
) -> tuple[np.ndarray, dict[str, float]]:
    nameless = [c.category_id for c in truth.categories if c.frequency not in ("r", "c", "f")]
    if nameless:
        raise DataError(
            f"the official LVIS tool needs the frequency (r, c or f) of every category; missing "
            f"for {len(nameless)} of them, first {nameless[:20]}. `--evaluator fast` does without"
        )
    lvis = import_lvis()
    with _files_of(truth, results) as (annotations, detections):
        ground_truth = lvis.LVIS(annotations)
        found = lvis.LVISResults(ground_truth, detections)
        evaluation = lvis.LVISEval(ground_truth, found, iou_type)
    with numpy_float_alias():
        evaluation.run()
    keys = (*OVERALL_KEYS, *GROUP_KEYS["lvis"])
    own = {key: _or_nan(evaluation.results[key]) for key in keys}
    return _in_our_order(truth, evaluation.eval["precision"]), own


def _coco_scores(
    truth: GroundTruth, results: Results, iou_type: IouType
) -> tuple[np.ndarray, dict[str, float]]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with _files_of(truth, results) as (annotations, detections), _no_printing():
        ground_truth = COCO(annotations)
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(detections), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    own = {key: _or_nan(value) for key, value in zip(OVERALL_KEYS, evaluation.stats, strict=False)}
    return _in_our_order(truth, evaluation.eval["precision"][..., -1]), own


def _no_printing() -> contextlib.AbstractContextManager[Any]:
    # pycocotools prints as it goes; its numbers are all that is wanted.
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def _files_of(truth: GroundTruth, results: Results) -> Iterator[tuple[str, str]]:
    """Yields the paths of an annotation file and a results file for the packages to read."""
    with tempfile.TemporaryDirectory() as folder:
        annotations, detections = Path(folder) / "annotations.json", Path(folder) / "results.json"
        annotations.write_bytes(orjson.dumps(_annotation_file(truth)))
        detections.write_bytes(orjson.dumps(_result_file(results)))
        yield str(annotations), str(detections)


def _in_our_order(truth: GroundTruth, precision: np.ndarray) -> np.ndarray:
    """Returns the table with categories as the split has them; the packages sort them by id."""
    ranks = np.argsort(np.argsort([category.category_id for category in truth.categories]))
    return precision[:, :, ranks, :]


def _or_nan(value: float) -> float:
    return math.nan if value == -1 else float(value)


def _annotation_file(truth: GroundTruth) -> dict[str, Any]:
    return {
        "images": [
            {
                "id": image.image_id,
                "height": image.height,
                "width": image.width,
                "neg_category_ids": list(image.neg_category_ids),
                "not_exhaustive_category_ids": list(image.not_exhaustive_category_ids),
            }
            for image in truth.images
        ],
        "categories": [
            {"id": category.category_id, "name": category.name, "frequency": category.frequency}
            for category in truth.categories
        ],
        "annotations": [
            {
                "id": index + 1,
                "image_id": int(truth.image_ids[index]),
                "category_id": int(truth.category_ids[index]),
                "bbox": truth.boxes_xywh[index].tolist(),
                "area": float(truth.areas[index]),
                "iscrowd": int(truth.is_crowd[index]),
                **_segmentation(truth.masks, index),
            }
            for index in range(len(truth.image_ids))
        ],
    }


def _result_file(results: Results) -> list[dict[str, Any]]:
    return [
        {
            "image_id": int(results.image_ids[index]),
            "category_id": int(results.category_ids[index]),
            **({"bbox": results.boxes_xywh[index].tolist()} if results.has_boxes else {}),
            "score": float(results.scores[index]),
            **_segmentation(results.masks, index),
        }
        for index in range(len(results))
    ]


def _segmentation(masks: MaskColumn | None, index: int) -> dict[str, Any]:
    if masks is None:
        return {}
    (mask,) = masks.objects(np.array([index]))
    return {"segmentation": mask | {"counts": mask["counts"].decode("ascii")}}
