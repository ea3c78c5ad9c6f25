"""The three commands, as a user types them, on a few pictures.

The first of each starts cold, in a process of its own, and so does whatever is about a process:
pipes, terminals, SIGTERM. What then looks at the same folder is called in this one.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dkdetr.engine.checkpoint import find_checkpoint, load_checkpoint
from tests.e2e.commands import (
    DKDETR,
    call,
    call_well,
    dkdetr,
    environment,
    start_dkdetr,
    succeed,
)
from tests.e2e.small_coco import write_coco_folder

TINY = [
    "--set", "optim.epochs=2", "--set", "optim.lr_drop_epochs=[1]", "--set", "data.image_size=96",
    "--set", "data.batch_size=4", "--set", "student.num_queries=12", "--set", "kd.start_epoch=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A folder in which cache-teacher and train have run on generated pictures.

    Its name has spaces and letters beyond ASCII, and so has every path that follows.
    """
    folder = tmp_path_factory.mktemp("trial") / "größe 1, 試し"
    folder.mkdir()
    train = write_coco_folder(folder, "train2017", num_images=20, seed=1)
    val = write_coco_folder(folder, "val2017", num_images=6, seed=2)
    succeed(
        "cache-teacher", "--split", train, "--out", "cache/trial", "--teacher", "pictograms",
        "--experiment", "trial", "--fit-epochs", "1", "--keep", "12", "--prompts", "single",
        *TINY, cwd=folder,
    )  # fmt: skip
    words = ("--cache", "cache/trial", "--experiment", "trial", "--run", "runs/a", *TINY)
    succeed("train", *words, cwd=folder)
    return folder, train, val, words


def test_eval_writes_what_it_prints(trial) -> None:
    folder, _, val, _ = trial
    printed = succeed("eval", "runs/a", "--split", val, "--json", "scores.json", cwd=folder)
    scores = json.loads((folder / "scores.json").read_text())
    assert {"AP50_novel", "AP50_base", "AP50_all"} <= scores.keys()
    assert all(word in printed for word in ("AP50", "novel", "base", "per_category.csv"))
    for name in ("results", "metrics", "per_category", "confusion"):
        assert (folder / scores["files"][name]).is_file()


def test_what_goes_into_a_pipe_is_plain_and_quiet(trial) -> None:
    folder, _, val, words = trial
    done = dkdetr("eval", "runs/a", "--split", val, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "│" not in done.stderr
    assert "━" not in done.stderr
    # One line of progress, one that says what was scored.
    assert len(done.stderr.splitlines()) <= 3, done.stderr
    trained = dkdetr("train", *words, "--set", "seed=9", "--run", "runs/quiet", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout == ""
    assert "\x1b" not in trained.stderr
    assert len(trained.stderr.splitlines()) <= 6, trained.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals to pretend here")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_has_a_bar_and_no_color_takes_the_colours(
    trial, monkeypatch, no_color: str
) -> None:
    folder, _, val, _ = trial
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", no_color)
    reader, writer = os.openpty()
    process = subprocess.Popen(
        [*DKDETR, "eval", "runs/a", "--split", val],
        cwd=folder, env=environment(), stdout=writer, stderr=writer, close_fds=True,
    )  # fmt: skip
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while piece := os.read(reader, 4096):
            shown += piece
    os.close(reader)
    assert process.wait() == 0, shown
    colours = re.findall(rb"\x1b\[[\d;]*?(?:3[0-7]|38;5;\d+|9[0-7])m", shown)
    assert bool(colours) == (not no_color), shown
    assert "━".encode() in shown


def test_a_finished_run_is_not_trained_again(trial) -> None:
    folder, _, _, words = trial
    before = (folder / "runs/a/metrics.jsonl").read_bytes()
    call_well("train", *words, cwd=folder)
    assert (folder / "runs/a/metrics.jsonl").read_bytes() == before


def test_the_diary_tells_of_distillation(trial) -> None:
    folder, *_ = trial
    lines = map(json.loads, (folder / "runs/a/metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert {"class", "bbox", "giou", "skd", "rkd_image", "rkd_batch", "kd_margin"} <= last.keys()
    assert last["kd_regions_per_image"] > 0


def test_a_student_with_a_mask_head_is_trained_and_scored(trial) -> None:
    """Two iterations, masks and distillation together; then boxes and masks are scored."""
    folder, _, val, words = trial
    words = [word for word in words if word not in ("--run", "runs/a")]
    changes = [
        "student.mask_head=true", "student.masks_at_once=3", "optim.epochs=1",
        "optim.lr_drop_epochs=[]", "kd.start_epoch=0", "data.batch_size=10",
    ]  # fmt: skip
    settings = [part for change in changes for part in ("--set", change)]
    call_well("train", *words, *settings, "--run", "runs/masks", cwd=folder)
    last = json.loads((folder / "runs/masks/metrics.jsonl").read_text().splitlines()[-1])
    assert {"dice", "dice.0", "mask_bce", "mask_bce.0", "skd"} <= last.keys()
    checkpoint = load_checkpoint(find_checkpoint(folder / "runs/masks"))
    assert checkpoint.progress.iteration == 2
    assert checkpoint.student["mask_head.linear3.weight"].shape[0] == 441
    printed = call_well("eval", "runs/masks", "--split", val, "--json", "masks.json", cwd=folder)
    scores = json.loads((folder / "masks.json").read_text())
    assert {"AP50_novel", "segm.AP", "segm.AP50_novel"} <= scores.keys()
    assert "segm." in printed
    records = json.loads((folder / scores["files"]["results_segm"]).read_text())
    assert records
    assert all("bbox" not in record for record in records)
    again = call_well(
        "eval", "--predictions", scores["files"]["results_segm"], "--split", val,
        "--evaluator", "official", "--json", "-", cwd=folder,
    )  # fmt: skip
    assert json.loads(again)["segm.AP"] == pytest.approx(scores["segm.AP"], abs=1e-12)


def test_cache_teacher_again_makes_nothing(trial) -> None:
    folder, train, _, _ = trial
    before = (folder / "cache/trial/COMPLETE.json").read_bytes()
    call_well(
        "cache-teacher", "--split", train, "--out", "cache/trial", "--teacher", "pictograms",
        "--experiment", "trial", "--fit-epochs", "1", "--keep", "12", "--prompts", "single",
        *TINY, cwd=folder,
    )  # fmt: skip
    assert (folder / "cache/trial/COMPLETE.json").read_bytes() == before


def test_verify_finds_nothing_and_info_names_the_teacher(trial) -> None:
    folder, *_ = trial
    assert "no problem found" in call_well("cache", "verify", "cache/trial", cwd=folder)
    assert "teacher" in call_well("cache", "info", "cache/trial", cwd=folder)


def test_other_settings_in_the_same_run_are_refused(trial) -> None:
    folder, _, _, words = trial
    refused = call("train", *words, "--set", "optim.lr=0.1", cwd=folder)
    assert refused.returncode == 4
    assert "optim.lr" in refused.stderr


def test_a_cache_of_another_teacher_is_refused(trial) -> None:
    folder, train, _, _ = trial
    refused = call(
        "cache-teacher", "--split", train, "--out", "cache/trial", "--teacher", "RN50:random",
        "--experiment", "trial", "--fit-epochs", "1", "--keep", "12", "--prompts", "single",
        *TINY, cwd=folder,
    )  # fmt: skip
    assert refused.returncode == 4
    assert "teacher" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_stopped_by_sigterm_equals_one_that_was_never_stopped(trial) -> None:
    """Stopped in the burn-in epoch, with dropout on: weights and optimiser end bitwise equal."""
    folder, *_ = trial
    words = ("--cache", "cache/trial", "--experiment", "trial", *TINY, "--set",
             "student.dropout=0.1", "--set", "checkpoint_every_s=0")  # fmt: skip
    call_well("train", *words, "--run", "runs/whole", cwd=folder)
    command = start_dkdetr("train", *words, "--run", "runs/cut", cwd=folder)
    while not list((folder / "runs/cut").glob("checkpoints/*.json")):
        assert command.poll() is None, "ended before its first checkpoint"
        time.sleep(0.02)
    command.terminate()
    _, message = command.communicate()
    assert command.returncode == 75, message
    cut = load_checkpoint(find_checkpoint(folder / "runs/cut"))
    assert f"iteration {cut.progress.iteration}" in message
    call_well("train", *words, "--run", "runs/cut", cwd=folder)
    whole, resumed = (
        load_checkpoint(find_checkpoint(folder / "runs" / name)) for name in ("whole", "cut")
    )
    assert cut.progress.iteration < whole.progress.iteration == resumed.progress.iteration
    assert all(torch.equal(resumed.student[name], whole.student[name]) for name in whole.student)
    for index, state in whole.optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(resumed.optimizer["state"][index][name], value)


def test_an_unsealed_cache_is_refused(trial, tmp_path) -> None:
    folder, *_ = trial
    shutil.copytree(folder / "cache/trial", tmp_path / "c")
    (tmp_path / "c" / "COMPLETE.json").unlink()
    refused = call("train", "--cache", str(tmp_path / "c"), "--experiment", "trial", cwd=tmp_path)
    assert refused.returncode == 4
    assert "cache-teacher" in refused.stderr


def test_a_random_teacher_is_named_by_every_reader(trial, tmp_path) -> None:
    folder, train, val, _ = trial
    # The smallest architecture that open_clip names.
    words = ("cache-teacher", "--split", train, "--out", "random", "--teacher",
             "ViT-S-32-alt:random", "--proposals", "fit:cache/trial", "--keep", "2", "--prompts",
             "single")  # fmt: skip
    assert "RANDOM" in call_well(*words, cwd=folder)
    assert "RANDOM" in call_well("cache", "info", "random", cwd=folder)
    done = call("train", "--cache", "random", "--experiment", "trial", "--run", "runs/random",
                *TINY, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "RANDOM TEACHER" in done.stderr
    scored = call("eval", "runs/random", "--split", val, cwd=folder)
    assert scored.returncode == 0, scored.stderr
    assert "RANDOM TEACHER" in scored.stderr


@pytest.mark.skipif("DKDETR_TEST_COCO" not in os.environ, reason="names no COCO folder")
def test_the_three_commands_on_real_photographs(tmp_path) -> None:
    coco = Path(os.environ["DKDETR_TEST_COCO"])
    part = {
        name: f"ovcoco:{coco / name}:{coco / 'annotations' / f'instances_{name}.json'}"
        for name in ("train2017", "val2017")
    }
    call_well(
        "cache-teacher", "--split", part["train2017"], "--out", "cache/coco", "--teacher",
        "pictograms", "--experiment", "trial", "--fit-epochs", "1", "--keep", "20", "--prompts",
        "single", *TINY, cwd=tmp_path,
    )  # fmt: skip
    call_well("train", "--cache", "cache/coco", "--experiment", "trial", *TINY, cwd=tmp_path)
    call_well("eval", "--split", part["val2017"], "--json", "scores.json", cwd=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_images"] > 0


@pytest.mark.parametrize("setting", ["kd.alignment=online", "kd.skd.loss=centred"])
def test_options_that_ask_more_of_the_cache(trial, setting: str) -> None:
    """The teacher itself, and the mean of its embeddings."""
    folder, *_ = trial
    words = ("--cache", "cache/trial", "--experiment", "trial", *TINY)
    call_well("train", *words, "--set", setting, "--run", f"runs/{setting}", cwd=folder)
    last = json.loads((folder / f"runs/{setting}/metrics.jsonl").read_text().splitlines()[-1])
    assert last["kd_regions_per_image"] > 0
    assert last["skd"] > 0
