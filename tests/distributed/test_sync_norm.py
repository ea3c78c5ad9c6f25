"""Batch norm over two gloo ranks, of unequal maps, is torch's batch norm of everything at once."""

import pytest

from tests.distributed.two_ranks import found_by_two_ranks


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    return found_by_two_ranks("sync_norm_ranks.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", ["plain", "compiled", "kernels"])
def test_ranks_are_one_process(by_rank, way: str):
    """Results, gradients of maps and parameters, and running statistics, over three steps."""
    for rank in by_rank:
        assert rank[way].keys() == {"output", "input", "parameters", "buffers"}
        assert max(rank[way].values()) < 1e-10, rank[way]


def test_statistics_of_half_precision_are_float32_and_maps_stay_half(by_rank):
    for rank in by_rank:
        assert rank["half"]["type"] == "torch.bfloat16"
        assert rank["half"]["mean"] < 1e-6
        assert rank["half"]["variance"] < 1e-6


def test_a_compiled_student_is_one_graph_in_ddp_and_learns_the_same(by_rank):
    for rank in by_rank:
        assert rank["student"]["breaks"] == 0
        assert rank["student"]["difference"] < 1e-5


def test_running_statistics_are_the_same_bits_on_each_rank(by_rank):
    one, two = (rank["student"]["buffers"] for rank in by_rank)
    assert one == two


def test_ddp_makes_buffers_equal_once_and_keeps_gradients_in_its_buckets(by_rank):
    """After two passes of plain batch norm each rank's statistics are of its own pictures."""
    for rank in by_rank:
        wrapped = rank["wrapped"]
        assert wrapped["at_start"] == 0
        assert wrapped["own"]
        assert wrapped["pieces"] < 0.1 * wrapped["gradients"]
