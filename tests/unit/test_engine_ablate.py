"""An ablation's bookkeeping, with a stand-in for `dkdetr` that trains nothing."""

import csv
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dkdetr.engine import ablate as ablate_module
from dkdetr.engine.ablate import RowFailedError, ablate, price_ablation
from dkdetr.engine.ablation_plan import AblateRequest, AblationPlan, PlannedRun, savings
from dkdetr.engine.ablation_tables import table_of
from dkdetr.engine.folder_lock import FolderLockedError, locked_folder
from dkdetr.engine.row_places import RowPlaces
from dkdetr.errors import MismatchError, PreemptedError

# train FOLDER START SECONDS CODE STEPS, eval FOLDER APr
STAND_IN = """
import json, pathlib, signal, sys, time
verb, folder = sys.argv[1], pathlib.Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "calls").open("a") as calls:
    calls.write(verb + chr(10))
if verb == "train":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    start, seconds, code, steps = (float(word) for word in sys.argv[3:7])
    if start and not (folder.parent / "burn_in" / "metrics.jsonl").is_file():
        sys.exit("no burn-in")
    (folder / "alive").touch()
    time.sleep(seconds)
    line = json.dumps({"iteration": int(start + steps), "images_per_s": 8.0})
    (folder / "metrics.jsonl").write_text(line + chr(10))
    if code:
        print("noise\\nerror [8]: the loss is not finite\\nlast words")
    sys.exit(int(code))
scores = {"AP": 0.2, "APr": float(sys.argv[3]), "APc": None, "APf": 0.4, "AP50": 0.5}
(folder / "score.json").write_text(json.dumps(scores | {"split": "s", "evaluator": "e"}))
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return (sys.executable, "-S", str(path))


def plan_of(out, *, seeds=(0, 1), seconds=0.0, broken=(), burn_in=10):
    """Table 7; APr is 10 for the baseline, one more a row and half a point more a seed."""
    table = table_of("7")
    runs, burn_ins = [], []
    for seed in seeds:
        folder = out / f"seed{seed}"
        words = ("train", str(folder / "burn_in"), "0", "0", "0", str(burn_in))
        burn_ins.append(PlannedRun("burn_in", seed, folder / "burn_in", "h", burn_in, 16, (words,)))
        for place, row in enumerate(table.rows):
            name = folder / row.run
            code = "8" if row.run in broken else "0"
            train = ("train", str(name), str(burn_in), str(seconds), code, "30")
            score = ("eval", str(name), str((10 + place + seed / 2) / 100))
            runs.append(PlannedRun(row.run, seed, name, "h", 30, 16, (train, score)))
    return AblationPlan(
        table=table, out=out, split="s", protocol="lvis", experiment="trial",
        cache_fingerprint="f", seeds=tuple(seeds), runs=tuple(runs),
        burn_ins=tuple(burn_ins) if burn_in else (),
        wanted=frozenset(row.run for row in table.rows),
    )  # fmt: skip


def request_of(**changes):
    plain = {
        "cache": Path("c"), "table": "7", "experiment": None, "overrides": (), "seeds": 2,
        "rows": (), "jobs": 2, "split": None, "out": None, "data_root": Path("d"), "device": "cpu",
    }  # fmt: skip
    return AblateRequest(**(plain | changes))


@pytest.fixture
def planned(monkeypatch):
    def use(plan):
        monkeypatch.setattr(ablate_module, "make_plan", lambda _request: plan)

    return use


def test_every_row_runs_once_from_its_seeds_burn_in(tmp_path, stand_in, planned):
    plan = plan_of(tmp_path / "out")
    planned(plan)
    summary = ablate(request_of(), stand_in)
    for seed in (0, 1):
        folder = tmp_path / "out" / f"seed{seed}"
        assert (folder / "burn_in/calls").read_text().split() == ["train"]
        for row in plan.table.rows:
            assert (folder / row.run / "calls").read_text().split() == ["train", "eval"]
    # Means of both seeds with the spread between them; then again, when nothing is left to run.
    assert "| baseline" in summary.text
    assert "10.2 (0.5)" in summary.text
    again = ablate(request_of(), ("/nothing/such",))
    assert again.text == summary.text
    assert again.failed == 0
    assert "baseline 2.000; image 2.000" in again.text
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"table_7.md", "table_7.csv", "table_7.png", "table_7.sh", "ablate.log"} <= files
    assert (tmp_path / "out/table_7.png").read_bytes().startswith(b"\x89PNG")
    commands = (tmp_path / "out/table_7.sh").read_text().splitlines()
    assert len(commands) == len(set(commands)) == 2 * (1 + 2 * 4)
    record = json.loads((tmp_path / "out/seed1/rkd/row.json").read_text())
    assert record["metrics"]["APr"] == pytest.approx(0.135)
    assert record["seconds_per_step"] == pytest.approx(2.0)
    assert record["log"] == [{"iteration": 40, "images_per_s": 8.0}]


def test_kept_records_alone_are_enough_to_go_on_elsewhere(tmp_path, stand_in, planned):
    """What is kept of a row is its row.json: another folder takes it for finished."""
    planned(plan_of(tmp_path / "here"))
    first = ablate(request_of(), stand_in)
    for record in (tmp_path / "here").glob("seed*/*/row.json"):
        if record.parent.name != "rkd":
            copy = tmp_path / "there" / record.relative_to(tmp_path / "here")
            copy.parent.mkdir(parents=True)
            copy.write_bytes(record.read_bytes())
    planned(plan_of(tmp_path / "there"))
    second = ablate(request_of(), stand_in)
    calls = {path.parent.name for path in (tmp_path / "there").glob("seed*/*/calls")}
    assert calls == {"burn_in", "rkd"}
    assert second.text == first.text


def test_a_row_that_fails_is_shown_and_loses_no_other(tmp_path, stand_in, planned):
    planned(plan_of(tmp_path, seeds=(0,), broken=("rkd_image",)))
    summary = ablate(request_of(seeds=1), stand_in)
    assert summary.failed == 8
    line = next(line for line in summary.text.splitlines() if line.startswith("| image "))
    assert line.count("failed") == 4
    assert "error [8]: the loss is not finite" in summary.text
    assert "last words" not in summary.text
    assert "| batch " in summary.text
    assert "12.0" in summary.text
    with pytest.raises(RowFailedError) as caught:
        summary.raise_failures()
    assert caught.value.exit_code == 8
    assert not (tmp_path / "seed0/rkd_image/row.json").exists()


def test_a_broken_burn_in_fails_its_rows_by_name(tmp_path, stand_in, planned):
    plan = plan_of(tmp_path, seeds=(0,))
    broken = ("train", str(tmp_path / "seed0/burn_in"), "0", "0", "9", "10")
    burn_in = PlannedRun("burn_in", 0, tmp_path / "seed0/burn_in", "h", 10, 16, (broken,))
    planned(AblationPlan(**(vars(plan) | {"burn_ins": (burn_in,)})))
    summary = ablate(request_of(seeds=1), stand_in)
    assert summary.failed == 9
    assert not (tmp_path / "seed0/rkd").exists()
    assert "'seed0/burn_in' before it failed" in summary.text


def test_rows_not_asked_for_are_not_run_and_say_so(tmp_path, stand_in, planned):
    plan = plan_of(tmp_path, seeds=(0,))
    planned(AblationPlan(**(vars(plan) | {"wanted": frozenset({"rkd"})})))
    summary = ablate(request_of(seeds=1), stand_in)
    assert sorted(path.name for path in (tmp_path / "seed0").iterdir()) == ["burn_in", "rkd"]
    for label in ("baseline", "image", "batch"):
        line = next(each for each in summary.text.splitlines() if each.startswith(f"| {label} "))
        assert line.count("not run") == 4
    with (tmp_path / "table_7.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert rows["baseline"]["state"] == "not run"
    assert rows["baseline"]["APr"] == ""
    assert rows["rkd"]["APr"] == "13.0000"
    assert rows["rkd"]["paper_APr"] == "19.8"


def test_sigterm_stops_rows_and_the_same_command_goes_on(tmp_path, stand_in, planned, monkeypatch):
    planned(plan_of(tmp_path, seeds=(0,), seconds=3600.0))

    def stop_when_alive():
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("seed0/*/alive"))) < 2:  # a burn-in and a row
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_alive)
    thread.start()
    with pytest.raises(PreemptedError) as caught:
        ablate(request_of(seeds=1, jobs=1), stand_in)
    thread.join()
    assert caught.value.exit_code == 75
    assert not list(tmp_path.glob("seed0/*/row.json"))
    planned(plan_of(tmp_path, seeds=(0,)))
    # Four of the burn-in's ten steps are there: shown, but not counted in the rate.
    (tmp_path / "seed0/burn_in/metrics.jsonl").write_text('{"iteration": 4}\n')
    shown = []
    bar = ablate_module.progress
    monkeypatch.setattr(
        ablate_module, "progress", lambda *args, **words: shown.append(words) or bar(*args, **words)
    )
    assert ablate(request_of(seeds=1), stand_in).failed == 0
    assert shown == [{"done": 4}]


def test_rows_of_one_folder_are_one_training(tmp_path, planned):
    """Two rows whose settings came to the same: one run, counted and priced once."""
    plan = plan_of(tmp_path, seeds=(0,))
    first, second, *others = plan.runs
    twin = replace(first, run=second.run)
    planned(replace(plan, runs=(first, twin, *others)))
    text = price_ablation(request_of(seeds=1)).text
    assert text.count(f"  {first.name} ") == 1
    assert f"{10 + 3 * 30} steps to run at most" in text
    assert "spares 20 steps" in text
    assert "serves all 3 trainings" in text


def test_a_second_ablation_in_the_same_folder_is_refused(tmp_path, stand_in, planned):
    planned(plan_of(tmp_path))
    with locked_folder(tmp_path, "mine"), pytest.raises(FolderLockedError, match="--out") as caught:
        ablate(request_of(), stand_in)
    assert caught.value.exit_code == 7


def test_rows_that_outlive_a_killed_ablation_hold_its_lock(tmp_path):
    with locked_folder(tmp_path, "") as lock:
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        with pytest.raises(FolderLockedError), locked_folder(tmp_path, ""):
            pass
    finally:
        orphan.kill()
        orphan.wait()
    with locked_folder(tmp_path, ""):
        pass


@pytest.fixture
def held_elsewhere(tmp_path, monkeypatch):
    """A folder that another process holds, and what is called at each pause of who waits for it."""
    pauses: list[Callable[[], None]] = []
    monkeypatch.setattr("time.sleep", lambda _seconds: pauses.pop(0)())
    with (tmp_path / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        yield other, pauses


def test_a_job_put_back_waits_for_the_lock_of_a_machine_that_died(
    tmp_path, monkeypatch, held_elsewhere, capsys
):
    other, pauses = held_elsewhere
    with pytest.raises(FolderLockedError), locked_folder(tmp_path, ""):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    pauses += [lambda: None, lambda: None, other.close]
    with locked_folder(tmp_path, ""):
        assert not pauses
    assert capsys.readouterr().err == f"note: '{tmp_path}' is locked; waiting up to 180 s\n"


def test_a_job_put_back_does_not_wait_for_ever(tmp_path, monkeypatch, held_elsewhere):
    pauses = held_elsewhere[1]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    pauses += [lambda: None] * 6
    with pytest.raises(FolderLockedError), locked_folder(tmp_path, "", patience_s=30):
        pass
    assert not pauses


def test_sigterm_ends_the_waiting(tmp_path, monkeypatch, held_elsewhere):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held_elsewhere[1].append(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(PreemptedError, match="goes on"), locked_folder(tmp_path, ""):
        pass


def test_where_nothing_can_be_locked_a_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked_folder(tmp_path, ""):
        pass
    assert "No locks available" in capsys.readouterr().err


def test_a_finished_row_of_other_settings_is_refused(tmp_path, stand_in, planned):
    plan = plan_of(tmp_path, seeds=(0,))
    planned(plan)
    ablate(request_of(seeds=1), stand_in)
    other = [PlannedRun(**(vars(run) | {"hash": "other"})) for run in plan.runs]
    planned(AblationPlan(**(vars(plan) | {"runs": tuple(other)})))
    with pytest.raises(MismatchError, match="config_hash h, asked for is other"):
        ablate(request_of(seeds=1), stand_in)


def test_rows_on_one_gpu_are_given_what_lets_them_share_it(tmp_path, monkeypatch, planned):
    asked = []

    @contextmanager
    def sharing(device):
        assert device == "cuda"
        asked.append("begun")
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/service"}
        asked.append("ended")

    program = (
        sys.executable,
        "-c",
        "import json, os, sys; assert os.environ['CUDA_MPS_PIPE_DIRECTORY'] == '/tmp/service'\n"
        "if sys.argv[1] == 'eval': open(sys.argv[2] + '/score.json', 'w').write(json.dumps("
        "{'AP': .1, 'APr': .1, 'APc': .1, 'APf': .1, 'AP50': .1, 'split': 's', 'evaluator': 'e'}))",
    )
    monkeypatch.setattr(ablate_module, "side_by_side_on_gpus", sharing)
    for gpus, begun in ((1, ["begun", "ended"]), (2, [])):
        asked.clear()
        environment = {} if gpus == 1 else {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/service"}
        places = RowPlaces((environment, environment), cores=1, gpus=gpus)
        monkeypatch.setattr(ablate_module, "places_for", lambda *_, places=places, most: places)
        plan = plan_of(tmp_path / str(gpus), burn_in=0, seeds=(0,))
        planned(plan)
        assert ablate(request_of(seeds=1, device="auto"), program).failed == 0
        assert asked == begun


def test_the_price_says_what_sharing_saves(tmp_path, stand_in, planned):
    plan = plan_of(tmp_path, burn_in=900)
    planned(plan)
    text = price_ablation(request_of()).text
    assert "device-hours unknown" in text
    # 4 rows, 2 seeds: 8 burn-ins of 900 steps become 2.
    assert "spares 5,400 steps" in text
    assert not tmp_path.joinpath("seed0").exists()
    ablate(request_of(), stand_in)
    # Rows that are there count, whichever are asked for now.
    lines = savings(replace(plan, wanted=frozenset({"baseline"})))
    assert "spares 5,400 steps" in lines[0]
    assert "all 8 trainings" in lines[1]
    # 16 images a step at 8 images/s: 2 s a step, 3 hours.
    assert "3.00 device-hours at 2.000 s a step" in price_ablation(request_of()).text
