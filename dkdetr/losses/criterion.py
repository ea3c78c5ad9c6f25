"""The criterion: which losses on which outputs, weighted, reduced and summed.

Everything below it gives sums; the divisions stand here alone. Normalisers come from outside
because they are means over all ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from dkdetr.config import DetectionLossConfig, KDConfig
from dkdetr.losses.detection import box_giou_loss, box_l1_loss, focal_loss
from dkdetr.losses.distillation import AcrossRanks, Distillation
from dkdetr.losses.masks import matched_mask_losses, stacked_masks
from dkdetr.losses.matcher import Matches, MatchingCosts, Stage, match_stages
from dkdetr.structures import (
    DenoisingQueries,
    ExtraDetections,
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
        parts: dict[str, Tensor] = {}
        scale = 1 / normalisers.num_boxes
        weights = None if drawn_classes is None else drawn_classes.to(output.logits)
        encoder, hybrid = output.encoder, output.hybrid
        objectness = encoder.objectness_logits[..., None]
        objects = [Targets(torch.zeros_like(t.labels), t.boxes_cxcywh) for t in targets]
        decoding = Stage(output.logits, output.detection.boxes_cxcywh, targets)
        encoding = Stage(objectness[None], encoder.boxes_cxcywh[None], objects, encoder.valid)
        stages = [
            decoding,
            encoding,
            *([] if hybrid is None else [self._repeated(hybrid, targets)]),
        ]
        matched = match_stages(stages, self._costs)
        for layer, matches in enumerate(matched[0]):
            suffix = _suffix(layer, len(matched[0]))
            self._detect(parts, suffix, decoding, layer, matches, scale, weights)
            if output.masks is not None:
                self._segment(parts, suffix, output.masks, layer, matches, targets, scale)
        heard = encoder.valid[..., None].to(objectness) if self._valid_tokens_only else None
        self._detect(parts, ".encoder", encoding, 0, matched[1][0], scale, heard)
        for layer, matches in enumerate(matched[2] if hybrid is not None else []):
            suffix = f".hybrid{_suffix(layer, len(matched[2]))}"
            share = scale / self._hybrid_repeats
            self._detect(parts, suffix, stages[2], layer, matches, share, weights)
        if output.denoised is not None and denoising is not None:
            self._denoise(parts, output.denoised, denoising, scale, weights)
        if regions is not None:
            parts |= self._distil(output, regions, normalisers.num_regions)
        return LossReport(total=torch.stack(list(parts.values())).sum(), parts=parts)

    def match_last(self, output: StudentOutput, targets: Sequence[Targets]) -> Matches:
        """Returns which detection queries of the last layer are matched to which base objects."""
        last = Stage(output.logits[-1:], output.detection.boxes_cxcywh[-1:], targets)
        return match_stages([last], self._costs)[0][0]

    def _repeated(self, hybrid: ExtraDetections, targets: Sequence[Targets]) -> Stage:
        """Returns the stage of the extra queries: each object is wanted several times (H-DETR)."""
        repeats = self._hybrid_repeats
        wanted = [
            Targets(t.labels.repeat(repeats), t.boxes_cxcywh.repeat(repeats, 1)) for t in targets
        ]
        return Stage(hybrid.logits, hybrid.queries.boxes_cxcywh, wanted)

    def _denoise(
        self,
        parts: dict[str, Tensor],
        denoised: ExtraDetections,
        denoising: DenoisingQueries,
        scale: Tensor,
        weights: Tensor | None,
    ) -> None:
        """Adds the denoising queries' losses: each knows which object it was.

        Empty places are weighed with 0 and have the box that is wanted of them: to leave them out
        would ask the device how many they are.
        """
        num_classes = denoised.logits.shape[-1]
        wanted = functional.one_hot(denoising.wanted_labels, num_classes).to(denoised.logits.dtype)
        heard = denoising.valid[..., None].to(wanted)
        heard = heard if weights is None else heard * weights
        target_boxes = denoising.wanted_boxes_cxcywh
        scale = scale / denoising.num_groups
        for layer, logits in enumerate(denoised.logits):
            boxes = denoised.queries.boxes_cxcywh[layer]
            boxes = torch.where(denoising.valid[..., None], boxes, target_boxes.to(boxes.dtype))
            suffix = f".denoising{_suffix(layer, len(denoised.logits))}"
            self._judge(
                parts, suffix, logits, wanted,
                boxes.flatten(0, 1), target_boxes.flatten(0, 1), scale, heard,
            )  # fmt: skip

    def _detect(
        self,
        parts: dict[str, Tensor],
        suffix: str,
        stage: Stage,
        layer: int,
        matches: Matches,
        scale: Tensor,
        weights: Tensor | None,
    ) -> None:
        logits = stage.logits[layer]
        labels, target_boxes = _matched_targets(matches, stage.targets)
        wanted = torch.zeros_like(logits)
        wanted[matches.image_index, matches.query_index, labels] = 1.0
        matched_boxes = stage.boxes_cxcywh[layer, matches.image_index, matches.query_index]
        self._judge(parts, suffix, logits, wanted, matched_boxes, target_boxes, scale, weights)

    def _judge(
        self,
        parts: dict[str, Tensor],
        suffix: str,
        logits: Tensor,
        wanted: Tensor,
        boxes_cxcywh: Tensor,
        target_boxes: Tensor,
        scale: Tensor,
        weights: Tensor | None,
    ) -> None:
        settings = self._detection
        class_loss = focal_loss(
            logits,
            wanted,
            alpha=settings.focal_alpha,
            gamma=settings.focal_gamma,
            weights=None if weights is None else weights.expand_as(logits),
        )
        l1, giou = (
            box_l1_loss(boxes_cxcywh, target_boxes),
            box_giou_loss(boxes_cxcywh, target_boxes),
        )
        parts[f"class{suffix}"] = settings.weight_class * scale * class_loss
        parts[f"bbox{suffix}"] = settings.weight_bbox * scale * l1
        parts[f"giou{suffix}"] = settings.weight_giou * scale * giou

    def _segment(
        self,
        parts: dict[str, Tensor],
        suffix: str,
        masks: InstanceMasks,
        layer: int,
        matches: Matches,
        targets: Sequence[Targets],
        scale: Tensor,
    ) -> None:
        height, width = masks.padding_mask.shape[1:]
        wanted = stacked_masks(targets, (height, width))
        dice, cross_entropy = matched_mask_losses(masks, layer, matches, wanted)
        parts[f"dice{suffix}"] = self._detection.weight_dice * scale * dice
        parts[f"mask_bce{suffix}"] = self._detection.weight_mask_bce * scale * cross_entropy


def count_regions(regions: TeacherRegions | None, device: torch.device) -> Float[Tensor, ""]:
    """Returns the number of filled places, 0 without regions."""
    if regions is None:
        return torch.zeros((), device=device)
    return regions.valid.sum().float()


def count_boxes(targets: Sequence[Targets], device: torch.device) -> Float[Tensor, ""]:
    """Returns the number of ground-truth boxes of a batch."""
    return torch.tensor(float(sum(len(target.labels) for target in targets)), device=device)


def _suffix(layer: int, num_layers: int) -> str:
    """Returns what the names of a layer's parts end with; the last layer's with nothing."""
    return "" if layer == num_layers - 1 else f".{layer}"


def _matched_targets(matches: Matches, targets: Sequence[Targets]) -> tuple[Tensor, Tensor]:
    labels = torch.cat([target.labels for target in targets])
    boxes = torch.cat([target.boxes_cxcywh for target in targets])
    return labels[matches.target_index], boxes[matches.target_index]
