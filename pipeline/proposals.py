"""Proposals: boxes that may hold an object of any name, and where they come from.

Every source gives raw boxes with an objectness; one rule then clips, drops the small, suppresses
duplicates and keeps the best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.ops import nms

_PRE_NMS_PER_KEPT = 5


@dataclass(frozen=True, eq=False)
class SourceImage:
    """One decoded picture: RGB, uint8, as it is on the disk; a tensor where a device decoded it."""

    image_id: int
    pixels: UInt8[np.ndarray | Tensor, "height width 3"]


@dataclass(frozen=True, eq=False)
class RawProposals:
    """What a source proposes in one image: boxes in pixels of the file, wherever it computes."""

    boxes_xyxy: Float[Tensor, "num_boxes 4"]
    objectness: Float[Tensor, "num_boxes"]


@dataclass(frozen=True, eq=False)
class Proposals:
    """What is kept of them, best objectness first."""

    boxes_xyxy: Float[np.ndarray, "num_boxes 4"]
    objectness: Float[np.ndarray, "num_boxes"]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a source has learned from; None: nobody knows."""

    source: str
    detector: str
    """What made it, by a hash of its weights or of its file."""
    uses_novel_names: bool | None
    saw_novel_boxes: bool | None
    names: tuple[str, ...] = ()
    """The categories whose boxes it has learned from."""
    category_ids: tuple[int, ...] = ()
    """The categories that its boxes are labelled with."""
    num_classes: int = 0
    """Of a list by class; else 0."""
    details: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    """Why novel boxes are known to have been seen, in words."""


class ProposalSource(Protocol):
    """Anything that proposes boxes."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that decides a proposal, as the cache's fingerprint records it."""
        ...

    @property
    def seen(self) -> Seen:
        """What the source has learned from, for the cache's provenance and against leaks."""
        ...

    def propose(self, images: Sequence[SourceImage]) -> list[RawProposals]:
        """Returns raw proposals, one entry an image, in the order of `images`."""
        ...


@dataclass(frozen=True)
class ProposalRule:
    """What is kept of the raw proposals."""

    keep: int = 300
    nms_iou: float = 0.7
    min_side: float = 4.0
    """Pixels of the file; the selection for training is stricter, in pixels of the view."""

    def parts(self) -> dict[str, Any]:
        """Returns the rule as the cache's fingerprint records it."""
        return {
            "keep": self.keep,
            "nms_iou": self.nms_iou,
            "min_side": self.min_side,
            "pre_nms": _PRE_NMS_PER_KEPT * self.keep,
        }


def apply_rule(raw: RawProposals, rule: ProposalRule, *, height: int, width: int) -> Proposals:
    """Returns the proposals that the rule keeps: clipped, float32, objectness falling.

    Equal objectness keeps the order of `raw`. All is done where `raw` lies; what is kept is copied.
    """
    across, down = raw.boxes_xyxy.float().view(-1, 2, 2).unbind(-1)
    across, down = across.clamp(0, width), down.clamp(0, height)
    boxes = torch.stack((across, down), dim=-1).flatten(1)
    scores = raw.objectness.float()
    usable = scores.isfinite()
    usable &= across[:, 1] - across[:, 0] >= min(rule.min_side, width)
    usable &= down[:, 1] - down[:, 0] >= min(rule.min_side, height)
    # Last, and so without a word in what is suppressed.
    scores = scores.masked_fill(~usable, -torch.inf)
    order = scores.argsort(descending=True, stable=True)[: _PRE_NMS_PER_KEPT * rule.keep]
    kept = order[nms(boxes[order], scores[order], rule.nms_iou).sort().values]
    kept = kept[usable[kept]][: rule.keep]
    return Proposals(boxes[kept].cpu().numpy(), scores[kept].cpu().numpy())
