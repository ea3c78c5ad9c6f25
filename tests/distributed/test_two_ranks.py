"""Two gloo ranks train the same student as one process."""

import json
import sys

import pytest
import torch

from dkdetr.engine.checkpoint import find_checkpoint, load_checkpoint
from tests.e2e.commands import DKDETR, call_well, run_command
from tests.e2e.small_coco import write_coco_folder
from tests.faults.faulty_rank import LAST_WORD

# What a rank computes alone must not depend on the rest of the batch: no batch statistics, no
# relations across images.
SETTINGS = [
    "--experiment", "trial", "--set", "optim.epochs=2", "--set", "optim.lr_drop_epochs=[1]",
    "--set", "data.image_size=96", "--set", "data.batch_size=4", "--set", "student.num_queries=12",
    "--set", "kd.start_epoch=1", "--set", "student.backbone.norm=frozen",
    "--set", "kd.rkd.relations=[\"image\"]",
]  # fmt: skip


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    split = write_coco_folder(folder, "train2017", num_images=12, seed=3)
    call_well(
        "cache-teacher", "--split", split, "--out", "c", "--teacher", "pictograms", "--prompts",
        "single", "--keep", "8", "--fit-epochs", "1", *SETTINGS, cwd=folder,
    )  # fmt: skip
    words = ("train", "--cache", "c", *SETTINGS, "--device", "cpu")
    call_well(*words, "--run", "one", cwd=folder)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--no-python", "--")  # fmt: skip
    speaking = (sys.executable, "-m", "tests.faults.faulty_rank", "speak")
    scored = ("--eval-every", "1", "--eval-split", split, "--until", "1")
    norms = ("--set", "student.backbone.norm=batch", "--run", "norms")
    for program, more in ((speaking, ("--run", "two")), (DKDETR, (*norms, *scored))):
        done = run_command([*torchrun, *program, *words, *more], folder)
        assert done.returncode == 0, done.stderr
    call_well("eval", "norms", "--split", split, "--device", "cpu", cwd=folder)
    return folder


def test_the_students_are_the_same(two_runs) -> None:
    one, two = (load_checkpoint(find_checkpoint(two_runs / name)) for name in ("one", "two"))
    assert one.progress == two.progress
    for name, weights in one.student.items():
        torch.testing.assert_close(two.student[name], weights, atol=2e-4, rtol=2e-3, msg=name)


def test_the_first_rank_alone_keeps_the_diary(two_runs) -> None:
    diaries = [(two_runs / name / "metrics.jsonl").read_text() for name in ("one", "two")]
    rows = [[json.loads(line) for line in diary.splitlines()] for diary in diaries]
    assert [row["iteration"] for row in rows[0]] == [row["iteration"] for row in rows[1]]


def test_what_another_rank_says_is_kept_in_the_run_s_folder(two_runs) -> None:
    (log,) = (two_runs / "two/logs").iterdir()
    head, word = log.read_text().splitlines()
    assert log.name == "rank_1.log"
    assert " rank 1 of 2, cpu, " in head
    assert word == LAST_WORD
    assert not (two_runs / "norms/logs").exists()  # nothing to say, no file


def test_ranks_score_as_they_train_what_eval_scores(two_runs) -> None:
    """One process loads what the first rank saved; the second one's norms are others."""
    lines = map(json.loads, (two_runs / "norms/metrics.jsonl").read_text().splitlines())
    trained, alone = [{**line, "time": 0} for line in lines if line["kind"] == "eval"]
    assert trained == alone
    assert trained["epoch"] == 1
