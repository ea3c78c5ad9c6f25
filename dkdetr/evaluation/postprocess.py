"""From the student's output to detections: no threshold, no suppression (method A.5)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dkdetr.boxes import clip_xyxy, cxcywh_to_xyxy
from dkdetr.errors import CorruptArtefactError
from dkdetr.run_lengths import Rle


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first; boxes in pixels of the original file.

    `queries` says which query each is of; `masks` are there where the student draws them.
    """

    boxes_xyxy: Float[Tensor, "num_detections 4"]
    scores: Float[Tensor, "num_detections"]
    labels: Int[Tensor, "num_detections"]
    queries: Int[Tensor, "num_detections"]
    masks: tuple[Rle, ...] | None = None

    def take(self, chosen: Tensor) -> "Detections":
        """Returns the detections at `chosen` (indices or a mask), in that order."""
        places = torch.arange(len(self.scores), device=self.scores.device)[chosen].tolist()
        return Detections(
            boxes_xyxy=self.boxes_xyxy[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            queries=self.queries[chosen],
            masks=None if self.masks is None else tuple(self.masks[place] for place in places),
        )


def postprocess(
    logits: Float[Tensor, "batch num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "batch num_queries 4"],
    original_sizes_hw: Int[Tensor, "batch 2"],
    *,
    max_detections: int,
) -> list[Detections]:
    """Returns each image's best (query, class) pairs as detections, best score first.

    One query may appear under several classes. A logit of -inf marks a class that is not in use
    and is never returned, so an image can have fewer than `max_detections`. Among equal logits
    the earlier query, then the earlier class, comes first: the same output on every device.

    Args:
        logits: of one decoder layer; scores are their sigmoid.
        boxes_cxcywh: normalised by the un-padded picture, so 1.0 is its edge.
        original_sizes_hw: sizes of the files on disk, in pixels; boxes are clamped to them.
        max_detections: the most to keep for one image.

    Raises:
        CorruptArtefactError: a logit is NaN or a chosen box is not finite.
    """
    per_image = zip(logits.float(), boxes_cxcywh.float(), original_sizes_hw.tolist(), strict=True)
    return [
        _detections_of_image(image_logits, image_boxes, height, width, max_detections)
        for image_logits, image_boxes, (height, width) in per_image
    ]


def _detections_of_image(
    logits: Float[Tensor, "num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "num_queries 4"],
    height: int,
    width: int,
    max_detections: int,
) -> Detections:
    chosen = _best_pairs(logits.flatten(), max_detections)
    queries = chosen // logits.shape[1]
    corners = cxcywh_to_xyxy(boxes_cxcywh[queries])
    if bool(torch.isnan(logits).any()) or not bool(torch.isfinite(corners).all()):
        raise CorruptArtefactError(
            "the student's output is not finite: its weights are damaged or training diverged; "
            "evaluate an earlier checkpoint"
        )
    pixels = corners * corners.new_tensor((width, height, width, height))
    return Detections(
        boxes_xyxy=clip_xyxy(pixels, height=height, width=width),
        scores=logits.flatten()[chosen].sigmoid(),
        labels=chosen % logits.shape[1],
        queries=queries,
    )


def _best_pairs(flat: Float[Tensor, "pairs"], max_detections: int) -> Int[Tensor, "kept"]:
    # topk leaves open which of several equal values it takes; everything at or above its last
    # value, sorted stably, does not. Logits order finer than scores, which saturate at 1.
    last = flat.topk(min(max_detections, len(flat))).values[-1:]
    candidates = ((flat >= last) & (flat > -torch.inf)).nonzero().flatten()
    order = torch.sort(flat[candidates], descending=True, stable=True).indices
    return candidates[order[:max_detections]]
