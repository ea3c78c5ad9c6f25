"""Kills inside a save: the newest complete checkpoint always loads, and there are always two."""

import random

import pytest
import torch

from dkdetr.engine.checkpoint import load_checkpoint, load_latest
from dkdetr.errors import CorruptArtefactError

POINTS = [
    f"checkpoint.{name}:{hit}"
    for name in ("before_data", "before_rename", "before_marker", "after_marker", "before_prune")
    for hit in (1, 3)
]


def whole_ones(folder) -> list[int]:
    found = []
    for path in folder.glob("step_*.pt"):
        try:
            found.append(load_checkpoint(path).progress.iteration)
        except CorruptArtefactError:
            continue
    return sorted(found)


def check(folder, returned: int, before: int) -> int:
    """Returns the newest whole checkpoint's iteration after judging the folder."""
    found = load_latest(folder)
    newest = 0 if found is None else found[1].progress.iteration
    assert newest >= max(returned, before)
    if found is not None:
        assert torch.equal(
            found[1].student["weight"], torch.full_like(found[1].student["weight"], float(newest))
        )
    if newest >= 2:
        assert len(whole_ones(folder)) >= 2
    return newest


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_a_named_point(tmp_path, saver, point) -> None:
    newest = check(tmp_path, saver(tmp_path, point), 0)
    newest = check(tmp_path, saver(tmp_path, point), newest)
    assert not list(tmp_path.glob(".*.partial")) or "rename" in point
    saver(tmp_path, "checkpoint.before_data:4")
    assert not list(tmp_path.glob(".*.partial"))  # the next save sweeps


def _kill_at_random(folder, saver, kills: int, seed: int) -> None:
    draw, newest = random.Random(seed), 0
    for _ in range(kills):
        newest = check(folder, saver(folder, kill_after_s=draw.uniform(0.001, 0.06)), newest)
    assert newest >= kills  # each had one save that returned, at least


def test_kills_at_random_moments(tmp_path, saver) -> None:
    _kill_at_random(tmp_path, saver, kills=15, seed=0)


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments(tmp_path, saver) -> None:
    _kill_at_random(tmp_path, saver, kills=100, seed=1)
