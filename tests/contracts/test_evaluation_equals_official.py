"""Our numbers are those of the `lvis` and `pycocotools` packages, to 1e-12."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dkdetr.data.annotations import Category
from dkdetr.data.splits import load_split
from dkdetr.errors import DataError
from dkdetr.evaluation import fast
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.ground_truth import GroundTruth, ground_truth_of
from dkdetr.evaluation.mask_column import encode_segmentation, join_masks, mask_boxes
from dkdetr.evaluation.official import import_lvis, numpy_float_alias
from dkdetr.evaluation.protocols import GROUP_KEYS, OVERALL_KEYS
from dkdetr.evaluation.results import Results
from tests.contracts.evaluation_problems import random_detections, random_problem, with_masks

REAL_LVIS = "DKDETR_TEST_LVIS"
REAL_COCO = "DKDETR_TEST_COCO"


def assert_same(ours, theirs):
    assert list(ours.values) == list(theirs.values)
    for key, value in ours.values.items():
        assert value == pytest.approx(theirs.values[key], rel=0, abs=1e-12, nan_ok=True), key
    for mine, other in zip(ours.per_category, theirs.per_category, strict=True):
        assert mine.ap == pytest.approx(other.ap, rel=0, abs=1e-12, nan_ok=True), mine.name
        assert mine.ap50 == pytest.approx(other.ap50, rel=0, abs=1e-12, nan_ok=True), mine.name
        assert mine.segm_ap == pytest.approx(other.segm_ap, rel=0, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("protocol", ["lvis", "coco", "ovcoco"])
@pytest.mark.parametrize("seed", range(12))
def test_random_sets_with_ties_crowds_and_federated_lists(protocol, seed):
    # Every third has more detections than any limit: 300 an image, 100 a class.
    crowded = seed % 3 == 2
    truth, results = random_problem(
        protocol,
        seed,
        num_images=4 if crowded else 20,
        num_categories=2 if crowded else 9,
        detections_per_image=(280, 420) if crowded else (0, 50),
    )
    assert_same(score(truth, results), score(truth, results, evaluator="official"))


@pytest.mark.parametrize("protocol", ["lvis", "coco"])
@pytest.mark.parametrize("seed", range(10))
def test_masks_of_random_sets(protocol, seed):
    crowded = seed % 5 == 4
    truth, results = random_problem(
        protocol,
        seed,
        num_images=3 if crowded else 12,
        num_categories=2 if crowded else 6,
        detections_per_image=(280, 340) if crowded else (0, 40),
    )
    truth, results = with_masks(truth, results, keep_boxes=seed % 2 == 1)
    ours = score(truth, results)
    keys = (*OVERALL_KEYS, *GROUP_KEYS[protocol])
    masks = [f"segm.{key}" for key in keys]
    assert list(ours.values) == [*(keys if results.has_boxes else ()), *masks]
    assert ours.values["segm.AP"] not in (0, 1)
    assert_same(ours, score(truth, results, evaluator="official"))


def test_the_random_sets_hold_what_they_promise():
    truth, results = random_problem("lvis", 0)
    assert truth.is_crowd.any()
    assert (truth.areas == 0).any()
    assert (results.boxes_xywh[:, 3] == 0).any()
    assert len(np.unique(results.scores)) < len(results) / 5
    assert set(truth.image_ids) < {image.image_id for image in truth.images}
    assert any(image.not_exhaustive_category_ids for image in truth.images)
    assert any(image.neg_category_ids for image in truth.images)
    _, many = random_problem(
        "lvis", 2, num_images=4, num_categories=2, detections_per_image=(280, 420)
    )
    assert max(np.bincount(many.image_ids)) > 300


def test_images_are_scored_some_at_a_time(monkeypatch):
    monkeypatch.setattr(fast, "_IMAGES_AT_ONCE", 7)
    truth, results = random_problem("lvis", 5, num_categories=130, detections_per_image=(20, 60))
    assert_same(score(truth, results), score(truth, results, evaluator="official"))


@pytest.mark.parametrize("by", [-105, 2**60])
def test_ids_may_be_any_whole_numbers(by):
    # Some below zero, or neighbours that are one float64: hotcoco takes neither as they are.
    def moved(ids):
        return tuple(each + by for each in ids)

    truth, results = random_problem("lvis", 0)
    images = tuple(
        replace(
            image,
            image_id=image.image_id + by,
            neg_category_ids=moved(image.neg_category_ids),
            not_exhaustive_category_ids=moved(image.not_exhaustive_category_ids),
        )
        for image in truth.images
    )
    categories = tuple(replace(c, category_id=c.category_id + by) for c in truth.categories)
    others = replace(truth, **_ids_moved(truth, by), images=images, categories=categories)
    assert_same(score(others, replace(results, **_ids_moved(results, by))), score(truth, results))


def _ids_moved(columns, by):
    return {"image_ids": columns.image_ids + by, "category_ids": columns.category_ids + by}


def test_official_refuses_what_it_cannot_read():
    truth, results = random_problem("lvis", 1)
    with pytest.raises(DataError, match="without a detection"):
        score(truth, results.take(np.zeros(0, dtype=int)), evaluator="official")
    nameless = tuple(Category(c.category_id, c.name, "", True) for c in truth.categories)
    without = GroundTruth(**{**vars(truth), "categories": nameless})
    with pytest.raises(DataError, match="frequency"):
        score(without, results, evaluator="official")
    assert math.isnan(score(without, results).values["APr"])


def test_the_numpy_alias_leaves_no_trace():
    with numpy_float_alias():
        assert np.float is float  # noqa: NPY001
    assert not hasattr(np, "float")


def test_the_lvis_package_serves_where_opencv_cannot_load():
    program = """
import logging, sys
sys.modules["cv2"] = None  # as where libGL is missing: importing it fails
sys.modules["matplotlib"] = None
from dkdetr.evaluation.detection_metrics import score
from tests.contracts.evaluation_problems import random_problem
print(score(*random_problem("lvis", 0, num_images=3), evaluator="official").evaluator)
assert not logging.getLogger().handlers
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("lvis "), done.stderr


@pytest.mark.skipif(REAL_LVIS not in os.environ, reason=f"{REAL_LVIS} names no annotation file")
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_real_lvis_annotations_read_by_the_official_tool(iou_type, tmp_path):
    path = Path(os.environ[REAL_LVIS])
    split = load_split(f"lvis:{tmp_path}:{path}", tmp_path)
    truth = ground_truth_of(split, with_masks=iou_type == "segm")
    results = _real_detections(truth, (0, 80))
    ours = score(truth, results)
    detections = tmp_path / "results.json"
    detections.write_text(json.dumps(_records(results)))
    lvis = import_lvis()
    ground_truth = lvis.LVIS(str(path))
    found = lvis.LVISResults(ground_truth, str(detections))
    official = lvis.LVISEval(ground_truth, found, iou_type)
    with numpy_float_alias():
        official.run()
    for key, value in ours.values.items():
        theirs = official.results[key.removeprefix("segm.")]
        assert value == pytest.approx(math.nan if theirs == -1 else theirs, abs=1e-12, nan_ok=True)
    assert len(ours.values) == 9
    assert next(iter(ours.values.values())) > 0.05
    assert_same(ours, score(truth, results, evaluator="official"))


@pytest.mark.skipif(REAL_COCO not in os.environ, reason=f"{REAL_COCO} names no COCO folder")
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_real_coco_annotations_read_by_the_official_tool(iou_type, tmp_path, capsys):
    path = Path(os.environ[REAL_COCO]) / "annotations" / "instances_val2017.json"
    split = load_split(f"coco:{tmp_path}:{path}", tmp_path)
    truth = ground_truth_of(split, with_masks=iou_type == "segm")
    results = _real_detections(truth, (0, 120))
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ground_truth = COCO(str(path))
    official = COCOeval(ground_truth, ground_truth.loadRes(_records(results)), iou_type)
    official.evaluate()
    official.accumulate()
    official.summarize()
    capsys.readouterr()
    ours = score(truth, results)
    assert list(ours.values.values()) == pytest.approx(official.stats[:6].tolist(), abs=1e-12)
    assert_same(ours, score(truth, results, evaluator="official"))


def _real_detections(truth, per_image):
    """Returns random boxes or, if the truth has masks, its own and boxes' outlines as masks."""
    results = random_detections(truth, np.random.default_rng(0), per_image)
    if truth.masks is None:
        return results
    size_of = {image.image_id: (image.height, image.width) for image in truth.images}
    rng, counts, sizes = np.random.default_rng(1), [], []
    for image_id, box in zip(results.image_ids.tolist(), results.boxes_xywh, strict=True):
        own = truth.of_image(image_id)
        if len(own) and rng.random() < 0.5:
            (mask,) = truth.masks.objects(rng.choice(own, 1))
            counts.append(mask["counts"])
        else:
            x, y, w, h = box.tolist()
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            counts.append(encode_segmentation([corners], *size_of[image_id]))
        sizes.append(size_of[image_id])
    masks = join_masks(counts, np.array(sizes))
    return replace(results, masks=masks, boxes_xywh=mask_boxes(masks), has_boxes=False)


def _records(results: Results):
    shapes = [{"bbox": box} for box in results.boxes_xywh.tolist()]
    if results.masks is not None:
        objects = results.masks.objects(np.arange(len(results)))
        shapes = [{"segmentation": each | {"counts": each["counts"].decode()}} for each in objects]
    return [
        {"image_id": int(i), "category_id": int(c), "score": s, **shape}
        for i, c, s, shape in zip(
            results.image_ids,
            results.category_ids,
            results.scores.tolist(),
            shapes,
            strict=True,
        )
    ]
