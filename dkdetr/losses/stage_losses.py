"""Detection losses of stages, all layers in one go: sums of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dkdetr.losses.detection import box_giou_terms, box_l1_terms, focal_terms
from dkdetr.losses.matcher import StageMatches
from dkdetr.losses.matching_cost import Stage, TargetRows
from dkdetr.structures import DenoisingQueries, ExtraDetections


@dataclass(frozen=True)
class LayerSums:
    """A stage's summed losses, layer by layer."""

    focal: Float[Tensor, "num_layers"]
    l1: Float[Tensor, "num_layers"]
    giou: Float[Tensor, "num_layers"]


def matched_sums(
    stages: Sequence[Stage],
    matched: Sequence[StageMatches],
    targets: TargetRows,
    *,
    alpha: float,
    gamma: float,
) -> list[LayerSums]:
    """Returns the losses of each stage against the targets that its queries are matched to.

    Args:
        stages: what was matched.
        matched: with which targets; places count through a stage's layers, images and queries.
        targets: of the batch.
        alpha: of the focal loss.
        gamma: of the focal loss.
    """
    sizes = [matches.place.numel() for matches in matched]
    index = torch.cat([matches.target_index.flatten() for matches in matched])
    labels = torch.split(targets.labels.index_select(0, index), sizes)
    # Chosen from rows: the gradient of an index over several axes would sort its pairs.
    found = [
        stage.boxes_cxcywh.flatten(0, 2).index_select(0, matches.place.flatten())
        for stage, matches in zip(stages, matched, strict=True)
    ]
    boxes, wanted_boxes = torch.cat(found), targets.boxes_cxcywh.index_select(0, index)
    pairs = torch.stack((box_l1_terms(boxes, wanted_boxes), box_giou_terms(boxes, wanted_boxes)))
    sums: list[LayerSums] = []
    for number, (stage, matches, part) in enumerate(
        zip(stages, matched, torch.split(pairs, sizes, dim=1), strict=True)
    ):
        wanted = _wanted(stage.logits, matches.place.flatten(), labels[number])
        weights = stage.term_weights
        terms = focal_terms(stage.logits, wanted, alpha=alpha, gamma=gamma, weights=weights)
        l1, giou = part.view(2, *matches.place.shape).sum(2)
        sums.append(LayerSums(terms.flatten(1).sum(1), l1, giou))
    return sums


def denoising_sums(
    denoised: ExtraDetections,
    denoising: DenoisingQueries,
    weights: Float[Tensor, "num_classes"] | None,
    *,
    alpha: float,
    gamma: float,
) -> LayerSums:
    """Returns the denoising queries' losses: each knows which object it was.

    Empty places are weighed with 0 and have the box that is wanted of them: to leave them out
    would ask the device how many they are.
    """
    logits, boxes = denoised.logits, denoised.queries.boxes_cxcywh
    wanted = functional.one_hot(denoising.wanted_labels, logits.shape[-1]).to(logits.dtype)
    heard = denoising.valid[..., None].to(wanted)
    heard = heard if weights is None else heard * weights
    terms = focal_terms(logits, wanted.expand_as(logits), alpha=alpha, gamma=gamma, weights=heard)
    wanted_boxes = denoising.wanted_boxes_cxcywh
    boxes = torch.where(denoising.valid[..., None], boxes, wanted_boxes.to(boxes.dtype))
    return LayerSums(
        focal=terms.flatten(1).sum(1),
        l1=box_l1_terms(boxes, wanted_boxes).flatten(1).sum(1),
        giou=box_giou_terms(boxes, wanted_boxes).flatten(1).sum(1),
    )


def _wanted(
    logits: Float[Tensor, "num_layers batch num_queries num_classes"],
    place: Int[Tensor, "num_pairs"],
    labels: Int[Tensor, "num_pairs"],
) -> Float[Tensor, "num_layers batch num_queries num_classes"]:
    """Returns 1 where a matched query should say its target's label, 0 elsewhere."""
    num_classes = logits.shape[-1]
    column = place if num_classes == 1 else place * num_classes + labels
    wanted = logits.new_zeros(logits.numel()).index_fill_(0, column, 1.0)
    return wanted.view(logits.shape)
