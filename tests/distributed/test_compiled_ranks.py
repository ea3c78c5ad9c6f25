"""On two gloo ranks a compiled student under bf16 autocast learns what an eager one does."""

import pytest

from tests.distributed.two_ranks import found_by_two_ranks

# Two compilations at once: most of a minute (`make distributed`).
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    return found_by_two_ranks("compiled_ranks.py", tmp_path_factory.mktemp("ranks"))


def test_gradients_are_the_same_bits_on_both_ranks(by_rank) -> None:
    one, two = ([step["gradient"] for step in rank] for rank in by_rank)
    assert one == two
    assert len(set(one)) == len(one)


def test_a_compiled_student_s_gradients_are_the_eager_one_s(by_rank) -> None:
    """To an eighth of what half precision itself rounds: the order of sums is not the same."""
    for step in (step for rank in by_rank for step in rank):
        found, wanted = step["losses"]
        assert found == pytest.approx(wanted, rel=1e-4)
        assert step["to_eager"] < step["half_to_float32"] / 8, step


def test_two_ranks_are_one_process_with_everybody_s_pictures(by_rank) -> None:
    """Roundings differ, so that in a step an object may be matched otherwise; never in all."""
    for rank in by_rank:
        shares = [step["to_joined"] / step["half_to_float32"] for step in rank]
        assert min(shares) < 1 / 8, shares
        assert max(shares) < 2, shares


def test_it_is_traced_once_cut_where_ddp_exchanges_and_never_compiled_again(by_rank) -> None:
    for rank in by_rank:
        assert [step["traced"] for step in rank] == [1] * len(rank)
        assert [step["breaks"] for step in rank] == [0] * len(rank)
        pieces = {step["compiled"] for step in rank}
        assert len(pieces) == 1
        assert pieces.pop() > 1
