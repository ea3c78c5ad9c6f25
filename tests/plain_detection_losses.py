"""Matching image by image and losses layer by layer, written out: what the criterion is held to."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from torchvision.ops import generalized_box_iou

from dkdetr.config import DetectionLossConfig
from dkdetr.structures import DenoisingQueries, StudentOutput, Targets

Pairs = list[tuple[int, int, int]]
"""(image, query, target of the image), ordered by image and query."""


def xyxy(boxes: Tensor) -> Tensor:
    return torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)


def plain_cost(
    logits: Tensor, boxes: Tensor, target: Targets, settings: DetectionLossConfig
) -> Tensor:
    """[queries, targets] of one image and layer."""
    alpha, gamma = settings.focal_alpha, settings.focal_gamma
    p = logits.sigmoid()[:, target.labels]
    yes = alpha * (1 - p) ** gamma * -(p + 1e-12).log()
    no = (1 - alpha) * p**gamma * -(1 - p + 1e-12).log()
    wanted = target.boxes_cxcywh.to(boxes.dtype)
    giou = generalized_box_iou(xyxy(boxes), xyxy(wanted))
    return (
        settings.cost_class * (yes - no)
        + settings.cost_bbox * (boxes[:, None] - wanted).abs().sum(-1)
        - settings.cost_giou * giou
    )


def whole_assignment(cost: np.ndarray) -> list[tuple[int, int]]:
    """(query, target) pairs of the whole matrix."""
    return list(zip(*(each.tolist() for each in linear_sum_assignment(cost)), strict=True))


def candidate_assignment(cost: np.ndarray, allowed: np.ndarray) -> list[tuple[int, int]]:
    """The same on each target's cheapest queries, the earlier of equals, as ties are settled."""
    num_targets = cost.shape[1]
    cost = np.where(allowed[:, None], cost, np.inf)
    cheapest = np.argsort(cost, axis=0, kind="stable")[:num_targets]
    few = np.full_like(cost, np.inf)
    np.put_along_axis(few, cheapest, np.take_along_axis(cost, cheapest, axis=0), axis=0)
    rows = np.nonzero(np.isfinite(few).any(axis=1))[0]
    return [(int(rows[row]), column) for row, column in whole_assignment(few[rows])]


def plain_matches(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Targets],
    settings: DetectionLossConfig,
    valid: Tensor | None = None,
) -> Pairs:
    """The pairs of one layer of a batch."""
    pairs: Pairs = []
    for image, target in enumerate(targets):
        if len(target.labels) == 0:
            continue
        cost = plain_cost(logits[image], boxes[image], target, settings).detach().numpy()
        allowed = np.ones(len(cost), bool) if valid is None else valid[image].numpy()
        found = candidate_assignment(cost, allowed)
        pairs += [(image, query, number) for query, number in found]
    return pairs


def plain_parts(
    output: StudentOutput,
    targets: Sequence[Targets],
    settings: DetectionLossConfig,
    num_boxes: float,
    *,
    drawn: Tensor | None = None,
    hybrid_repeats: int = 1,
    denoising: DenoisingQueries | None = None,
) -> dict[str, Tensor]:
    """The weighted parts of detection, one layer, one image and one pair after the other."""
    parts: dict[str, Tensor] = {}
    objects = [replace(each, labels=torch.zeros_like(each.labels)) for each in targets]
    repeated = [
        Targets(each.labels.repeat(hybrid_repeats), each.boxes_cxcywh.repeat(hybrid_repeats, 1))
        for each in targets
    ]

    def judge(stem: str, logits: Tensor, boxes: Tensor, wanted: Sequence[Targets],
              valid: Tensor | None, heard: Tensor | None, share: float) -> None:  # fmt: skip
        for layer in range(len(logits)):
            suffix = stem if layer == len(logits) - 1 else f"{stem}.{layer}"
            pairs = plain_matches(logits[layer], boxes[layer], wanted, settings, valid)
            should = torch.zeros_like(logits[layer])
            l1 = giou = boxes.new_zeros(())
            for image, query, number in pairs:
                should[image, query, wanted[image].labels[number]] = 1
                box = boxes[layer, image, query][None]
                other = wanted[image].boxes_cxcywh[number][None].to(box.dtype)
                l1 = l1 + (box - other).abs().sum()
                giou = giou + 1 - generalized_box_iou(xyxy(box), xyxy(other)).sum()
            add(suffix, logits[layer], should, heard, l1, giou, share)

    def add(suffix: str, logits: Tensor, should: Tensor, heard: Tensor | None, l1: Tensor,
            giou: Tensor, share: float) -> None:  # fmt: skip
        p, log = logits.sigmoid(), functional.logsigmoid
        alpha, gamma = settings.focal_alpha, settings.focal_gamma
        yes = -alpha * (1 - p) ** gamma * log(logits)
        no = -(1 - alpha) * p**gamma * log(-logits)
        terms = torch.where(should > 0, yes, no)
        terms = terms if heard is None else terms * heard
        parts[f"class{suffix}"] = settings.weight_class * share * terms.sum()
        parts[f"bbox{suffix}"] = settings.weight_bbox * share * l1
        parts[f"giou{suffix}"] = settings.weight_giou * share * giou

    share = 1 / num_boxes
    encoder, hybrid, denoised = output.encoder, output.hybrid, output.denoised
    judge("", output.logits, output.detection.boxes_cxcywh, targets, None, drawn, share)
    heard = encoder.valid[..., None] if settings.encoder_tokens == "valid" else None
    judge(".encoder", encoder.objectness_logits[None, ..., None], encoder.boxes_cxcywh[None],
          objects, encoder.valid, heard, share)  # fmt: skip
    if hybrid is not None:
        judge(".hybrid", hybrid.logits, hybrid.queries.boxes_cxcywh, repeated, None, drawn,
              share / hybrid_repeats)  # fmt: skip
    if denoised is not None and denoising is not None:
        share /= denoising.num_groups
        places = denoising.valid.nonzero().tolist()
        for layer, logits in enumerate(denoised.logits):
            should = torch.zeros_like(logits)
            heard = torch.zeros_like(logits)
            l1 = giou = logits.new_zeros(())
            for image, place in places:
                should[image, place, denoising.wanted_labels[image, place]] = 1
                heard[image, place] = 1 if drawn is None else drawn.to(heard)
                box = denoised.queries.boxes_cxcywh[layer, image, place][None]
                other = denoising.wanted_boxes_cxcywh[image, place][None].to(box.dtype)
                l1 = l1 + (box - other).abs().sum()
                giou = giou + 1 - generalized_box_iou(xyxy(box), xyxy(other)).sum()
            last = layer == len(denoised.logits) - 1
            suffix = ".denoising" if last else f".denoising.{layer}"
            add(suffix, logits, should, heard, l1, giou, share)
    return parts
