"""k micro-batches are k ranks: to 1e-6 against one process and against two gloo ranks."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dkdetr.engine.distributed import Ranks
from tests.distributed.grouped_steps import losses_of, part_of, weights_after, whole_batch
from tests.e2e.commands import ROOT

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-6, rtol=0, msg=name)


def test_micro_batches_of_one_process_are_its_whole_batch(tmp_path) -> None:
    """Without dropout and batch relations, the two things that belong to a part by design."""
    whole, halves, quarters = (
        weights_after(ALONE, parts, dropout=0.0, relations=("image",), dumps=tmp_path)
        for parts in (1, 2, 4)
    )
    assert_same(whole, halves)
    assert_same(whole, quarters)


def test_the_normalisers_are_the_group_s(tmp_path) -> None:
    """The comparison above can fail: a batch relation is another number in parts."""
    whole, halves = (
        weights_after(ALONE, parts, dropout=0.0, relations=("batch",), dumps=tmp_path)
        for parts in (1, 2)
    )
    with pytest.raises(AssertionError):
        assert_same(whole, halves)


@pytest.mark.parametrize("alignment", ["cached", "iou"])
def test_regions_that_are_counted_late_divide_their_own_part(tmp_path, alignment) -> None:
    """Cached regions are counted before the step: one number divides both parts."""
    batch = whole_batch(0)
    parts = [part_of(batch, number, 4) for number in (0, 2)]  # of three and four regions
    together = losses_of(parts, alignment=alignment, dumps=tmp_path)
    alone = [losses_of([part], alignment=alignment, dumps=tmp_path) for part in parts]
    for name in ("skd", "rkd_image"):
        mean = sum(each[name] for each in alone) / 2
        assert mean > 0
        assert (together[name] == pytest.approx(mean, rel=1e-9)) == (alignment == "iou")


@contextmanager
def two_ranks(*words: str, out: Path) -> Iterator[None]:
    """Two gloo ranks take the steps of `grouped_steps` beside what is done within."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.distributed.grouped_steps"]
    job = subprocess.Popen(
        [*command, *words, str(out)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    yield
    assert job.wait() == 0


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_micro_batches_are_ranks(tmp_path, parts) -> None:
    """Dropout and batch relations included; four parts on two ranks exchange once a step."""
    out = tmp_path / "ranks.safetensors"
    with two_ranks(str(parts), "0.1", "image,batch", "frozen", out=out):
        alone = weights_after(
            ALONE, parts, dropout=0.1, relations=("image", "batch"), dumps=tmp_path
        )
    assert_same(alone, load_file(out))


def test_ranks_with_synchronised_batch_norm_are_one_process(tmp_path) -> None:
    """Weights and running statistics; each alone, they would be the statistics of two pictures."""
    out = tmp_path / "ranks.safetensors"
    options = {"dropout": 0.0, "relations": ("image",), "dumps": tmp_path}
    with two_ranks("2", "0.0", "image", "sync_batch", out=out):
        alone = weights_after(ALONE, 1, norm="sync_batch", **options)
    assert_same(alone, load_file(out))
    with pytest.raises(AssertionError):
        assert_same(alone, weights_after(ALONE, 2, norm="sync_batch", **options))
