"""Two gloo ranks: relations gathered across them are one process's, and no option hangs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from step_options import OPTIONS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(ROOT / "tests/distributed/kd_ranks.py"), str(out)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["gathered", "gathered, cross only, reverse"])
def test_gathered_relations_have_the_value_and_the_gradient_of_one_process(by_rank, name):
    for rank in by_rank:
        difference = rank["gather"][name]
        assert difference["largest_gradient"] > 1e-2
        assert difference["loss"] < 1e-11
        assert difference["gradient"] < 1e-10


@pytest.mark.parametrize("name", OPTIONS)
def test_a_rank_without_boxes_or_regions_harms_nobody(by_rank, name):
    one, two = (rank["options"][name] for rank in by_rank)
    assert one["finite"]
    assert two["finite"]
    assert one["weights"] == two["weights"]


def test_one_vote_is_heard_by_all_and_none_by_nobody(by_rank):
    assert [rank["votes"] for rank in by_rank] == [[True, True, False]] * 2
