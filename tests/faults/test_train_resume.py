"""A run that was cut anywhere ends bitwise as one that never was."""

import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest

from dkdetr.data.loader import MicroBatches
from dkdetr.data.samplers import BatchPlan, TrainingBatchSampler, uniform_factors
from dkdetr.engine.folder_lock import FolderLockedError, locked_folder
from dkdetr.engine.step import TrainingStep
from dkdetr.engine.train import train
from dkdetr.errors import PreemptedError
from tests.training_world import checkpoint_of, difference, make_world, settings

PARTS = 2
# Burn-in ends at step 6, the rate drops at 12, an epoch has 3 steps, the run 18.
CONFIG = settings(compute={"micro_batches": PARTS})
EDGES = {"start": (0, 0), "epoch": (3, 0), "burn-in": (6, 0), "rate": (12, 0), "part": (7, 1)}


class Crash(Exception):
    """Stands for a kill: nothing of ours catches it, nothing is saved after it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    train(world.request("whole", CONFIG))
    return world


def interrupt(monkeypatch, how, step: int, part: int) -> None:
    """Does `how()` when the part of the step is about to be computed."""
    real_call, real_forward = TrainingStep.__call__, TrainingStep._forward
    now = {"step": -1, "part": -1}

    def call(self, group, *, epoch, iteration):
        now.update(step=iteration, part=-1)
        return real_call(self, group, epoch=epoch, iteration=iteration)

    def forward(self, batch, *rest):
        now["part"] += 1
        if (now["step"], now["part"]) == (step, part):
            how()
        return real_forward(self, batch, *rest)

    monkeypatch.setattr(TrainingStep, "__call__", call)
    monkeypatch.setattr(TrainingStep, "_forward", forward)


def crash() -> None:
    raise Crash


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def cut_and_resume(world, run: str, how, step: int, part: int, *, every_s: float) -> str:
    """Returns the difference to the run that was never cut."""
    config = replace(CONFIG, checkpoint_every_s=every_s)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, how, step, part)
        with pytest.raises((Crash, PreemptedError)):
            train(world.request(run, config))
    train(world.request(run, config))
    return difference(checkpoint_of(world, "whole"), checkpoint_of(world, run))


@pytest.mark.parametrize(
    "edge", [pytest.param(e, marks=[] if e == "part" else pytest.mark.slow) for e in EDGES]
)
def test_sigterm_at_an_edge(world, edge) -> None:
    step, part = EDGES[edge]
    assert cut_and_resume(world, f"term {edge}", terminate, step, part, every_s=1e6) == ""
    # The step that was under way is finished before the save: nothing is done twice.
    saved = sorted((world.root / "runs" / f"term {edge}" / "checkpoints").glob("step_*.pt"))
    assert f"step_{step + 1:08d}.pt" in [path.name for path in saved]


@pytest.mark.parametrize("edge", ["burn-in", pytest.param("part", marks=pytest.mark.slow)])
def test_a_crash_at_an_edge(world, edge) -> None:
    assert cut_and_resume(world, f"crash {edge}", crash, *EDGES[edge], every_s=0.0) == ""


@pytest.mark.slow
def test_a_crash_before_the_first_checkpoint_begins_anew(world) -> None:
    assert cut_and_resume(world, "crash early", crash, 4, 0, every_s=1e6) == ""


@pytest.mark.slow
def test_fifty_random_cuts(world) -> None:
    draw = random.Random(0)
    cuts = [(draw.randrange(18), draw.randrange(PARTS)) for _ in range(50)]
    for number, (step, part) in enumerate(cuts):
        how, every_s = ((terminate, 1e6), (crash, 0.0))[number % 2]
        found = cut_and_resume(world, f"cut {number}", how, step, part, every_s=every_s)
        assert found == "", f"{how.__name__} at step {step}, part {part}: {found}"


def test_the_comparison_sees_a_different_seed(world) -> None:
    train(world.request("other", replace(CONFIG, seed=1)))
    assert difference(checkpoint_of(world, "whole"), checkpoint_of(world, "other")) != ""


def test_a_hundred_random_schedules_show_each_sample_once_an_epoch() -> None:
    """Each start has another number of ranks and of micro-batches and is cut anywhere."""
    draw = random.Random(1)
    for _ in range(100):
        num_images, batch_size, epochs = draw.randrange(24, 90), 24, 3
        factors = uniform_factors(num_images) + np.random.default_rng(num_images).random(num_images)
        seen: list[tuple[int, int]] = []
        pictures: list[tuple[int, int]] = []
        epoch = batch = 0
        while epoch < epochs:
            world_size = draw.choice([1, 2, 3, 4, 8])
            parts = draw.choice([n for n in (1, 2, 3, 4, 6) if batch_size % (n * world_size) == 0])
            streams = []
            for rank in range(world_size):
                plan = BatchPlan(int(factors.sum() + 1e-6), batch_size, rank, world_size)
                sampler = TrainingBatchSampler(
                    factors, plan, seed=5, epochs=epochs, start_epoch=epoch, start_batch=batch
                )
                streams.append(iter(MicroBatches(sampler, parts)))
            left = (epochs - epoch) * plan.batches_per_epoch - batch
            for _ in range(draw.randrange(left + 1)):
                for stream in streams:
                    for _ in range(parts):
                        keys = next(stream)
                        assert len(keys) == batch_size // world_size // parts
                        seen += [(key.epoch, key.position) for key in keys]
                        pictures += [(key.epoch, key.image_index) for key in keys]
                batch += 1
                if batch == plan.batches_per_epoch:
                    epoch, batch = epoch + 1, 0
        per_epoch = plan.batches_per_epoch * batch_size
        assert sorted(seen) == [(e, at) for e in range(epochs) for at in range(per_epoch)]
        # The same pictures, as often, as a run that was never cut and had one rank.
        alone = BatchPlan(int(factors.sum() + 1e-6), batch_size, 0, 1)
        whole = TrainingBatchSampler(
            factors, alone, seed=5, epochs=epochs, start_epoch=0, start_batch=0
        )
        assert sorted(pictures) == sorted((k.epoch, k.image_index) for b in whole for k in b)


def test_another_number_of_loader_processes_changes_nothing(world) -> None:
    train(world.request("workers", CONFIG, until_iteration=5))
    moved = replace(CONFIG, data=replace(CONFIG.data, workers=2))
    train(world.request("workers", moved, until_iteration=10))
    train(world.request("workers", CONFIG))
    found, wanted = checkpoint_of(world, "workers"), checkpoint_of(world, "whole")
    assert difference(found, wanted) == ""


def test_a_second_training_in_a_run_s_folder_is_refused(world) -> None:
    """Each would delete what the other saved later."""
    done = checkpoint_of(world, "whole")
    with (
        locked_folder(world.root / "runs" / "whole", ""),
        pytest.raises(FolderLockedError, match="another training is at work") as caught,
    ):
        train(world.request("whole", CONFIG))
    assert caught.value.exit_code == 7
    assert difference(checkpoint_of(world, "whole"), done) == ""
    assert train(world.request("whole", CONFIG)).iterations == done.progress.iteration
