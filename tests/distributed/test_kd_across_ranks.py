"""Two gloo ranks: relations gathered across them are one process's, and no option hangs them."""

import pytest
from step_options import OPTIONS

from tests.distributed.two_ranks import found_by_two_ranks


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    return found_by_two_ranks("kd_ranks.py", tmp_path_factory.mktemp("ranks"))


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
