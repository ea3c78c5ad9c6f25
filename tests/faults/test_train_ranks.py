"""A rank that dies or hangs ends the job soon, and the reason is named once."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dkdetr.engine.train import train
from dkdetr.experiment_file import dump_toml
from tests.e2e.commands import ROOT
from tests.faults.ends_of_jobs import end_after, start_job
from tests.faults.faulty_rank import LAST_WORD
from tests.training_world import checkpoint_of, make_world, settings

TIMEOUT_S = 8
CONFIG = settings(
    student={"backbone": {"norm": "frozen"}}, compute={"rank_timeout_s": TIMEOUT_S}, name="ranks"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    (world.root / "ranks.toml").write_text(dump_toml(CONFIG))
    return world


def start(world, fault: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Returns the job, and the file of what it says."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--no-python", "--", sys.executable, "-m", "tests.faults.faulty_rank")  # fmt: skip
    words = ("train", "--cache", str(world.cache), "--experiment", str(world.root / "ranks.toml"),
             "--run", str(world.root / "runs" / fault), "--device", "cpu")  # fmt: skip
    said = world.root / f"{fault}.said"
    return start_job([*torchrun, fault, *words], ROOT, said), said


def processes_of(session: int) -> list[int]:
    """Returns who is still there of a session: nobody should be."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("fault", ["raise", "kill", "stall"])
def test_a_rank_in_trouble_ends_the_job(world, fault) -> None:
    job, said = start(world, fault)
    # The time that the others wait for an answer, and 60 s for the end itself.
    errors = end_after(job, said, LAST_WORD, patience_s=60 + TIMEOUT_S)
    assert job.returncode != 0
    assert processes_of(job.pid) == []
    lines = errors.splitlines()
    # gloo's reason, which we quote, can hold the word too.
    own_words = [line for line in lines if re.match(r"(rank \d: )?error \[", line)]
    kept = world.root / "runs" / fault / "logs"
    assert [log.name for log in kept.iterdir()] == ["rank_1.log"]
    log = (kept / "rank_1.log").read_text()
    assert re.match(r"\S+ rank 1 of 2, cpu, \S+, process \d+\n" + LAST_WORD, log)
    if fault == "raise":
        assert own_words == ["rank 1: error [3]: picture 7 is broken"]
        assert "in _break" in log
        assert log.endswith("DataError: picture 7 is broken\n")
        for line in lines:
            if "lost another rank" in line:  # unless torchrun ends it first
                assert "rank 1, which ended with DataError: picture 7 is broken" in line
    else:
        assert own_words == []
        (lost,) = (line for line in lines if "lost another rank" in line)
        named = re.search(r"rank 1, whose process \d+ is gone", lost)
        assert bool(named) == (fault == "kill")


def test_sigterm_to_torchrun_saves_on_both_ranks_and_one_process_goes_on(world) -> None:
    job, said = start(world, "slow")
    metrics = world.root / "runs" / "slow" / "run.json"
    while not metrics.is_file():
        assert job.poll() is None, said.read_text()
        time.sleep(0.1)
    time.sleep(3)
    job.send_signal(signal.SIGTERM)
    job.wait()
    errors = said.read_text()
    assert errors.count("error [75]: stopped by SIGTERM") == 2, errors
    assert processes_of(job.pid) == []
    log = (world.root / "runs/slow/logs/rank_1.log").read_text()
    assert " stopped by SIGTERM at iteration " in log.splitlines()[-1]
    assert "Traceback" not in log
    cut = checkpoint_of(world, "slow")
    assert 0 <= cut.progress.iteration < 18
    moved = replace(CONFIG, compute=replace(CONFIG.compute, micro_batches=2))
    request = replace(world.request("slow", moved), run=world.root / "runs" / "slow")
    assert train(request).iterations == 18
