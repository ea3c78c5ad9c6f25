"""Our numbers are those of the `lvis` and `pycocotools` packages, to 1e-12."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dkdetr.data.annotations import Category
from dkdetr.data.splits import load_split
from dkdetr.errors import DataError
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.ground_truth import GroundTruth, ground_truth_of
from dkdetr.evaluation.official import import_lvis, numpy_float_alias
from dkdetr.evaluation.protocols import metric_keys
from dkdetr.evaluation.results import Results, ResultsWriter, read_results
from tests.contracts.evaluation_problems import masked, random_detections, random_problem

REAL_LVIS = "DKDETR_TEST_LVIS"
REAL_COCO = "DKDETR_TEST_COCO"


def assert_same(ours, theirs):
    assert list(ours.values) == list(theirs.values)
    assert [key.removeprefix("segm.") for key in ours.values] == list(metric_keys(ours.protocol))
    for key, value in ours.values.items():
        assert value == pytest.approx(theirs.values[key], rel=0, abs=1e-12, nan_ok=True), key
    for mine, other in zip(ours.per_category, theirs.per_category, strict=True):
        assert mine.ap == pytest.approx(other.ap, rel=0, abs=1e-12, nan_ok=True), mine.name
        assert mine.ap50 == pytest.approx(other.ap50, rel=0, abs=1e-12, nan_ok=True), mine.name


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


@pytest.mark.parametrize("protocol", ["lvis", "coco", "ovcoco"])
@pytest.mark.parametrize("seed", range(4))
def test_masks_of_random_sets(protocol, seed):
    crowded = seed == 2
    truth, results = random_problem(
        protocol,
        seed,
        num_images=4 if crowded else 12,
        num_categories=2 if crowded else 9,
        detections_per_image=(280, 420) if crowded else (0, 40),
    )
    of_boxes = score(truth, results).values["AP"]
    truth, results = masked(truth, results)
    ours = score(truth, results)
    assert_same(ours, score(truth, results, evaluator="official"))
    assert all(key.startswith("segm.") for key in ours.values)
    assert 0.01 < ours.values["segm.AP"] != of_boxes


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


def test_many_categories_are_scored_in_blocks():
    truth, results = random_problem("lvis", 5, num_categories=130, detections_per_image=(20, 60))
    assert_same(score(truth, results), score(truth, results, evaluator="official"))


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


@pytest.mark.parametrize("protocol", ["lvis", "coco"])
def test_a_file_of_masks_as_the_official_packages_load_it(protocol, tmp_path, capsys):
    """Each package reads annotations and our results file itself, and finds our numbers."""
    truth, results = masked(*random_problem(protocol, 3, num_images=8))
    path, annotations = tmp_path / "results_segm.json", tmp_path / "annotations.json"
    with ResultsWriter(path) as writer:
        for image in truth.images:
            own = results.take(results.image_ids == image.image_id)
            masks = own.masks.tolist()
            writer.write_masks(image.image_id, masks, own.scores, own.category_ids)
    assert "bbox" not in json.loads(path.read_text())[0]
    document = {
        "images": [
            {"id": i.image_id, "height": i.height, "width": i.width,
             "neg_category_ids": i.neg_category_ids,
             "not_exhaustive_category_ids": i.not_exhaustive_category_ids}
            for i in truth.images
        ],
        "categories": [
            {"id": c.category_id, "name": c.name, "frequency": c.frequency}
            for c in truth.categories
        ],
        "annotations": [
            {"id": n + 1, "image_id": int(truth.image_ids[n]), "iscrowd": int(truth.is_crowd[n]),
             "category_id": int(truth.category_ids[n]), "area": float(truth.areas[n]),
             "bbox": truth.boxes_xywh[n].tolist(), "segmentation": truth.masks[n]}
            for n in range(len(truth.areas))
        ],
    }  # fmt: skip
    annotations.write_text(json.dumps(document))
    ours = score(truth, read_results(path))
    if protocol == "lvis":
        lvis = import_lvis()
        ground_truth = lvis.LVIS(str(annotations))
        official = lvis.LVISEval(ground_truth, lvis.LVISResults(ground_truth, str(path)), "segm")
        with numpy_float_alias():
            official.run()
        stats = [official.results[key] for key in metric_keys("lvis")]
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        ground_truth = COCO(str(annotations))
        official = COCOeval(ground_truth, ground_truth.loadRes(str(path)), "segm")
        official.evaluate()
        official.accumulate()
        official.summarize()
        stats = official.stats[:6].tolist()
    capsys.readouterr()
    stats = [math.nan if value == -1 else value for value in stats]
    assert list(ours.values.values()) == pytest.approx(stats, abs=1e-12, nan_ok=True)


@pytest.mark.skipif(REAL_LVIS not in os.environ, reason=f"{REAL_LVIS} names no annotation file")
def test_real_lvis_annotations_read_by_the_official_tool(tmp_path):
    path = Path(os.environ[REAL_LVIS])
    truth = ground_truth_of(load_split(f"lvis:{tmp_path}:{path}", tmp_path))
    results = random_detections(truth, np.random.default_rng(0), (0, 80))
    ours = score(truth, results)
    detections = tmp_path / "results.json"
    detections.write_text(json.dumps(_records(results)))
    lvis = import_lvis()
    ground_truth = lvis.LVIS(str(path))
    found = lvis.LVISResults(ground_truth, str(detections))
    official = lvis.LVISEval(ground_truth, found, "bbox")
    with numpy_float_alias():
        official.run()
    for key, value in ours.values.items():
        theirs = official.results[key]
        assert value == pytest.approx(math.nan if theirs == -1 else theirs, abs=1e-12, nan_ok=True)
    assert ours.values["AP"] > 0.05


@pytest.mark.skipif(REAL_COCO not in os.environ, reason=f"{REAL_COCO} names no COCO folder")
def test_real_coco_annotations_read_by_the_official_tool(tmp_path, capsys):
    path = Path(os.environ[REAL_COCO]) / "annotations" / "instances_val2017.json"
    truth = ground_truth_of(load_split(f"coco:{tmp_path}:{path}", tmp_path))
    results = random_detections(truth, np.random.default_rng(0), (0, 120))
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ground_truth = COCO(str(path))
    official = COCOeval(ground_truth, ground_truth.loadRes(_records(results)), "bbox")
    official.evaluate()
    official.accumulate()
    official.summarize()
    capsys.readouterr()
    ours = score(truth, results)
    assert list(ours.values.values()) == pytest.approx(official.stats[:6].tolist(), abs=1e-12)
    assert_same(ours, score(truth, results, evaluator="official"))


def _records(results: Results):
    return [
        {"image_id": int(i), "category_id": int(c), "bbox": b, "score": s}
        for i, c, b, s in zip(
            results.image_ids,
            results.category_ids,
            results.boxes_xywh.tolist(),
            results.scores.tolist(),
            strict=True,
        )
    ]
