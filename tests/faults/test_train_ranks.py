"""A rank that dies or hangs ends the job soon, and the reason is named once."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from dkdetr.engine.train import train
from dkdetr.experiment_file import dump_toml
from tests.e2e.commands import ROOT
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


def start(world, fault: str) -> subprocess.Popen[str]:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--no-python", "--", sys.executable, "-m", "tests.faults.faulty_rank")  # fmt: skip
    words = ("train", "--cache", str(world.cache), "--experiment", str(world.root / "ranks.toml"),
             "--run", str(world.root / "runs" / fault), "--device", "cpu")  # fmt: skip
    return subprocess.Popen(
        [*torchrun, fault, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(session: int) -> list[int]:
    """Returns who is still there of a session: nobody should be."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("fault", ["raise", "kill", "stall"])
def test_a_rank_in_trouble_ends_the_job(world, fault) -> None:
    job = start(world, fault)
    begun = time.monotonic()
    _, errors = job.communicate(timeout=120)
    # Start-up, the time that the others wait for an answer, and 60 s for the end itself.
    assert time.monotonic() - begun < 60 + 20 + TIMEOUT_S
    assert job.returncode != 0
    assert processes_of(job.pid) == []
    lines = errors.splitlines()
    # gloo's reason, which we quote, can hold the word too.
    own_words = [line for line in lines if re.match(r"(rank \d: )?error \[", line)]
    if fault == "raise":
        assert own_words == ["rank 1: error [3]: picture 7 is broken"]
    else:
        assert own_words == []
        assert sum("lost another rank" in line for line in lines) == 1


def test_sigterm_to_torchrun_saves_on_both_ranks_and_one_process_goes_on(world) -> None:
    job = start(world, "slow")
    metrics = world.root / "runs" / "slow" / "run.json"
    while not metrics.is_file():
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    time.sleep(3)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert errors.count("error [75]: stopped by SIGTERM") == 2, errors
    assert processes_of(job.pid) == []
    cut = checkpoint_of(world, "slow")
    assert 0 <= cut.progress.iteration < 18
    moved = replace(CONFIG, compute=replace(CONFIG.compute, micro_batches=2))
    request = replace(world.request("slow", moved), run=world.root / "runs" / "slow")
    assert train(request).iterations == 18
