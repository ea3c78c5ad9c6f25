"""The verdicts of the report against the evaluators: the mean of a curve is AP50."""

import numpy as np
import pytest

from dkdetr.evaluation.curves import group_curves
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.verdicts import Verdict, judge
from tests.contracts.evaluation_problems import random_problem


@pytest.mark.parametrize("protocol", ["lvis", "ovcoco", "coco"])
@pytest.mark.parametrize("seed", range(6))
def test_the_mean_of_each_categorys_curve_is_its_ap50(protocol, seed):
    most = 340 if seed == 5 else 60
    truth, results = random_problem(
        protocol, seed, num_images=8 if seed == 5 else 24, detections_per_image=(0, most)
    )
    metrics = score(truth, results)
    judged = judge(truth, results)
    curves = {curve.group: curve for curve in group_curves(truth, judged)}
    assert curves["all"].precision.mean() == pytest.approx(metrics.values["AP50"], abs=1e-12)
    by_group = {}
    for line in metrics.per_category:
        if not np.isnan(line.ap50):
            by_group.setdefault(line.group, []).append(line.ap50)
    for group, values in by_group.items():
        if group:
            assert curves[group].precision.mean() == pytest.approx(np.mean(values), abs=1e-12)
    found = judged.verdicts == Verdict.FOUND
    assert found.sum() == (judged.finder >= 0).sum() > 0
    assert (judged.finder[judged.partner[found]] == np.flatnonzero(found)).all()
    assert (curves["all"].reached >= curves["all"].recall) or np.isnan(curves["all"].recall)
