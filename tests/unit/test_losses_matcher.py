"""The matcher: by hand, and its candidate set against the full assignment."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny_student import boxes_inside

from dkdetr.errors import NonFiniteLossError
from dkdetr.losses import assignment, matcher
from dkdetr.losses.matcher import match
from dkdetr.losses.matching_cost import MatchingCosts, PairCosts, Stage
from dkdetr.structures import Targets

COSTS = MatchingCosts(cost_class=2, cost_bbox=5, cost_giou=2, focal_alpha=0.25, focal_gamma=2)
BOX_ONLY = MatchingCosts(cost_class=0, cost_bbox=1, cost_giou=0, focal_alpha=0.25, focal_gamma=2)


def at(*centres: float) -> torch.Tensor:
    return torch.tensor([[centre, 0.5, 0.2, 0.2] for centre in centres])


def matching_cost(
    logits: torch.Tensor, boxes: torch.Tensor, target: Targets, costs: MatchingCosts
) -> torch.Tensor:
    """[queries, targets] of one image."""
    price = PairCosts([Stage(logits[None, None], boxes[None, None])], costs)
    return price(target.labels, target.boxes_cxcywh, torch.zeros_like(target.labels)).T


def match_image(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    target: Targets,
    costs: MatchingCosts,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query, target) indices of one image."""
    valid = None if allowed is None else allowed[None]
    matches = match(logits[None], boxes[None], [target], costs, valid=valid)
    return matches.query_index, matches.target_index


def test_the_whole_is_cheaper_than_greed():
    """The query at .42 must leave the nearer target to the one at .10, which is far from both."""
    target = Targets(torch.tensor([0, 0]), at(0.40, 0.50))
    query, number = match_image(torch.zeros(3, 1), at(0.42, 0.10, 0.90), target, BOX_ONLY)
    # .42 is nearest to both; giving it to .50 costs .08 + .30, to .40 costs .02 + .40.
    assert dict(zip(query.tolist(), number.tolist(), strict=True)) == {0: 1, 1: 0}


def test_cost_by_hand():
    logits = torch.tensor([[0.0, 9.0]])
    target = Targets(torch.tensor([0]), at(0.5))
    # Class: p = 1/2, .25 * .25 * ln 2 - .75 * .25 * ln 2 = -.125 ln 2.
    # Boxes 0.1 apart: L1 .1; IoU (.1 * .2) / (.08 - .02) = 1/3, hull .3 * .2 holds .06 of union.
    cost = matching_cost(logits, at(0.6), target, COSTS).item()
    assert cost == pytest.approx(2 * -0.125 * 0.6931472 + 5 * 0.1 - 2 / 3, rel=1e-5)


def test_labels_pick_their_own_column():
    """Whether there are fewer classes than targets or more."""
    logits = torch.tensor([[3.0, -3.0, 0.0], [-3.0, 3.0, 0.0]])
    alone = [
        matching_cost(logits, at(0.5, 0.6), Targets(torch.tensor([label]), at(0.5)), COSTS)
        for label in (1, 0, 2, 1)
    ]
    target = Targets(torch.tensor([1, 0, 2, 1]), at(0.5, 0.5, 0.5, 0.5))
    together = matching_cost(logits, at(0.5, 0.6), target, COSTS)
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_indices_run_through_the_batch():
    targets = [
        Targets(torch.tensor([0]), at(0.3)),
        Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)),
        Targets(torch.tensor([0, 0]), at(0.8, 0.2)),
    ]
    boxes = torch.stack([at(0.9, 0.3), at(0.5, 0.5), at(0.2, 0.8)])
    matches = match(torch.zeros(3, 2, 1), boxes, targets, BOX_ONLY)
    assert matches.image_index.tolist() == [0, 2, 2]
    assert matches.query_index.tolist() == [1, 0, 1]
    assert matches.target_index.tolist() == [0, 2, 1]


@pytest.mark.parametrize("seed", range(4))
def test_candidates_hold_the_optimum(seed: int, monkeypatch: pytest.MonkeyPatch):
    """400 random cases over the four seeds, some with ties and with queries not allowed."""
    solved_sizes: list[int] = []

    def spy(cost):
        solved_sizes.append(len(cost))
        return linear_sum_assignment(cost)

    monkeypatch.setattr(assignment, "linear_sum_assignment", spy)
    generator = torch.Generator().manual_seed(seed)
    reduced = 0
    for case in range(100):
        num_targets = int(torch.randint(1, 8, (), generator=generator))
        num_queries = int(torch.randint(20, 300, (), generator=generator))
        logits = torch.randn(num_queries, 3, generator=generator)
        boxes = boxes_inside(num_queries, seed=case)
        target = Targets(
            torch.randint(3, (num_targets,), generator=generator),
            boxes_inside(num_targets, seed=case + 1000),
        )
        if case % 3 == 0:  # a grid of values: many equal costs
            logits, boxes = logits.round(), (boxes * 4).round() / 4 + 0.05
        allowed = torch.rand(num_queries, generator=generator) < 0.9
        query, number = match_image(logits, boxes, target, COSTS, allowed)
        cost = matching_cost(logits, boxes, target, COSTS).double()
        full = cost[allowed].numpy()
        row, column = linear_sum_assignment(full)
        assert cost[query, number].sum().item() == pytest.approx(full[row, column].sum(), abs=1e-9)
        assert allowed[query].all()
        assert sorted(number.tolist()) == list(range(num_targets))
        reduced += solved_sizes[-1] < int(allowed.sum())
    assert reduced > 50


def test_more_targets_than_queries_leaves_some_targets_alone():
    target = Targets(torch.tensor([0, 0, 0]), at(0.1, 0.5, 0.9))
    query, number = match_image(torch.zeros(1, 1), at(0.45), target, BOX_ONLY)
    assert (query.tolist(), number.tolist()) == ([0], [1])
    nobody = torch.zeros(1, dtype=torch.bool)
    query, _ = match_image(torch.zeros(1, 1), at(0.45), target, BOX_ONLY, nobody)
    assert len(query) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_output_is_named(bad: float):
    target = Targets(torch.tensor([0]), at(0.5))
    boxes = at(*[0.5] * 50)
    boxes[7] = bad
    with pytest.raises(NonFiniteLossError, match="not finite"):
        match_image(torch.zeros(50, 1), boxes, target, COSTS)


@pytest.mark.parametrize("num_queries", [7, 300, 3000])
def test_of_equal_costs_the_earlier_queries_are_taken(
    num_queries: int, monkeypatch: pytest.MonkeyPatch
):
    """On a device, too, whose topk prefers the later of equals; boxes of five kinds: most are."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(5, (num_queries,), generator=generator)
    boxes = at(0.1, 0.3, 0.5, 0.7, 0.9)[kinds]
    target = Targets(torch.zeros(4, dtype=torch.long), at(0.3, 0.3, 0.5, 0.62))
    cost = matching_cost(torch.zeros(num_queries, 1), boxes, target, BOX_ONLY)
    wanted = cost.sort(dim=0, stable=True).indices[:4].sort(dim=0).values
    topk = torch.Tensor.topk

    def from_behind(tensor: torch.Tensor, k: int, dim: int, largest: bool):
        values, places = topk(tensor.flip(dim), k, dim, largest)
        return torch.return_types.topk((values, tensor.shape[dim] - 1 - places))

    for patch in (False, True):
        if patch:
            monkeypatch.setattr(torch.Tensor, "topk", from_behind)
        costs, found = matcher._smallest(cost.T[:, None], 4)
        assert torch.equal(found.long().sort(dim=-1).values[:, 0].T, wanted)
        assert torch.equal(costs[:, 0].T, cost.sort(dim=0).values[:4])
        query, _ = match_image(torch.zeros(num_queries, 1), boxes, target, BOX_ONLY)
        assert set(query.tolist()) <= set(wanted.flatten().tolist())
