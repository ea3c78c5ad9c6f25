"""One-to-one matching of queries to ground truth (Hungarian algorithm, method A.3).

Costs are computed where the student's output lies. However many layers are matched, they go to the
CPU in one copy and the pairs come back in one. Between `send_costs` and `assign` a GPU may be given
work that needs no pairs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dkdetr.losses.assignment import assign_candidates
from dkdetr.losses.matching_cost import MatchingCosts, PairCosts, Stage, TargetRows
from dkdetr.structures import Targets

PAIRS_AT_ONCE = 2**22
"""Costs computed together on a GPU: 0.36 GB stand in memory, as one image of 300 objects took by
itself. (Eight images of a dozen objects at 1024 pixels have 2 million pairs.)"""
PAIRS_IN_CACHE = 2**17
"""The same on a CPU, where more would go through its memory time and again."""


@dataclass(frozen=True)
class Matches:
    """Matched pairs of a layer, concatenated over images: which image, which query, which target.

    `target_index` counts through the batch's targets laid end to end.
    """

    image_index: Int[Tensor, "num_pairs"]
    query_index: Int[Tensor, "num_pairs"]
    target_index: Int[Tensor, "num_pairs"]


@dataclass(frozen=True)
class StageMatches:
    """Matched pairs of a stage: every layer has as many, whatever they are.

    `place` counts through the queries of the stage's layers and images laid end to end.
    """

    image_index: Int[Tensor, "num_layers num_pairs"]
    query_index: Int[Tensor, "num_layers num_pairs"]
    target_index: Int[Tensor, "num_layers num_pairs"]
    place: Int[Tensor, "num_layers num_pairs"]

    def of_layer(self, layer: int) -> Matches:
        """Returns the pairs of one layer."""
        return Matches(self.image_index[layer], self.query_index[layer], self.target_index[layer])


@dataclass(frozen=True)
class SentCosts:
    """Costs of candidates on their way to the CPU, and what they are of."""

    stages: Sequence[Stage]
    counts: tuple[int, ...]
    shapes: Sequence[tuple[int, ...]]
    numbers: Tensor
    wait: Callable[[], None] | None

    def arrays(self) -> list[NDArray[np.floating]]:
        """Returns the numbers, part by part; waits until they are there."""
        if not self.shapes:
            return []
        if self.wait is not None:
            self.wait()
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = np.split(self.numbers.numpy(), ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@torch.no_grad()
def send_costs(stages: Sequence[Stage], targets: TargetRows, costs: MatchingCosts) -> SentCosts:
    """Returns the costs of each target's cheapest queries, on their way; nobody waits for them."""
    parts = [part for each in _cheapest_of(stages, targets, costs) for part in each]
    shapes = [tuple(part.shape) for part in parts]
    if not parts:
        return SentCosts(stages, targets.counts, shapes, torch.zeros(0), None)
    together = torch.cat([part.flatten() for part in parts])
    numbers = together.to("cpu", non_blocking=True)  # into page-locked memory
    wait = None
    if together.is_cuda:
        wait = torch.cuda.current_stream(together.device).record_event().synchronize
    return SentCosts(stages, targets.counts, shapes, numbers, wait)


def assign(sent: SentCosts) -> list[StageMatches]:
    """Returns the cheapest one-to-one matching of each stage, layer and image.

    Raises:
        NonFiniteLossError: a cost is NaN or infinite.
    """
    arrays = sent.arrays()
    # Two arrays a stage, chunk after chunk of targets.
    step = 2 * len(sent.stages)
    solved: list[NDArray[np.int64]] = []
    for number, stage in enumerate(sent.stages):
        nothing = np.zeros((0, len(stage.logits), 0))
        parts = [arrays[2 * number + which :: step] for which in (0, 1)]
        cost, query = (np.concatenate(part) if part else nothing for part in parts)
        solved.append(
            assign_candidates(
                cost,
                query.astype(np.int64),
                sent.counts,
                num_queries=stage.logits.shape[2],
                repeats=stage.repeats,
            )
        )
    return _sent_back(solved, sent.stages[0].logits.device)


def match(
    logits: Float[Tensor, "batch num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "batch num_queries 4"],
    targets: Sequence[Targets],
    costs: MatchingCosts,
    *,
    valid: Bool[Tensor, "batch num_queries"] | None = None,
) -> Matches:
    """Returns the cheapest one-to-one matching of each image's targets to one layer's queries.

    Raises:
        NonFiniteLossError: a cost is NaN or infinite.
    """
    stage = Stage(logits[None], boxes_cxcywh[None], valid)
    return assign(send_costs([stage], TargetRows.of(targets), costs))[0].of_layer(0)


def _cheapest_of(
    stages: Sequence[Stage], targets: TargetRows, costs: MatchingCosts
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, for some targets at a time and each stage, the cheapest queries of each target.

    (costs [targets, layers, k], numbers of the queries [targets, layers, k]), where k is how many
    queries the targets of the fullest image want, or all queries, if they are fewer: a target
    assigned outside its image's M cheapest could always take a free one of them, so an optimum of
    the whole lies in these. Costs that are not finite come first, as minus infinity; queries that
    are not allowed last, as infinity.
    """
    if not sum(targets.counts):
        return
    price, image_index = PairCosts(stages, costs), targets.image_index()
    layers = [len(stage.logits) * stage.logits.shape[2] for stage in stages]
    at_once = PAIRS_AT_ONCE if image_index.is_cuda else PAIRS_IN_CACHE
    at_once = max(1, at_once // sum(layers))
    parts = (
        torch.split(tensor, at_once)
        for tensor in (targets.labels, targets.boxes_cxcywh, image_index)
    )
    for labels, boxes, images in zip(*parts, strict=True):
        cost = price(labels, boxes, images).nan_to_num(
            -torch.inf, posinf=-torch.inf, neginf=-torch.inf
        )
        for stage, columns in zip(stages, torch.split(cost, layers, dim=1), strict=True):
            num_layers, _, num_queries = stage.logits.shape[:3]
            rows = columns.view(-1, num_layers, num_queries)
            if stage.valid is not None:
                rows = rows.masked_fill(~stage.valid[images][:, None], torch.inf)
            yield _smallest(rows, min(max(targets.counts) * stage.repeats, num_queries))


def _smallest(
    cost: Float[Tensor, "num_targets num_layers num_queries"], k: int
) -> tuple[Float[Tensor, "num_targets num_layers k"], Float[Tensor, "num_targets num_layers k"]]:
    """Returns (costs, numbers) of the k cheapest queries, cheapest first, the earlier of equals.

    topk leaves open which of several equals it takes, and a GPU takes others than a CPU. So the
    first says only how dear the last one is; the second has numbers that are all different.
    """
    last = cost.topk(k, dim=-1, largest=False).values[..., -1:]
    num_queries = cost.shape[-1]
    place = torch.arange(num_queries, dtype=torch.int32, device=cost.device)
    rank = torch.where(cost < last, place, place + num_queries)
    rank = rank.masked_fill(cost > last, 2 * num_queries)
    query = rank.topk(k, dim=-1, largest=False).values.long() % num_queries
    # The earlier come first, and a stable sort leaves it so among equals.
    ordered, order = cost.gather(-1, query).sort(dim=-1, stable=True)
    return ordered, query.gather(-1, order).to(cost.dtype)


def _sent_back(solved: Sequence[NDArray[np.int64]], device: torch.device) -> list[StageMatches]:
    """Returns matches on a device of what `assign_candidates` gave, without waiting for them."""
    together = torch.as_tensor(np.concatenate([rows.reshape(4, -1) for rows in solved], axis=1))
    if device.type == "cuda":
        together = together.pin_memory()
    together = together.to(device, non_blocking=True)
    sizes = [rows[0].size for rows in solved]
    return [
        StageMatches(*part.view(rows.shape))
        for rows, part in zip(solved, torch.split(together, sizes, dim=1), strict=True)
    ]
