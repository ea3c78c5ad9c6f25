"""What it costs to give each query each target: all images, layers and stages at once.

Everything is of one row a target and one column a query: a batch's images have different numbers of
targets, and nothing is computed for the places that padding would add.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dkdetr.boxes import cxcywh_to_xyxy, elementwise_giou
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
class Stage:
    """What is matched to a batch's targets: the decoder's layers, or the encoder as one layer.

    Attributes:
        logits: class logits; a label indexes their last axis. With one class, every target is of
            it, whatever its label.
        boxes_cxcywh: normalised boxes.
        valid: queries that may be matched; all, if left out.
        repeats: how many queries each target is to have.
        term_weights: of the class loss's terms, broadcast to the logits; all 1, if left out.
    """

    logits: Float[Tensor, "num_layers batch num_queries num_classes"]
    boxes_cxcywh: Float[Tensor, "num_layers batch num_queries 4"]
    valid: Bool[Tensor, "batch num_queries"] | None = None
    repeats: int = 1
    term_weights: Float[Tensor, "*#terms"] | None = None

    @property
    def knows_labels(self) -> bool:
        """Returns False where there is one class for all targets."""
        return self.logits.shape[-1] > 1


@dataclass(frozen=True)
class TargetRows:
    """A batch's targets laid end to end, and how many each image has."""

    labels: Int[Tensor, "num_targets"]
    boxes_cxcywh: Float[Tensor, "num_targets 4"]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, targets: Sequence[Targets]) -> "TargetRows":
        """Returns the targets of a batch."""
        return cls(
            labels=torch.cat([target.labels for target in targets]),
            boxes_cxcywh=torch.cat([target.boxes_cxcywh for target in targets]),
            counts=tuple(len(target.labels) for target in targets),
        )

    def image_index(self) -> Int[Tensor, "num_targets"]:
        """Returns the image of each, made where they lie: a copy would be one more."""
        images = torch.arange(len(self.counts), device=self.labels.device)
        rows = images[:, None].repeat(1, max(self.counts))
        pairs = zip(rows.unbind(), self.counts, strict=True)
        return torch.cat([row[:count] for row, count in pairs])


class PairCosts:
    """The costs of a batch's targets with the queries of their images, for some targets at a time.

    Args:
        stages: whose queries.
        costs: weights.
    """

    def __init__(self, stages: Sequence[Stage], costs: MatchingCosts) -> None:
        self._stages, self._costs = stages, costs
        layers = [layer for stage in stages for layer in stage.boxes_cxcywh]
        # Eight planes, cxcywh and xyxy, that operations run through from one end to the other.
        self._planes = _both_formats(torch.cat(layers, dim=1)).movedim(-1, 0).contiguous()
        # The encoder's one column is computed before it is repeated for each target.
        self._gains = [
            None if stage.knows_labels else _class_gain(stage.logits[..., 0], costs)
            for stage in stages
        ]

    def __call__(
        self,
        labels: Int[Tensor, "num_targets"],
        boxes_cxcywh: Float[Tensor, "num_targets 4"],
        image_index: Int[Tensor, "num_targets"],
    ) -> Float[Tensor, "num_targets num_places"]:
        """Returns each target's cost with all queries of its image, layer after layer.

        The class cost is the focal loss of the label said yes minus that of it said no.
        """
        costs = self._costs
        queries = self._planes.index_select(1, image_index)
        wanted = _both_formats(boxes_cxcywh.to(queries.dtype)).movedim(-1, 0)[..., None]
        distance = (queries[:4] - wanted[:4]).abs_().sum(0)
        overlap = elementwise_giou(queries[4:].movedim(0, -1), wanted[4:].movedim(0, -1))
        gain = self._class_gains(labels, image_index)
        return costs.cost_class * gain + costs.cost_bbox * distance - costs.cost_giou * overlap

    def _class_gains(
        self, labels: Tensor, image_index: Tensor
    ) -> Float[Tensor, "num_targets num_places"]:
        rows: list[Tensor] = []
        for stage, gain in zip(self._stages, self._gains, strict=True):
            if gain is None:  # of 866 columns those that occur
                columns = stage.logits[:, image_index, :, labels]
                rows.append(_class_gain(columns, self._costs).flatten(1))
            else:
                rows.append(gain.index_select(1, image_index).transpose(0, 1).flatten(1))
        return torch.cat(rows, dim=1)


def _class_gain(logits: Float[Tensor, "*shape"], costs: MatchingCosts) -> Float[Tensor, "*shape"]:
    yes = at_least_float32(logits).sigmoid()
    no = 1 - yes
    alpha, gamma = costs.focal_alpha, costs.focal_gamma
    return (1 - alpha) * yes**gamma * (no + 1e-12).log() - alpha * no**gamma * (yes + 1e-12).log()


def _both_formats(boxes_cxcywh: Float[Tensor, "*shape 4"]) -> Float[Tensor, "*shape 8"]:
    boxes = at_least_float32(boxes_cxcywh)
    return torch.cat((boxes, cxcywh_to_xyxy(boxes)), dim=-1)
