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
from torchvision.ops import nms

_PRE_NMS_PER_KEPT = 5


@dataclass(frozen=True, eq=False)
class SourceImage:
    """One decoded picture: RGB, uint8, as it is on the disk; a tensor where a device decoded it."""

    image_id: int
    pixels: UInt8[np.ndarray | torch.Tensor, "height width 3"]


@dataclass(frozen=True, eq=False)
class Proposals:
    """Boxes of one image in pixels of the file, best objectness first."""

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

    def propose(self, images: Sequence[SourceImage]) -> list[Proposals]:
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


def apply_rule(raw: Proposals, rule: ProposalRule, *, height: int, width: int) -> Proposals:
    """Returns the proposals that the rule keeps: clipped, float32, objectness falling.

    Equal objectness keeps the order of `raw`.
    """
    limit = np.array([width, height, width, height], dtype=np.float32)
    boxes = np.asarray(raw.boxes_xyxy, dtype=np.float32).reshape(-1, 4).clip(0, limit)
    scores = np.asarray(raw.objectness, dtype=np.float32)
    least = np.minimum(rule.min_side, limit[:2])
    usable = np.isfinite(scores) & ((boxes[:, 2:] - boxes[:, :2]) >= least).all(axis=1)
    order = np.flatnonzero(usable)[np.argsort(-scores[usable], kind="stable")]
    order = order[: _PRE_NMS_PER_KEPT * rule.keep]
    boxes, scores = boxes[order], scores[order]
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), rule.nms_iou).numpy()
    kept = np.sort(kept)[: rule.keep]
    return Proposals(boxes[kept], scores[kept])
