"""Row against baseline, name by name."""

import math

import pytest

from dkdetr.engine.ablation_names import difference_by_name, read_group_scores
from dkdetr.engine.ablation_results import AblationResult, RowResult, markdown
from dkdetr.engine.ablation_tables import TableRow, table_of

CSV = """category_id,name,group,AP,AP50,AP75,num_gt,num_detections
1,apple,frequent,0.5,0.75,0.25,3,9
2,pear,rare,0.25,0.5,0.125,2,4
3,plum,rare,,,,0,4
4,fig,novel,0.125,0.5,0.0,2,4
"""


def test_scores_by_group_leave_out_what_cannot_be_scored(tmp_path):
    path = tmp_path / "per_category.csv"
    path.write_text(CSV)
    assert read_group_scores(path, "lvis") == {"APf": {"1": 0.5}, "APr": {"2": 0.25}}
    assert read_group_scores(path, "ovcoco") == {"AP50_novel": {"4": 0.5}}
    assert read_group_scores(path, "coco") == {}


def test_the_error_is_that_of_a_paired_mean_over_names():
    baseline = {"1": 0.1, "2": 0.2, "3": 0.3, "9": 1.0}
    row = {"1": 0.2, "2": 0.2, "3": 0.5}
    found = difference_by_name([(row, baseline)])
    assert found is not None
    assert (found.mean, found.names) == (pytest.approx(0.1), 3)
    assert found.error == pytest.approx(0.1 / math.sqrt(3))
    # A second seed in which nothing moves halves every name's difference.
    both = difference_by_name([(row, baseline), (baseline, baseline)])
    assert both is not None
    assert both.mean == pytest.approx(0.05)
    assert difference_by_name([]) is None
    assert difference_by_name([({"1": 0.2}, baseline)]) is None


def test_the_table_says_what_moved_and_what_has_no_names():
    names = {"APr": {"1": 0.1, "2": 0.2}}
    better = {"APr": {"1": 0.3, "2": 0.3}}
    rows = (
        RowResult(TableRow("baseline", "baseline"), {0: {"APr": 0.15}}, {}, {0: names}),
        RowResult(TableRow("skd", "SKD"), {0: {"APr": 0.3}}, {}, {0: better}),
        RowResult(TableRow("rkd", "RKD"), {0: {"APr": 0.3}}, {}),
        RowResult(TableRow("both", "both"), {}, {}),
    )
    text = markdown(AblationResult(table_of("5"), "x", ("APr", "AP"), (0,), rows, ()))
    assert "(2 in APr)" in text
    lines = text[text.index("name by name") :].splitlines()
    assert next(line for line in lines if "SKD" in line).split("|")[2].strip() == "+15.0 ± 5.0"
    assert next(line for line in lines if "RKD" in line).split("|")[2].strip() == "-"
    assert next(line for line in lines if "both" in line).split("|")[2].strip() == "not run"


def test_without_names_there_is_no_such_table():
    rows = (RowResult(TableRow("baseline", "baseline"), {0: {"AP": 0.15}}, {}),)
    text = markdown(AblationResult(table_of("5"), "x", ("AP",), (0,), rows, ()))
    assert "name by name" not in text
