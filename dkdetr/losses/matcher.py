"""One-to-one matching of queries to ground truth (Hungarian algorithm, method A.3).

Costs are computed where the student's output lies. However many layers are matched, they go to the
CPU in one copy and the pairs come back in one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dkdetr.boxes import cxcywh_to_xyxy, pairwise_giou
from dkdetr.errors import NonFiniteLossError
from dkdetr.losses.precision import at_least_float32
from dkdetr.structures import Targets


@dataclass(frozen=True)
class MatchingCosts:
    """Weights of the three costs and the focal loss's shape inside the class cost."""

    cost_class: float
    cost_bbox: float
    cost_giou: float
    focal_alpha: float
    focal_gamma: float


@dataclass(frozen=True)
class Matches:
    """Matched pairs of a batch, concatenated over images: which image, which query, which target.

    `target_index` counts through the batch's targets laid end to end.
    """

    image_index: Int[Tensor, "num_pairs"]
    query_index: Int[Tensor, "num_pairs"]
    target_index: Int[Tensor, "num_pairs"]


@dataclass(frozen=True)
class Stage:
    """What is matched to the same targets: the decoder's layers, or the encoder as one layer.

    Attributes:
        logits: class logits; a label indexes their last axis.
        boxes_cxcywh: normalised boxes.
        targets: one an image.
        valid: queries that may be matched; all, if left out.
    """

    logits: Float[Tensor, "num_layers batch num_queries num_classes"]
    boxes_cxcywh: Float[Tensor, "num_layers batch num_queries 4"]
    targets: Sequence[Targets]
    valid: Bool[Tensor, "batch num_queries"] | None = None


@torch.no_grad()
def match_stages(stages: Sequence[Stage], costs: MatchingCosts) -> list[list[Matches]]:
    """Returns the cheapest one-to-one matching of each stage, layer and image.

    Raises:
        NonFiniteLossError: a cost is NaN or infinite.
    """
    parts = [part for stage in stages for pair in _cheapest_of(stage, costs) for part in pair]
    numbers = iter(_in_one_copy(parts))
    pairs = [found for stage in stages for found in _solve(stage, numbers)]
    matches = iter(_sent_back(pairs, stages[0].logits.device))
    return [[next(matches) for _ in range(len(stage.logits))] for stage in stages]


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
    stage = Stage(logits[None], boxes_cxcywh[None], targets, valid)
    return match_stages([stage], costs)[0][0]


def match_image(
    logits: Float[Tensor, "num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "num_queries 4"],
    target: Targets,
    costs: MatchingCosts,
    allowed: Bool[Tensor, "num_queries"] | None = None,
) -> tuple[Int[Tensor, "num_pairs"], Int[Tensor, "num_pairs"]]:
    """Returns (query, target) indices of one image on the CPU, ordered by query."""
    valid = None if allowed is None else allowed[None]
    matches = match(logits[None], boxes_cxcywh[None], [target], costs, valid=valid)
    return matches.query_index.cpu(), matches.target_index.cpu()


def _cheapest_of(stage: Stage, costs: MatchingCosts) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, for each image with targets, the cheapest queries of each target.

    (costs [layers, k, M], numbers of the queries [layers, k, M]), where k = M targets or all
    queries, if they are fewer: a target assigned outside its M cheapest could always take a free
    one of them, so an optimum of the whole lies in these. Costs that are not finite come first,
    as minus infinity; queries that are not allowed last, as infinity.
    """
    for image, target in enumerate(stage.targets):
        num_targets = len(target.labels)
        if num_targets == 0:
            continue
        logits, boxes = stage.logits[:, image], stage.boxes_cxcywh[:, image]
        cost = matching_cost(logits, boxes, target, costs)
        cost = cost.masked_fill(~cost.isfinite(), -torch.inf)
        if stage.valid is not None:
            cost = cost.masked_fill(~stage.valid[image][:, None], torch.inf)
        chosen = _smallest(cost, min(num_targets, cost.shape[1]))
        yield cost.gather(1, chosen), chosen.to(cost.dtype)


def _smallest(
    cost: Float[Tensor, "num_layers num_queries num_targets"], k: int
) -> Int[Tensor, "num_layers k num_targets"]:
    """Returns which k queries are cheapest for each target, the earlier ones of equals.

    topk leaves open which of several equals it takes, and a GPU takes others than a CPU. So the
    first says only how dear the last one is; the second has numbers that are all different.
    """
    last = cost.topk(k, dim=1, largest=False).values[:, -1:]
    num_queries = cost.shape[1]
    place = torch.arange(num_queries, dtype=torch.int32, device=cost.device)[:, None]
    rank = torch.where(cost < last, place, place + num_queries)
    rank = rank.masked_fill(cost > last, 2 * num_queries)
    return rank.topk(k, dim=1, largest=False).values.long() % num_queries


def _in_one_copy(tensors: Sequence[Tensor]) -> list[NDArray[np.floating]]:
    """Returns tensors of one type on the CPU; numbers of queries are exact in float32 too."""
    if not tensors:
        return []
    together = torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    parts = np.split(together, ends[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _sent_back(pairs: Sequence[NDArray[np.int64]], device: torch.device) -> list[Matches]:
    """Returns matches on a device of (image, query, target) rows, without waiting for them."""
    together = torch.as_tensor(np.concatenate(pairs, axis=1))
    if device.type == "cuda":
        together = together.pin_memory()
    together = together.to(device, non_blocking=True)
    matches: list[Matches] = []
    start = 0
    for rows in pairs:
        end = start + rows.shape[1]
        image, query, target = together[:, start:end]
        matches.append(Matches(image, query, target))
        start = end
    return matches


def _solve(stage: Stage, numbers: Iterator[NDArray[np.floating]]) -> Iterator[NDArray[np.int64]]:
    """Yields each layer's (image, query, target) rows, from what `_cheapest_of` gave."""
    nobody = np.zeros((3, 0), np.int64)
    of_layers = [[nobody] for _ in range(len(stage.logits))]
    first_target = 0
    for image, target in enumerate(stage.targets):
        if len(target.labels) == 0:
            continue
        costs, queries = next(numbers), next(numbers).astype(np.int64)
        for found, cost, query in zip(of_layers, costs, queries, strict=True):
            matched, number = _assign(cost, query)
            images = np.full_like(matched, image)
            found.append(np.stack((images, matched, number + first_target)))
        first_target += len(target.labels)
    for found in of_layers:
        yield np.concatenate(found, axis=1)


def _assign(
    cost: NDArray[np.floating], query: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns (query, target) numbers, ordered by query, from what `_cheapest_of` yields.

    Raises:
        NonFiniteLossError: a cost is not finite.
    """
    if np.isneginf(cost).any():
        raise NonFiniteLossError("a matching cost is not finite: the student's output is broken")
    allowed = np.isfinite(cost)
    candidates, row = np.unique(query[allowed], return_inverse=True)
    column = np.nonzero(allowed)[1]
    # What is not among a target's cheapest is never its own: infinite, which scipy understands.
    full = np.full((len(candidates), cost.shape[1]), np.inf)
    full[row, column] = cost[allowed]
    chosen, number = linear_sum_assignment(full)
    return candidates[chosen], number.astype(np.int64)


def matching_cost(
    logits: Float[Tensor, "*layers num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "*layers num_queries 4"],
    target: Targets,
    costs: MatchingCosts,
) -> Float[Tensor, "*layers num_queries num_targets"]:
    """Returns what it costs to give each query each target.

    The class cost is the focal loss of the label said yes minus that of it said no.
    """
    # The labels that occur or, if they are fewer, all: LVIS has 866 columns, the encoder one.
    few_columns = logits.shape[-1] < len(target.labels)
    columns = logits if few_columns else logits[..., target.labels]
    probability = at_least_float32(columns).sigmoid()
    alpha, gamma = costs.focal_alpha, costs.focal_gamma
    yes = alpha * (1 - probability) ** gamma * -(probability + 1e-12).log()
    no = (1 - alpha) * probability**gamma * -(1 - probability + 1e-12).log()
    gain = (yes - no)[..., target.labels] if few_columns else yes - no
    boxes = at_least_float32(boxes_cxcywh)
    wanted = target.boxes_cxcywh.to(boxes.dtype)
    distance = torch.cdist(boxes, wanted, p=1)
    overlap = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return costs.cost_class * gain + costs.cost_bbox * distance - costs.cost_giou * overlap
