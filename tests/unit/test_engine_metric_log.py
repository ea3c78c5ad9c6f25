"""What is kept of a run's diary."""

import math
import re

import pytest
import torch

from dkdetr.engine.metric_log import MetricLog, add_record, in_brief, read_metrics
from dkdetr.engine.recent_figures import RecentFigures
from dkdetr.engine.step import StepResult
from dkdetr.evaluation.report_analysis import loss_charts, score_charts
from dkdetr.inference.serve_curves import curves_page


def test_a_brief_has_the_first_the_last_and_no_clock():
    records = [{"iteration": k, "time": 1e9 + k, "loss": 1 / 3 + k} for k in range(100)]
    brief = in_brief(records, 5)
    assert [each["iteration"] for each in brief] == [0, 25, 50, 74, 99]
    assert brief[0] == {"iteration": 0, "loss": 0.3333}
    assert in_brief(records[:3], 8) == [{"iteration": k, "loss": round(1 / 3 + k, 3 + (k == 0))}
                                        for k in range(3)]  # fmt: skip
    assert in_brief([], 8) == []
    assert len(in_brief(records[:1], 8)) == 1


def test_means_are_those_of_steps_that_were_taken():
    """A step that the fp16 scaler skipped has no figures; it is counted."""
    recent = RecentFigures(torch.device("cpu"))
    recent.add(_step(2.0, norm=1.0), 0.0, 4)
    recent.add(_step(math.nan, norm=math.inf, skipped=True), 0.0, 4)
    recent.add(_step(4.0, norm=3.0), 0.0, 4)
    means = recent.means(0)
    assert (means["total"], means["grad_norm"], means["skipped_steps"]) == (3.0, 2.0, 1)
    assert recent.note().startswith("loss 3.00, ")
    assert recent.note().endswith("1 skipped")


def test_what_is_no_number_is_null_in_the_diary_and_readers_cope(tmp_path):
    recent = RecentFigures(torch.device("cpu"))
    recent.add(_step(2.0, norm=math.inf), 0.0, 4)
    first = recent.means(20)
    recent.add(_step(math.nan, norm=math.inf, skipped=True), 0.0, 4)
    second = recent.means(0)
    assert (second["total"], second["grad_norm"], second["skipped_steps"]) == (None, None, 1)
    assert recent.note().startswith("loss -, ")
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, after_iteration=0)
    for iteration, values in ((20, first), (40, second)):
        log.write("train", iteration, values)
    log.close()
    assert not re.search("NaN|Infinity", path.read_text())
    told = read_metrics(path)
    assert [each["total"] for each in told] == [2.0, None]
    assert [each["grad_norm"] for each in told] == [None, None]
    assert in_brief(told, 2)[1]["total"] is None
    (chart,) = loss_charts([told])
    assert chart.title == "total"
    assert curves_page({"run": told}).count('class="line1"') == 1


def test_scores_at_several_steps_are_a_curve():
    line = {"kind": "eval", "split": "x_val", "averaged": False, "AP": 0.2}
    told = [line | {"iteration": 20}, line | {"iteration": 40, "AP": 0.3}]
    other = [line | {"iteration": 40, "split": "y_val"}, line | {"iteration": 60, "AP": None}]
    others = [told[0] | {"averaged": True}, told[0] | {"words": "clean"}]
    (chart,) = score_charts([told, [*other, *others]])
    assert chart.title == "AP, x_val"
    assert [run for run, _ in chart.paths] == [1]
    assert score_charts([[told[0], told[1] | {"words": "other"}]]) == []
    assert len(score_charts([[told[0], told[1] | {"words": "split"}]])) == 1
    assert "AP, x_val" in curves_page({"run": told})


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ({"AP50": 0.2, "AP75": 0.1}, ["AP50"]),  # VOC
        ({"AP": 0.2, "AP50": 0.3}, ["AP"]),  # COCO, Objects365
        ({"AP": 0.2, "APr": 0.1, "APc": 0.2, "APf": None}, ["APr", "APc"]),  # LVIS
        ({"AP": 0.2, "AP50_all": 0.3, "AP50_novel": 0.1}, ["AP50 novel", "AP50 all"]),
        ({"AP": None}, []),
    ],
)
def test_the_numbers_that_a_protocol_is_about_are_drawn(values, drawn):
    line = {"kind": "eval", "split": "x_val", "averaged": False, **values}
    charts = score_charts([[line | {"iteration": 20}, line | {"iteration": 40}]])
    assert [chart.title for chart in charts] == [f"{name}, x_val" for name in drawn]


def test_a_diary_of_before_is_read_and_goes_on_without_its_nans(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 20, "total": NaN, "grad_norm": Infinity, "skd": 1.5}\n')
    assert read_metrics(path) == [{"iteration": 20, "total": None, "grad_norm": None, "skd": 1.5}]
    MetricLog(path, after_iteration=20).close()
    assert not re.search("NaN|Infinity", path.read_text())


def test_a_line_beside_a_training_loses_none_and_readers_order_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, after_iteration=0)
    log.write("train", 40, {})
    add_record(path, "eval", 20, {"AP": 0.5})
    log.write("train", 60, {})
    add_record(path, "eval", 40, {"AP": 0.6})
    log.close()
    assert _told(path) == [("eval", 20), ("train", 40), ("eval", 40), ("train", 60)]
    MetricLog(path, after_iteration=40).close()  # resumed there: what lies behind comes again
    assert _told(path) == [("eval", 20), ("train", 40), ("eval", 40)]


def test_a_line_that_was_cut_short_takes_no_other_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "iteration": 20}\n{"kind": "train", "iterat')
    add_record(path, "eval", 20, {})
    add_record(path, "eval", 10, {})
    assert _told(path) == [("eval", 10), ("train", 20), ("eval", 20)]


def _told(path):
    return [(each["kind"], each["iteration"]) for each in read_metrics(path)]


def _step(total, *, norm, skipped=False):
    return StepResult(
        {"total": torch.tensor(total)}, {"grad_norm": torch.tensor(norm)}, 1e-4, skipped
    )
