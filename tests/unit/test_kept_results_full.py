"""What the page of `full` and `full70` says is what their kept records say."""

import json
import re

import pytest

from dkdetr.engine.ablation_names import difference_by_name
from tests.kept_records import EXPERIMENTS, GROUPS, figures, less, record, rows_of, scores, words_of


@pytest.mark.parametrize("folder", ["full_nine", "full_first", "full70_first"])
def test_the_tables_at_full_are_of_their_records(folder: str):
    """The style held out has no kept record: its two columns are not looked at."""
    page = (EXPERIMENTS / "FULL.md").read_text()
    sections = {part.split(":")[0]: part for part in page.split("\n## ")}
    whole, two_epochs = sections["`full`"].split("**Two epochs of nine**")
    part = {
        "full_nine": whole, "full_first": two_epochs, "full70_first": sections["`full70`"],
    }[folder]  # fmt: skip
    shown = {row[0]: row[1:] for row in rows_of(part)[2:]}
    errors = (EXPERIMENTS / "results" / folder / "table_5.md").read_text().split("name by name")[1]
    over_names = {row[0]: row[1:] for row in rows_of(errors)}
    runs = {"baseline": "baseline", "SKD": "skd", "RKD": "rkd", "SKD + RKD": "both"}
    trained = {path.name for path in (EXPERIMENTS / "results" / folder / "seed0").iterdir()}
    assert {runs[label] for label in shown} == trained
    for label, cells in shown.items():
        assert [float(cell) for cell in cells[:4]] == pytest.approx(
            [scores(folder, runs[label], group)[0] for group in GROUPS], abs=0.0501
        )
        if label != "baseline":
            assert cells[4:7] == over_names[label]
            gains = [less(folder, runs[label], "baseline", group)[0] for group in GROUPS]
            found = [figures(cell)[0] for cell in cells[4:8]]
            assert found == pytest.approx(gains, abs=0.0501)


def test_l1_against_bce_at_full_is_of_the_records():
    page = (EXPERIMENTS / "FULL.md").read_text()
    section = page[page.index("## L1 against BCE") : page.index("## What the rows")]
    shown = {row[0]: row[1:] for row in rows_of(section)[2:]}
    for label, row in (("L1", "skd_l1"), ("BCE", "skd")):
        assert [float(cell) for cell in shown[label]] == pytest.approx(
            [scores("full_l1", row, group)[0] for group in GROUPS], abs=0.0501
        )
    bce, l1 = (record(EXPERIMENTS / "results" / "full_l1", row, 0) for row in ("skd", "skd_l1"))
    assert l1["config"]["kd"]["skd"]["weight"] == 0.3
    for cell, group in zip(shown["BCE less L1, ± over names"], GROUPS, strict=True):
        (told, *error) = figures(cell)
        assert told == pytest.approx(less("full_l1", "skd", "skd_l1", group)[0], abs=0.0501)
        if error:
            apart = difference_by_name([(bce["names"][group], l1["names"][group])])
            assert apart is not None
            assert error[0] == pytest.approx(100 * apart.error, abs=0.0501)
    for group in ("AP50", "AP75"):
        pair = [100 * each["metrics"][group] for each in (bce, l1)]
        assert f"{group} {pair[0]:.1f} against {pair[1]:.1f}" in section
    again = [
        scores(folder, "skd", group)[0] for folder in ("full_l1", "full_first") for group in GROUPS
    ]
    said = " / ".join(
        f"{one - other:+.1f}" for one, other in zip(again[:4], again[4:], strict=True)
    )
    assert f"; {said}, three to four fifths of what SKD gains" in " ".join(section.split())


def test_what_the_page_says_of_full_is_of_the_records():
    told = [
        " / ".join(f"{less('full_nine', row, 'baseline', group)[0]:+.1f}" for group in GROUPS)
        for row in ("skd", "rkd", "both")
    ]
    baseline = " / ".join(f"{scores('full_nine', 'baseline', group)[0]:.1f}" for group in GROUPS)
    assert (
        f"less the baseline's {baseline}: SKD {told[0]}, RKD {told[1]}, both {told[2]}."
    ) in words_of("README.md")
    few = [
        " / ".join(f"{each:{sign}.1f}" for each in values)
        for sign, values in (
            ("+", [less("full70_first", "both", "baseline", group)[0] for group in GROUPS]),
            ("", [scores("full70_first", "baseline", group)[0] for group in GROUPS]),
        )
    ]
    assert f"both have {few[0]} over {few[1]}." in words_of("README.md")
    rates = [
        scores(folder, "both", "APr")[0] / scores(folder, "baseline", "APr")[0]
        for folder in ("full70_first", "full_first")
    ]
    assert f"It is {rates[0]:.2f} times the baseline's novel AP ({rates[1]:.2f} at" in words_of(
        "FULL.md"
    )


def test_the_head_of_full_has_the_recipe_that_was_run():
    head = (EXPERIMENTS / "pictograms_full.toml").read_text().split("# Expected")[0]
    commands = re.findall(r"dkdetr [^\n]+", head)
    assert len(commands) == 3
    page = (EXPERIMENTS / "FULL.md").read_text().splitlines()
    assert all(command in page for command in commands)
    kept = record(EXPERIMENTS / "results" / "full_nine", "both", "0")["commands"][0]
    wanted = re.search(r"--set (\S+)=(\S+)$", commands[-1])
    assert wanted
    assert f'{wanted[1]}="{wanted[2]}"' in kept


def test_what_full_stands_on_is_of_the_records():
    page = (EXPERIMENTS / "FULL.md").read_text()
    section = page[page.index("## What the rows") : page.index("## `full70`")]
    shown = {row[0]: row[1:] for row in rows_of(section)}
    kept = json.loads((EXPERIMENTS / "results" / "material_full.json").read_text())
    (recall,) = kept["recall"].values()
    for place, group in enumerate(("base", "novel")):
        said = [figures(cells[place]) for label, cells in shown.items() if "teacher" in label]
        assert said == [[pytest.approx(100 * kept["teacher"][group]["top1"])]]
        said = figures(shown["objects held by `fit`'s best 20, 100, 300 proposals"][place])
        assert said == pytest.approx([100 * share for share in recall[group].values()])
    labels = {"baseline": "baseline", "skd": "SKD", "rkd": "RKD", "both": "SKD + RKD"}
    agreement = json.loads((EXPERIMENTS / "results" / "agreement_full.json").read_text())
    margins = {
        each["row"]: group["margin"]
        for each in agreement
        for group in each["groups"]
        if each["queries"].startswith("detection") and group["group"] == "rare"
    }
    ahead = [f"{margins[row] - margins['baseline']:+.3f}" for row in ("skd", "rkd", "both")]
    skd, rkd, both = (each.replace("0.", ".") for each in ahead)
    assert f"SKD {skd}, RKD {rkd}, both {both} (APr" in page
    for each in agreement:
        ending = "" if each["queries"].startswith("detection") else ", its KD queries"
        groups = [group for group in each["groups"] if group["group"] != "all"]
        for cell, group in zip(shown[labels[each["row"]] + ending], groups, strict=True):
            assert figures(cell)[0] == pytest.approx(group["cosine"], abs=0.0051)
            assert figures(cell)[1] == pytest.approx(group["margin"], abs=0.00051)


def tuned_at_full(row: str) -> list[dict]:
    lines = (EXPERIMENTS / "results" / "tuning_full.jsonl").read_text().splitlines()
    return [run for run in map(json.loads, lines) if run["row"] == row]


def test_the_rates_tried_at_full_are_of_the_kept_runs():
    runs = {
        next(word for word in run["settings"] if word.startswith("optim.lr=")): " / ".join(
            f"{100 * run['metrics'][group]:.1f}" for group in GROUPS
        )
        for run in tuned_at_full("baseline")
    }
    diary = words_of("DIARY.md")
    told = diary.split("the rate of `full`")[1]
    assert f"| APr / APc / APf / AP | {runs['optim.lr=8e-4']} | {runs['optim.lr=1.6e-3']} |" in told


def test_the_weights_tried_at_full_are_of_the_kept_runs():
    runs = tuned_at_full("both")
    told = words_of("DIARY.md").split("SKD's weight at `full`")[1]
    for run in runs:
        skd, rkd = (
            next(word.split("=")[1] for word in run["settings"] if word.startswith(key))
            for key in ("kd.skd.weight", "kd.rkd.weight")
        )
        means = " | ".join(f"{100 * run['metrics'][group]:.1f}" for group in GROUPS)
        assert f"| {skd.lstrip('0')}, {rkd} | {means} |" in told.replace("**", "").replace(
            " (the preset)", ""
        )
    assert len(runs) >= 2
