"""`ablate`, `report` and `eval --agreement` as typed, on a few pictures and a sealed cache."""

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from dkdetr.engine.ablate import ablate, price_ablation
from dkdetr.engine.ablation_plan import AblateRequest, make_plan
from dkdetr.engine.metric_log import read_metrics
from dkdetr.errors import UsageError
from tests.e2e.commands import call_well, succeed
from tests.e2e.small_coco import write_coco_folder

SETTINGS = (
    "optim.epochs=2", "optim.lr_drop_epochs=[1]", "data.image_size=96", "data.batch_size=4",
    "student.num_queries=12", "kd.start_epoch=1",
)  # fmt: skip
ROWS = ("baseline", "both_no_auxiliary")


def test_two_rows_of_a_table_share_a_burn_in_and_are_reported(tmp_path):
    train = write_coco_folder(tmp_path, "train2017", num_images=12, seed=1)
    val = write_coco_folder(tmp_path, "val2017", num_images=4, seed=2)
    tiny = [word for setting in SETTINGS for word in ("--set", setting)]
    call_well("cache-teacher", "--teacher", "pictograms", "--prompts", "single", "--keep", "12",
              "--split", train, "--out", "cache/trial", "--experiment", "trial", "--fit-epochs",
              "1", *tiny, cwd=tmp_path)  # fmt: skip
    words = ("ablate", "--cache", "cache/trial", "--experiment", "trial", "--table", "5",
             "--split", val, "--out", "ablation", "--rows", ",".join(ROWS), "--jobs", "2",
             "--eval-every", "1", "--json", "table.json", *tiny)  # fmt: skip
    printed = succeed(*words, cwd=tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert rows["baseline"]["seeds"].keys() == {"0"}
    assert rows["both_no_auxiliary"]["seeds"]["0"]["AP50_all"] is not None
    assert rows["both"]["seeds"] == {}
    assert "not run" in printed
    assert "9.0 / 61.2" in printed  # the paper's baseline on OV-COCO
    # Both rows go on where the one burn-in ended: 3 steps an epoch.
    diaries = [tmp_path / "ablation/seed0" / row / "metrics.jsonl" for row in ROWS]
    first = [json.loads(diary.read_text().splitlines()[0]) for diary in diaries]
    assert [line["iteration"] for line in first] == [6, 6]
    assert "skd" in first[1]
    assert "skd" not in first[0]

    _were_scored_each_epoch(tmp_path / "ablation/seed0", val)
    _look_again(tmp_path, val, printed)

    words = ("eval", "ablation/seed0/baseline", "--agreement", "cache/trial")
    agreed = call_well(*words, cwd=tmp_path)
    assert "TRAINING (not held out) images" in agreed
    runs = [f"ablation/seed0/{row}" for row in ROWS]
    call_well("report", *runs, "--split", val, "--out", "page.html", cwd=tmp_path)
    page = (tmp_path / "page.html").read_text()
    assert "Agreement with the teacher" in page
    assert "kd.rkd.weight" in page


def _were_scored_each_epoch(seed, val):
    """The burn-in in its own diary, a row where it ended and, the same, once more by `eval`."""
    scored = {
        run: [line for line in read_metrics(seed / run / "metrics.jsonl") if line["kind"] == "eval"]
        for run in ("burn_in", *ROWS)
    }
    epochs = {run: [line["epoch"] for line in lines] for run, lines in scored.items()}
    assert epochs == {"burn_in": [1], "baseline": [2, 2], "both_no_auxiliary": [2, 2]}
    assert {line["split"] for lines in scored.values() for line in lines} == {val}
    record = json.loads((seed / "baseline" / "row.json").read_text())
    assert all(line["AP50"] == record["metrics"]["AP50"] for line in scored["baseline"])
    assert f"--eval-every 1 --eval-split {val}" in record["commands"][0]
    assert "--eval-every" not in record["commands"][1]


def _look_again(folder, val, printed):
    """In this process: the same table from what is there, its price, and what is refused."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        request = AblateRequest(
            cache=Path("cache/trial"), table="5", experiment="trial", overrides=SETTINGS, seeds=1,
            rows=ROWS, jobs=1, split=val, out=Path("ablation"), data_root=Path("data"),
            device="cpu",
        )  # fmt: skip
        assert ablate(request, ("/nothing/such",)).text in printed
        priced = price_ablation(request).text
        assert "seed0/baseline" in priced
        assert priced.count("finished") == 2
        # One burn-in of 3 steps spared, at the measured rate.
        assert "spares 3 steps" in priced
        assert "as measured" in priced
        assert make_plan(replace(request, table="6", rows=())).table.note.endswith("0.5, ViLD's.")
        plan = make_plan(request)
        assert {run.steps for run in (*plan.runs, *plan.burn_ins)} == {3}
        assert not any("--eval-every" in run.commands[0] for run in plan.trainings())
        watched = make_plan(replace(request, eval_every=2))
        assert [run.hash for run in watched.runs] == [run.hash for run in plan.runs]
        assert not watched.jobs()  # what is finished stays so
        _check_loader_processes(request)
        with pytest.raises(UsageError, match="its rows: baseline, skd, rkd"):
            make_plan(AblateRequest(**(vars(request) | {"rows": ("nonsense",)})))
        with pytest.raises(UsageError, match="1 or more"):
            make_plan(AblateRequest(**(vars(request) | {"seeds": 0})))
        with pytest.raises(UsageError, match="0 or more epochs"):
            make_plan(replace(request, eval_every=-1))
    finally:
        os.chdir(before)


def _check_loader_processes(request):
    """Rows side by side share the cores; a burn-in has them all; a number asked for stands."""
    many = AblateRequest(**(vars(request) | {"experiment": "pictograms_full", "jobs": 4}))
    asked = AblateRequest(**(vars(many) | {"overrides": (*SETTINGS, "data.workers=7")}))
    with mock.patch.object(os, "sched_getaffinity", return_value=set(range(4))):
        plans = make_plan(many), make_plan(asked)
    words = [
        [word for word in run.commands[0] if word.startswith("data.workers=")]
        for plan in plans
        for run in (plan.runs[0], plan.burn_ins[0])
    ]
    # Two rows are asked for: two cores each, one of them for the row itself.
    assert words == [["data.workers=1"], ["data.workers=3"], ["data.workers=7"], ["data.workers=7"]]
    assert plans[0].runs[0].hash == plans[1].runs[0].hash  # how, not what
