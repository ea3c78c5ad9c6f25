import math

import numpy as np
import pytest

from dkdetr.data.annotations import Category, ImageInfo
from dkdetr.errors import DataError
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.fast import keep_best_per_image
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.results import Results

BOX = (10, 10, 50, 50)
ELSEWHERE = (400, 400, 50, 50)


def truth_of(protocol, boxes, *, num_images=1, negative=(), not_exhaustive=()):
    """`boxes`: (image_id, category_id, xywh). Categories 1 rare, 2 common, 3 frequent, 4 unseen."""
    return GroundTruth(
        name="hand",
        protocol=protocol,
        categories=(
            Category(1, "gnu", "r", False),
            Category(2, "cat", "c", True),
            Category(3, "person", "f", True),
            Category(4, "yak", "r", False),
        ),
        images=tuple(
            ImageInfo(i, f"{i}.png", 480, 640, tuple(negative), tuple(not_exhaustive))
            for i in range(1, num_images + 1)
        ),
        image_ids=np.array([b[0] for b in boxes]),
        category_ids=np.array([b[1] for b in boxes]),
        boxes_xywh=np.array([b[2] for b in boxes], dtype=float),
        areas=np.array([b[2][2] * b[2][3] for b in boxes], dtype=float),
        is_crowd=np.zeros(len(boxes), dtype=bool),
    )


def results_of(*rows):
    """Rows of (image_id, category_id, xywh, score)."""
    return Results(
        image_ids=np.array([r[0] for r in rows], dtype=np.int64),
        category_ids=np.array([r[1] for r in rows], dtype=np.int64),
        boxes_xywh=np.array([r[2] for r in rows], dtype=float).reshape(-1, 4),
        scores=np.array([r[3] for r in rows], dtype=float),
    )


@pytest.mark.parametrize("protocol", ["lvis", "coco", "ovcoco"])
def test_a_perfect_answer_scores_one(protocol):
    truth = truth_of(protocol, [(1, 1, BOX), (1, 2, BOX), (1, 3, BOX)])
    metrics = score(truth, results_of(*[(1, c, BOX, 0.5) for c in (1, 2, 3)]))
    groups = {"lvis": ("APr", "APc", "APf"), "ovcoco": ("AP50_novel", "AP50_base", "AP50_all")}
    for key in ("AP", "AP50", "AP75", "APm", *groups.get(protocol, ())):
        assert metrics.values[key] == pytest.approx(1.0)
    assert metrics.evaluator.startswith("hotcoco ")
    assert math.isnan(metrics.values["APs"])
    assert metrics.as_json()["APs"] is None


def test_half_found_half_wrong_by_hand():
    # One of two cats found, after one false alarm: precision 1/2 up to recall 1/2, then 0.
    truth = truth_of("coco", [(1, 2, BOX), (1, 2, (200, 10, 50, 50))])
    metrics = score(truth, results_of((1, 2, ELSEWHERE, 0.9), (1, 2, BOX, 0.8)))
    assert metrics.values["AP50"] == pytest.approx(0.5 * 51 / 101)


def test_overlap_of_two_thirds_counts_for_thresholds_below():
    # IoU 2/3: found at .50 .55 .60 .65, missed at the six higher thresholds.
    metrics = score(
        truth_of("coco", [(1, 2, (0, 0, 40, 30))]), results_of((1, 2, (0, 0, 40, 20), 1))
    )
    assert metrics.values["AP"] == pytest.approx(0.4)
    assert metrics.values["AP75"] == 0


def test_groups_average_only_categories_with_ground_truth():
    truth = truth_of("lvis", [(1, 1, BOX), (1, 3, BOX)])
    metrics = score(truth, results_of((1, 3, BOX, 0.9)))
    assert metrics.values["APr"] == 0  # the gnu was missed; the yak is nowhere and has no say
    assert math.isnan(metrics.values["APc"])
    assert metrics.values["APf"] == pytest.approx(1.0)
    assert metrics.values["AP"] == pytest.approx(0.5)


def test_novel_and_base_are_slices_of_one_scoring():
    truth = truth_of("ovcoco", [(1, 1, BOX), (1, 2, BOX), (1, 3, BOX)])
    metrics = score(truth, results_of((1, 2, BOX, 0.9), (1, 1, ELSEWHERE, 0.9)))
    assert metrics.values["AP50_novel"] == 0
    assert metrics.values["AP50_base"] == pytest.approx(0.5)
    assert metrics.values["AP50_all"] == metrics.values["AP50"] == pytest.approx(1 / 3)


def false_alarm_then_truth(**lists):
    truth = truth_of("lvis", [(1, 2, BOX)], num_images=2, **lists)
    return score(truth, results_of((2, 2, BOX, 0.9), (1, 2, BOX, 0.8))).values["AP"]


def test_federated_annotation_decides_what_is_a_false_alarm():
    assert false_alarm_then_truth() == pytest.approx(1.0)  # image 2 was not searched for cats
    assert false_alarm_then_truth(negative=(2,)) == pytest.approx(0.5)
    not_all = false_alarm_then_truth(negative=(2,), not_exhaustive=(2,))
    assert not_all == pytest.approx(1.0)


def test_lvis_takes_the_best_300_of_an_image():
    truth = truth_of("lvis", [(1, 2, BOX)])
    noise = [(1, 3, ELSEWHERE, 0.9)] * 299
    kept = score(truth, results_of((1, 2, BOX, 0.5), *noise))
    assert kept.values["AP"] == pytest.approx(1.0)
    cut = score(truth, results_of((1, 2, BOX, 0.5), *noise, (1, 3, ELSEWHERE, 0.6)))
    assert cut.values["AP"] == 0
    in_coco = results_of((1, 2, BOX, 0.5), *noise, *noise)
    assert score(truth_of("coco", [(1, 2, BOX)]), in_coco).values["AP"] == pytest.approx(1.0)


def test_the_cut_keeps_file_order_and_breaks_ties_by_it():
    results = results_of(
        (2, 1, BOX, 0.1), (1, 1, BOX, 0.5), (2, 2, BOX, 0.1), (2, 3, BOX, 0.7), (1, 2, BOX, 0.4)
    )
    kept = keep_best_per_image(results, 2)
    assert list(zip(kept.image_ids.tolist(), kept.category_ids.tolist(), strict=True)) == [
        (2, 1),
        (1, 1),
        (2, 3),
        (1, 2),
    ]


def test_boxes_without_area_are_no_detections_in_lvis():
    truth = truth_of("lvis", [(1, 2, BOX)])
    metrics = score(truth, results_of((1, 2, (10, 10, 0, 50), 0.9), (1, 2, BOX, 0.8)))
    assert metrics.values["AP"] == pytest.approx(1.0)


def test_nothing_found_scores_zero():
    for protocol in ("lvis", "coco"):
        metrics = score(truth_of(protocol, [(1, 2, BOX)]), results_of())
        assert metrics.values["AP"] == 0
        assert metrics.num_detections == 0


def test_each_category_has_its_own_line():
    truth = truth_of("lvis", [(1, 1, BOX), (1, 1, ELSEWHERE), (1, 2, BOX)])
    metrics = score(truth, results_of((1, 2, BOX, 0.9), (1, 4, BOX, 0.9)))
    rare, common, frequent, unseen = metrics.per_category
    assert (rare.name, rare.group, rare.num_gt, rare.num_detections) == ("gnu", "rare", 2, 0)
    assert (rare.ap, common.ap, common.ap50) == pytest.approx((0, 1, 1))
    assert frequent.num_gt == 0
    assert math.isnan(frequent.ap)
    assert unseen.num_detections == 1


def test_detections_of_foreign_categories_are_counted_and_left_out():
    truth = truth_of("coco", [(1, 2, BOX)])
    metrics = score(truth, results_of((1, 2, BOX, 0.9), (1, 77, BOX, 0.9), (1, 78, BOX, 0.8)))
    assert metrics.values["AP"] == pytest.approx(1.0)
    (note,) = metrics.notes
    assert note.startswith("2 detections of 2 categories")
    with pytest.raises(DataError, match="no detection is of a category"):
        score(truth, results_of((1, 77, BOX, 0.9)))


def test_results_of_another_split_are_refused():
    with pytest.raises(DataError, match=r"2 images .*first: 8, 9"):
        score(truth_of("coco", [(1, 2, BOX)]), results_of((9, 2, BOX, 1), (8, 2, BOX, 1)))
