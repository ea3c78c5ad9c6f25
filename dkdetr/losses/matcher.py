"""One-to-one matching of queries to ground truth (Hungarian algorithm, method A.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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


@torch.no_grad()
def match(
    logits: Float[Tensor, "batch num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "batch num_queries 4"],
    targets: Sequence[Targets],
    costs: MatchingCosts,
    *,
    valid: Bool[Tensor, "batch num_queries"] | None = None,
) -> Matches:
    """Returns the cheapest one-to-one matching of each image's targets to its queries.

    Args:
        logits: class logits; a label indexes their last axis.
        boxes_cxcywh: normalised boxes.
        targets: one an image.
        costs: the weights.
        valid: queries that may be matched; all, if left out.

    Raises:
        NonFiniteLossError: a cost is NaN or infinite.
    """
    images: list[Tensor] = []
    queries: list[Tensor] = []
    numbers: list[Tensor] = []
    first_target = 0
    for image, target in enumerate(targets):
        allowed = None if valid is None else valid[image]
        query, number = match_image(logits[image], boxes_cxcywh[image], target, costs, allowed)
        images.append(torch.full_like(query, image))
        queries.append(query)
        numbers.append(number + first_target)
        first_target += len(target.labels)
    device = logits.device
    return Matches(
        image_index=torch.cat(images).to(device, non_blocking=True),
        query_index=torch.cat(queries).to(device, non_blocking=True),
        target_index=torch.cat(numbers).to(device, non_blocking=True),
    )


def match_image(
    logits: Float[Tensor, "num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "num_queries 4"],
    target: Targets,
    costs: MatchingCosts,
    allowed: Bool[Tensor, "num_queries"] | None = None,
) -> tuple[Int[Tensor, "num_pairs"], Int[Tensor, "num_pairs"]]:
    """Returns (query, target) indices on the CPU, ordered by query.

    Where there are many more queries than targets, only an exact candidate set is solved: the
    union, over the M targets, of each target's M cheapest queries. A target assigned outside its
    M cheapest could always take a free one of them, so the optimum is the same.
    """
    num_targets = len(target.labels)
    if num_targets == 0:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    cost = matching_cost(logits, boxes_cxcywh, target, costs)
    candidates = torch.arange(len(logits), device=logits.device)
    if allowed is not None:
        candidates = candidates[allowed]
        cost = cost[allowed]
    if not cost.isfinite().all():
        raise NonFiniteLossError("a matching cost is not finite: the student's output is broken")
    if len(candidates) > 2 * num_targets**2:
        cheap = torch.zeros(len(cost), dtype=torch.bool, device=cost.device)
        cheap[cost.topk(num_targets, dim=0, largest=False).indices.flatten()] = True
        candidates, cost = candidates[cheap], cost[cheap]
    row, column = linear_sum_assignment(cost.double().cpu().numpy())
    return candidates.cpu()[torch.as_tensor(row)], torch.as_tensor(column)


def matching_cost(
    logits: Float[Tensor, "num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "num_queries 4"],
    target: Targets,
    costs: MatchingCosts,
) -> Float[Tensor, "num_queries num_targets"]:
    """Returns what it costs to give each query each target.

    The class cost is the focal loss of the label said yes minus that of it said no.
    """
    # The labels that occur or, if they are fewer, all: LVIS has 866 columns, the encoder one.
    few_columns = logits.shape[1] < len(target.labels)
    columns = logits if few_columns else logits[:, target.labels]
    probability = at_least_float32(columns).sigmoid()
    alpha, gamma = costs.focal_alpha, costs.focal_gamma
    yes = alpha * (1 - probability) ** gamma * -(probability + 1e-12).log()
    no = (1 - alpha) * probability**gamma * -(1 - probability + 1e-12).log()
    gain = (yes - no)[:, target.labels] if few_columns else yes - no
    boxes = at_least_float32(boxes_cxcywh)
    wanted = target.boxes_cxcywh.to(boxes.dtype)
    distance = torch.cdist(boxes, wanted, p=1)
    overlap = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return costs.cost_class * gain + costs.cost_bbox * distance - costs.cost_giou * overlap
