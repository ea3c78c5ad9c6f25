"""The criterion: which losses on which outputs, weighted, reduced and summed.

Everything below it gives sums; the divisions stand here alone. Normalisers come from outside
because they are means over all ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dkdetr.config import DetectionLossConfig, KDConfig
from dkdetr.losses.distillation import AcrossRanks, Distillation
from dkdetr.losses.masks import matched_mask_losses, stacked_masks
from dkdetr.losses.matcher import Matches, StageMatches, assign, send_costs
from dkdetr.losses.matching_cost import MatchingCosts, Stage, TargetRows
from dkdetr.losses.stage_losses import LayerSums, denoising_sums, matched_sums
from dkdetr.structures import (
    DenoisingQueries,
    InstanceMasks,
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
        across_ranks: for `kd.rkd.gather`; None: this process is alone.
        teacher_mean: the cache's mean embedding, for `kd.skd.loss = "centred"`.
    """

    def __init__(
        self,
        detection: DetectionLossConfig,
        kd: KDConfig,
        *,
        across_ranks: AcrossRanks | None = None,
        teacher_mean: Float[Tensor, "embed_dim"] | None = None,
    ) -> None:
        self._detection = detection
        self._valid_tokens_only = detection.encoder_tokens == "valid"
        self._hybrid_repeats = kd.hybrid_repeats
        self._distil = Distillation(kd, across_ranks=across_ranks, teacher_mean=teacher_mean)
        self._costs = MatchingCosts(
            cost_class=detection.cost_class,
            cost_bbox=detection.cost_bbox,
            cost_giou=detection.cost_giou,
            focal_alpha=detection.focal_alpha,
            focal_gamma=detection.focal_gamma,
        )
        self._focal = {"alpha": detection.focal_alpha, "gamma": detection.focal_gamma}

    def __call__(
        self,
        output: StudentOutput,
        targets: Sequence[Targets],
        regions: TeacherRegions | None,
        normalisers: Normalisers,
        *,
        drawn_classes: Bool[Tensor, "num_classes"] | None = None,
        denoising: DenoisingQueries | None = None,
    ) -> LossReport:
        """Returns the loss of one rank's batch.

        Every decoder layer and the encoder are matched by themselves. Distillation is part of
        the loss where `regions` are given; with none valid it is a zero tied to the graph.

        Args:
            output: the student's; its `distillation` stands for `regions`, place by place.
            targets: base objects.
            regions: what the teacher says.
            normalisers: divisors.
            drawn_classes: the classes that the decoder's class loss looks at; all, if left out.
            denoising: what the student was given to clean.

        Raises:
            NonFiniteLossError: a matching cost is not finite.
        """
        scale = 1 / normalisers.num_boxes
        weights = None if drawn_classes is None else drawn_classes.to(output.logits)
        rows = TargetRows.of(targets)
        stages = self._stages(output, weights)
        sent = send_costs(stages, rows, self._costs)
        # What needs no pairs is launched here: a GPU has work while the CPU assigns.
        apart: dict[str, Tensor] = {}
        if output.denoised is not None and denoising is not None:
            sums = denoising_sums(output.denoised, denoising, weights, **self._focal)
            apart |= self._named(".denoising", sums, scale / denoising.num_groups)
        if regions is not None:
            apart |= self._distil(output, regions, normalisers.num_regions)
        matched = assign(sent)
        decoder, encoder, *hybrid = matched_sums(stages, matched, rows, **self._focal)
        parts = self._named("", decoder, scale)
        if output.masks is not None:
            parts |= self._segment(output.masks, matched[0], targets, scale)
        parts |= self._named(".encoder", encoder, scale)
        for sums in hybrid:
            parts |= self._named(".hybrid", sums, scale / self._hybrid_repeats)
        parts |= apart
        return LossReport(total=torch.stack(list(parts.values())).sum(), parts=parts)

    def match_last(self, output: StudentOutput, targets: Sequence[Targets]) -> Matches:
        """Returns which detection queries of the last layer are matched to which base objects."""
        last = Stage(output.logits[-1:], output.detection.boxes_cxcywh[-1:])
        return assign(send_costs([last], TargetRows.of(targets), self._costs))[0].of_layer(0)

    def _stages(self, output: StudentOutput, class_weights: Tensor | None) -> list[Stage]:
        """Returns the decoder, the encoder as one layer and, where there are any, extra queries."""
        encoder, hybrid = output.encoder, output.hybrid
        objectness = encoder.objectness_logits[None, ..., None]
        heard = encoder.valid[..., None].to(objectness) if self._valid_tokens_only else None
        boxes = encoder.boxes_cxcywh[None]
        stages = [
            Stage(output.logits, output.detection.boxes_cxcywh, term_weights=class_weights),
            Stage(objectness, boxes, encoder.valid, term_weights=heard),
        ]
        if hybrid is not None:  # each object is wanted several times (H-DETR)
            boxes, repeats = hybrid.queries.boxes_cxcywh, self._hybrid_repeats
            stages.append(Stage(hybrid.logits, boxes, repeats=repeats, term_weights=class_weights))
        return stages

    def _named(self, stem: str, sums: LayerSums, scale: Tensor) -> dict[str, Tensor]:
        """Returns a stage's weighted parts, layer by layer."""
        settings = self._detection
        columns = {
            "class": settings.weight_class * scale * sums.focal,
            "bbox": settings.weight_bbox * scale * sums.l1,
            "giou": settings.weight_giou * scale * sums.giou,
        }
        return _by_layer(stem, columns)

    def _segment(
        self,
        masks: InstanceMasks,
        matched: StageMatches,
        targets: Sequence[Targets],
        scale: Tensor,
    ) -> dict[str, Tensor]:
        """Returns the mask losses' weighted parts; chunks of masks never stand together."""
        height, width = masks.padding_mask.shape[1:]
        wanted = stacked_masks(targets, (height, width))
        losses = [
            matched_mask_losses(masks, layer, matched.of_layer(layer), wanted)
            for layer in range(len(matched.place))
        ]
        dice, cross_entropy = (torch.stack(column) for column in zip(*losses, strict=True))
        settings = self._detection
        columns = {
            "dice": settings.weight_dice * scale * dice,
            "mask_bce": settings.weight_mask_bce * scale * cross_entropy,
        }
        return _by_layer("", columns)


def count_regions(regions: TeacherRegions | None, device: torch.device) -> Float[Tensor, ""]:
    """Returns the number of filled places, 0 without regions."""
    if regions is None:
        return torch.zeros((), device=device)
    return regions.valid.sum().float()


def count_boxes(targets: Sequence[Targets], device: torch.device) -> Float[Tensor, ""]:
    """Returns the number of ground-truth boxes of a batch."""
    return torch.tensor(float(sum(len(target.labels) for target in targets)), device=device)


def _by_layer(
    stem: str, columns: Mapping[str, Float[Tensor, "num_layers"]]
) -> dict[str, Float[Tensor, ""]]:
    """Returns parts named by kind, stem and layer; the last layer's without a number."""
    layers = zip(*(column.unbind() for column in columns.values()), strict=True)
    parts: dict[str, Tensor] = {}
    for layer, values in enumerate(layers, start=1):
        for kind, value in zip(columns, values, strict=True):
            last = layer == len(columns[kind])
            parts[f"{kind}{stem}" if last else f"{kind}{stem}.{layer - 1}"] = value
    return parts
