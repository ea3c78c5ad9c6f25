"""The criterion: which losses on which outputs, weighted, reduced and summed.

Everything below it gives sums; the divisions stand here alone. Normalisers come from outside
because they are means over all ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dkdetr.boxes import cxcywh_to_xyxy, elementwise_giou
from dkdetr.config import DetectionLossConfig, KDConfig
from dkdetr.losses.detection import box_giou_loss, box_l1_loss, focal_loss
from dkdetr.losses.masks import matched_mask_losses, stacked_masks
from dkdetr.losses.matcher import Matches, MatchingCosts, match
from dkdetr.losses.relational_kd import as_one_group, relational_loss
from dkdetr.losses.semantic_kd import alignment_margin, semantic_bce_loss, semantic_l1_loss
from dkdetr.structures import (
    InstanceMasks,
    QueryOutput,
    StudentOutput,
    Targets,
    TeacherRegions,
)


@dataclass(frozen=True)
class Normalisers:
    """Counts that divide the sums: means over ranks, at least 1."""

    num_boxes: Float[Tensor, ""]
    num_regions: Float[Tensor, ""]


@dataclass(frozen=True)
class LossReport:
    """The loss to step on, and its weighted parts by name (they sum to it)."""

    total: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]]


class Criterion:
    """Detection and mask losses on every decoder layer, the encoder's, and distillation.

    Args:
        detection: costs and weights of the detector.
        kd: weights and shapes of SKD and RKD.
    """

    def __init__(self, detection: DetectionLossConfig, kd: KDConfig) -> None:
        self._detection = detection
        self._kd = kd
        self._costs = MatchingCosts(
            cost_class=detection.cost_class,
            cost_bbox=detection.cost_bbox,
            cost_giou=detection.cost_giou,
            focal_alpha=detection.focal_alpha,
            focal_gamma=detection.focal_gamma,
        )

    def __call__(
        self,
        output: StudentOutput,
        targets: Sequence[Targets],
        regions: TeacherRegions | None,
        normalisers: Normalisers,
    ) -> LossReport:
        """Returns the loss of one rank's batch.

        Every decoder layer and the encoder are matched by themselves. Distillation is part of
        the loss where `regions` are given; with none valid it is a zero tied to the graph.

        Raises:
            NonFiniteLossError: a matching cost is not finite.
        """
        parts: dict[str, Tensor] = {}
        last = len(output.logits) - 1
        for layer, (logits, boxes) in enumerate(
            zip(output.logits, output.detection.boxes_cxcywh, strict=True)
        ):
            suffix = "" if layer == last else f".{layer}"
            matches = self._detect(parts, suffix, logits, boxes, targets, None, normalisers)
            if output.masks is not None:
                self._segment(parts, suffix, output.masks, layer, matches, targets, normalisers)
        encoder = output.encoder
        objects = [Targets(torch.zeros_like(t.labels), t.boxes_cxcywh) for t in targets]
        objectness = encoder.objectness_logits[..., None]
        self._detect(
            parts, ".encoder", objectness, encoder.boxes_cxcywh, objects, encoder.valid, normalisers
        )
        if regions is not None:
            if output.distillation is None:
                raise ValueError("regions were given but the student made no KD features")
            self._distil(parts, output.distillation, regions, normalisers)
        return LossReport(total=torch.stack(list(parts.values())).sum(), parts=parts)

    def _detect(
        self,
        parts: dict[str, Tensor],
        suffix: str,
        logits: Tensor,
        boxes_cxcywh: Tensor,
        targets: Sequence[Targets],
        valid: Tensor | None,
        normalisers: Normalisers,
    ) -> Matches:
        settings = self._detection
        matches = match(logits, boxes_cxcywh, targets, self._costs, valid=valid)
        labels, target_boxes = _matched_targets(matches, targets)
        wanted = torch.zeros_like(logits)
        wanted[matches.image_index, matches.query_index, labels] = 1.0
        matched_boxes = boxes_cxcywh[matches.image_index, matches.query_index]
        class_loss = focal_loss(
            logits,
            wanted,
            alpha=settings.focal_alpha,
            gamma=settings.focal_gamma,
            weights=None if valid is None else valid[..., None].to(logits.dtype),
        )
        scale = 1 / normalisers.num_boxes
        parts[f"class{suffix}"] = settings.weight_class * scale * class_loss
        parts[f"bbox{suffix}"] = (
            settings.weight_bbox * scale * box_l1_loss(matched_boxes, target_boxes)
        )
        parts[f"giou{suffix}"] = (
            settings.weight_giou * scale * box_giou_loss(matched_boxes, target_boxes)
        )
        return matches

    def _segment(
        self,
        parts: dict[str, Tensor],
        suffix: str,
        masks: InstanceMasks,
        layer: int,
        matches: Matches,
        targets: Sequence[Targets],
        normalisers: Normalisers,
    ) -> None:
        height, width = masks.padding_mask.shape[1:]
        wanted = stacked_masks(targets, (height, width))
        dice, cross_entropy = matched_mask_losses(masks, layer, matches, wanted)
        scale = 1 / normalisers.num_boxes
        parts[f"dice{suffix}"] = self._detection.weight_dice * scale * dice
        parts[f"mask_bce{suffix}"] = self._detection.weight_mask_bce * scale * cross_entropy

    def _distil(
        self,
        parts: dict[str, Tensor],
        distillation: QueryOutput,
        regions: TeacherRegions,
        normalisers: Normalisers,
    ) -> None:
        features = distillation.features
        if self._kd.layers == "last":
            features = features[-1:]
        # A mean over layers: the weights keep their meaning whichever layers are used.
        scale = 1 / (normalisers.num_regions * len(features))
        if self._kd.skd.weight > 0:
            losses = [self._semantic(layer, regions) for layer in features]
            parts["skd"] = self._kd.skd.weight * scale * torch.stack(losses).sum()
        if self._kd.rkd.weight > 0:
            for relation in self._kd.rkd.relations:
                sums = torch.stack(
                    [self._relational(layer, regions, relation) for layer in features]
                )
                parts[f"rkd_{relation}"] = self._kd.rkd.weight * scale * sums.sum()

    def _semantic(self, features: Tensor, regions: TeacherRegions) -> Tensor:
        settings = self._kd.skd
        if settings.loss == "l1":
            return semantic_l1_loss(features, regions.embeddings, regions.valid)
        return semantic_bce_loss(
            features,
            regions.embeddings,
            regions.valid,
            temperature=settings.temperature,
            bias=settings.bias,
        )

    def _relational(self, features: Tensor, regions: TeacherRegions, relation: str) -> Tensor:
        rows = (features, regions.embeddings, regions.valid)
        if relation == "batch":
            rows = (as_one_group(rows[0]), as_one_group(rows[1]), as_one_group(rows[2]))
        return relational_loss(*rows, temperature=self._kd.rkd.temperature)


def count_regions(regions: TeacherRegions | None, device: torch.device) -> Float[Tensor, ""]:
    """Returns the number of filled places, 0 without regions."""
    if regions is None:
        return torch.zeros((), device=device)
    return regions.valid.sum().float()


def count_boxes(targets: Sequence[Targets], device: torch.device) -> Float[Tensor, ""]:
    """Returns the number of ground-truth boxes of a batch."""
    return torch.tensor(float(sum(len(target.labels) for target in targets)), device=device)


@torch.no_grad()
def distillation_statistics(
    distillation: QueryOutput, regions: TeacherRegions
) -> dict[str, Float[Tensor, ""]]:
    """Returns what to watch beside the losses: regions an image, margin, drift of KD boxes.

    `kd_anchor_giou` is the mean generalised IoU of a KD query's last box with its anchor: how
    far refinement has carried it from the crop that the teacher saw.
    """
    anchors = cxcywh_to_xyxy(regions.boxes_cxcywh)
    refined = cxcywh_to_xyxy(distillation.boxes_cxcywh[-1])
    overlap = elementwise_giou(anchors, refined)
    count = regions.valid.sum().clamp(min=1)
    return {
        "kd_regions_per_image": regions.valid.sum() / len(regions.valid),
        "kd_margin": alignment_margin(distillation.features[-1], regions.embeddings, regions.valid),
        "kd_anchor_giou": torch.where(regions.valid, overlap, 0.0).sum() / count,
    }


def _matched_targets(matches: Matches, targets: Sequence[Targets]) -> tuple[Tensor, Tensor]:
    labels = torch.cat([target.labels for target in targets])
    boxes = torch.cat([target.boxes_cxcywh for target in targets])
    return labels[matches.target_index], boxes[matches.target_index]
