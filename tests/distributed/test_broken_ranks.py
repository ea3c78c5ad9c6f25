"""Where batch statistics are joined, what breaks on a rank breaks all: the one at fault speaks."""

import pytest

from tests.distributed.two_ranks import found_by_two_ranks


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    return found_by_two_ranks("broken_ranks.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("pixel", "image;"),
        ("overflow", "output of trunk.backbone.stem.0;"),
        ("overflow, compiled", "output of trunk.backbone.stem.0;"),
    ],
)
def test_the_rank_where_it_began_names_its_pictures_and_the_other_none(
    by_rank, name: str, tensor: str
) -> None:
    one, two = (rank[name] for rank in by_rank)
    assert one["error"] == "PeerFailedError", one
    assert two["error"] == "NonFiniteLossError"
    assert f"first bad tensor: {tensor} images [10, 11]" in two["words"]
    assert "other ranks' images" not in two["words"]


def test_what_every_rank_has_is_said_by_every_rank(by_rank) -> None:
    for rank in by_rank:
        assert rank["weight"]["error"] == "NonFiniteLossError"
        assert "weight trunk.level_embeddings" in rank["weight"]["words"]


def test_a_gradient_that_broke_under_finite_losses_is_said_once_and_blames_nobody(by_rank) -> None:
    one, two = (rank["gradient"] for rank in by_rank)
    assert two["error"] == "PeerFailedError"
    assert "gradient of" in one["words"]
    assert "This rank alone is not broken: other ranks' images may have done it" in one["words"]
