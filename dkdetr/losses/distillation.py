"""Distillation: SKD and RKD by the settings, weighted, divided and named."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dkdetr.boxes import cxcywh_to_xyxy, elementwise_giou
from dkdetr.config import KDConfig
from dkdetr.losses.alignment import AlignedOutput
from dkdetr.losses.relational_kd import (
    RelatedRegions,
    batch_relational_loss,
    lay_end_to_end,
    relational_loss,
)
from dkdetr.losses.semantic_kd import (
    alignment_margin,
    semantic_bce_loss,
    semantic_centred_loss,
    semantic_infonce_loss,
    semantic_l1_loss,
)
from dkdetr.structures import SkdCalibration, StudentOutput, TeacherRegions


@runtime_checkable
class AcrossRanks(Protocol):
    """Brings together what the ranks have; every rank calls it alike."""

    @property
    def rank(self) -> int:
        """Which of the ranks this is, from 0."""
        ...

    def gather(self, rows: Float[Tensor, "*shape"]) -> Float[Tensor, "*more"]:
        """Returns every rank's rows, in rank order, as many from each; gradients find home."""
        ...


class Distillation:
    """What the queries that carry distillation owe to the teacher.

    Args:
        kd: weights and shapes of SKD and RKD.
        across_ranks: for `kd.rkd.gather`; None: this process is alone.
        teacher_mean: the cache's mean embedding, for `kd.skd.loss = "centred"`.
    """

    def __init__(
        self,
        kd: KDConfig,
        *,
        across_ranks: AcrossRanks | None,
        teacher_mean: Float[Tensor, "embed_dim"] | None,
    ) -> None:
        self._kd = kd
        self._across_ranks = across_ranks if kd.rkd.gather else None
        self._teacher_mean = teacher_mean

    def __call__(
        self, output: StudentOutput, regions: TeacherRegions, num_regions: Float[Tensor, ""]
    ) -> dict[str, Float[Tensor, ""]]:
        """Returns the weighted parts; `output.distillation` stands for `regions` by place."""
        if output.distillation is None:
            raise ValueError("regions were given but the student made no KD features")
        features = output.distillation.features
        parts: dict[str, Tensor] = {}
        if self._kd.layers == "last":
            features = features[-1:]
        # A mean over layers: the weights keep their meaning whichever layers are used.
        scale = 1 / (num_regions * len(features))
        if self._kd.skd.weight > 0:
            losses = [self._semantic(layer, regions, output.calibration) for layer in features]
            parts["skd"] = self._kd.skd.weight * scale * torch.stack(losses).sum()
        rkd = self._kd.rkd
        if rkd.weight > 0 and "image" in rkd.relations:
            losses = [self._relate_images(layer, regions) for layer in features]
            parts["rkd_image"] = rkd.weight * scale * torch.stack(losses).sum()
        if rkd.weight > 0 and "batch" in rkd.relations:
            losses = [self._relate_batch(layer, regions) for layer in features]
            parts["rkd_batch"] = rkd.weight * scale * torch.stack(losses).sum()
        return parts

    def _semantic(
        self, features: Tensor, regions: TeacherRegions, calibration: SkdCalibration | None
    ) -> Tensor:
        settings = self._kd.skd
        rows = (features, regions.embeddings, regions.valid)
        twins = settings.duplicate_similarity
        scale, bias = 1 / settings.temperature, settings.bias
        if settings.loss == "l1":
            return semantic_l1_loss(*rows)
        if settings.loss == "infonce":
            return semantic_infonce_loss(
                *rows, temperature=settings.temperature, duplicate_similarity=twins
            )
        if settings.loss == "centred":
            if self._teacher_mean is None:
                raise ValueError("kd.skd.loss = centred needs the teacher's mean embedding")
            return semantic_centred_loss(
                *rows, teacher_mean=self._teacher_mean, scale=scale, bias=bias,
                duplicate_similarity=twins,
            )  # fmt: skip
        if settings.loss == "siglip_bias":
            if calibration is None:
                raise ValueError("kd.skd.loss = siglip_bias: the student was built without it")
            return semantic_bce_loss(
                *rows, scale=calibration.scale, bias=calibration.bias, duplicate_similarity=twins
            )
        return semantic_bce_loss(*rows, scale=scale, bias=bias, duplicate_similarity=twins)

    def _relate_images(self, features: Tensor, regions: TeacherRegions) -> Tensor:
        rkd = self._kd.rkd
        return relational_loss(
            features,
            regions.embeddings,
            regions.valid,
            temperature=rkd.temperature,
            include_self=rkd.include_self,
            reverse=rkd.reverse,
        )

    def _relate_batch(self, features: Tensor, regions: TeacherRegions) -> Tensor:
        rkd, others = self._kd.rkd, self._across_ranks
        rank = 0 if others is None else others.rank
        rows = lay_end_to_end(
            features, regions.embeddings, regions.valid, first_image=rank * len(regions.valid)
        )
        columns = rows
        if others is not None:
            columns = RelatedRegions(
                features=others.gather(rows.features),
                embeddings=others.gather(rows.embeddings),
                valid=others.gather(rows.valid),
                image=others.gather(rows.image),
            )
        return batch_relational_loss(
            rows,
            columns,
            first_column=rank * len(rows.valid),
            temperature=rkd.temperature,
            include_self=rkd.include_self,
            cross_only=rkd.cross_only,
            reverse=rkd.reverse,
        )


@torch.no_grad()
def distillation_statistics(pairs: AlignedOutput) -> dict[str, Float[Tensor, ""]]:
    """Returns what to watch beside the losses: regions an image, margin, drift of KD boxes.

    `kd_anchor_giou` is the mean generalised IoU of a query's last box with the crop that the
    teacher saw: how far they are apart. `kd_dropped_per_image` counts regions that no query
    carries.
    """
    regions, distillation = pairs.regions, pairs.output.distillation
    assert distillation is not None
    crops = cxcywh_to_xyxy(regions.boxes_cxcywh)
    refined = cxcywh_to_xyxy(distillation.boxes_cxcywh[-1])
    overlap = elementwise_giou(crops, refined)
    count = regions.valid.sum().clamp(min=1)
    return {
        "kd_regions_per_image": regions.valid.sum() / len(regions.valid),
        "kd_dropped_per_image": pairs.num_dropped / len(regions.valid),
        "kd_margin": alignment_margin(distillation.features[-1], regions.embeddings, regions.valid),
        "kd_anchor_giou": torch.where(regions.valid, overlap, 0.0).sum() / count,
    }
