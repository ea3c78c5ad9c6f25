"""SIGTERM at any moment: saved without the loss of a step, exit code 75, and resumable."""

import json
import random
import subprocess
import sys

import pytest

from dkdetr.engine.checkpoint import load_latest
from dkdetr.engine.train import train
from dkdetr.experiment_file import dump_toml
from tests.e2e.commands import ROOT
from tests.training_world import make_world, settings

EPOCHS = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    for workers in (0, 1):
        (world.root / f"workers{workers}.toml").write_text(dump_toml(config(workers)))
    return world


def config(workers: int):
    return settings(
        name="stopped",
        optim={"epochs": EPOCHS, "lr_drop_epochs": []},
        kd={"start_epoch": 3},
        data={"workers": workers},
    )


@pytest.fixture(scope="module")
def stopper(world):
    """Yields `stop(run, after_s, workers, after_steps)`: an exit code, and how many steps it did.

    The seconds are counted from the steps on.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.train_stopper"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def stop(run: str, after_s: float, workers: int = 0, after_steps: int = 0) -> tuple[int, int]:
        steps = world.root / f"{run}.steps"
        words = ["--cache", world.cache, "--experiment", world.root / f"workers{workers}.toml",
                 "--run", world.root / "runs" / run, "--device", "cpu"]  # fmt: skip
        trial = {"words": [*map(str, words)], "steps_file": str(steps), "after_s": after_s,
                 "after_steps": after_steps}  # fmt: skip
        process.stdin.write(json.dumps(trial) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return code, len(steps.read_bytes()) if steps.is_file() else 0

    yield stop
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0


def judge(world, run: str, code: int, steps: int) -> None:
    assert code == 75, run
    found = load_latest(world.root / "runs" / run / "checkpoints")
    saved = 0 if found is None else found[1].progress.iteration
    assert saved == steps, run


def _moments(count: int, seed: int) -> list[tuple[float, int]]:
    """A third at start-up, a third in training, a third while a loader process starts."""
    draw = random.Random(seed)
    ranges = ((0.0, 0.2, 0), (0.2, 2.0, 0), (0.1, 6.0, 1))
    return [
        (draw.uniform(low, high), workers)
        for number in range(count)
        for low, high, workers in [ranges[number % 3]]
    ]


def test_a_few_moments(world, stopper) -> None:
    for number, (after_s, after_steps) in enumerate(((0.0, 0), (0.05, 0), (0.0, 7))):
        run = f"few {number}"
        judge(world, run, *stopper(run, after_s, after_steps=after_steps))
    done = train(world.request("few 2", config(0), until_epoch=20))
    assert done.iterations == 60


@pytest.mark.slow
def test_fifty_random_moments(world, stopper) -> None:
    for number, (after_s, workers) in enumerate(_moments(50, seed=0)):
        run = f"moment {number}"
        judge(world, run, *stopper(run, after_s, workers))
