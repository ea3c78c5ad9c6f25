"""From the student's output to detections: no threshold, no suppression (method A.5)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dkdetr.boxes import cxcywh_to_xyxy
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
    """Returns each image's best (query, class) pairs as detections, best score first, on the CPU.

    `unpack` of what `choose_best` says.

    Raises:
        CorruptArtefactError: see `unpack`.
    """
    best = choose_best(logits, boxes_cxcywh, original_sizes_hw, max_detections=max_detections)
    return unpack(best.cpu(), logits.shape[2])


def choose_best(
    logits: Float[Tensor, "batch num_queries num_classes"],
    boxes_cxcywh: Float[Tensor, "batch num_queries 4"],
    original_sizes_hw: Int[Tensor, "batch 2"],
    *,
    max_detections: int,
) -> Float[Tensor, "batch numbers"]:
    """Returns each image's best (query, class) pairs, best score first, packed for `unpack`.

    One query may appear under several classes. A logit of -inf marks a class that is not in use
    and is never returned, so an image can have fewer than `max_detections`. Among equal logits
    the earlier query, then the earlier class, comes first: the same output on every device. All
    is chosen where the logits are, and nothing is waited for; one copy brings the batch back.

    Args:
        logits: of one decoder layer; scores are their sigmoid.
        boxes_cxcywh: normalised by the un-padded picture, so 1.0 is its edge.
        original_sizes_hw: sizes of the files on disk, in pixels; boxes are clamped to them.
        max_detections: the most to keep for one image.
    """
    num_classes = logits.shape[2]
    # -0.0 becomes 0.0: they are equal, but not their bits.
    flat = logits.float().flatten(1) + 0.0
    chosen = _best_pairs(flat, max_detections)
    best = flat.gather(1, chosen)
    queries = chosen // num_classes
    corners = cxcywh_to_xyxy(boxes_cxcywh.float())
    corners = corners.gather(1, queries[..., None].expand(-1, -1, 4))
    scale = original_sizes_hw.to(corners).flip(-1).repeat(1, 2)[:, None]
    pixels = torch.minimum((corners * scale).clamp(min=0), scale)
    used = best > -torch.inf
    broken = flat.isnan().any(dim=1) | (~corners.isfinite().all(dim=2) & used).any(dim=1)
    # Indices are whole numbers below 2^53 in float64, as float32 corners and scores are exact.
    columns = (pixels.double(), best.sigmoid().double()[..., None], chosen.double()[..., None])
    facts = torch.stack((used.sum(dim=1), broken), dim=1).double()
    return torch.cat((torch.cat(columns, dim=2).flatten(1), facts), dim=1)


def unpack(packed: Float[Tensor, "batch numbers"], num_classes: int) -> list[Detections]:
    """Returns what `choose_best` packed, on the CPU by now.

    Raises:
        CorruptArtefactError: a logit is NaN or a chosen box is not finite.
    """
    return [_unpack(row, num_classes) for row in packed]


def _unpack(row: Float[Tensor, "numbers"], num_classes: int) -> Detections:
    count, broken = row[-2:].int().tolist()
    if broken:
        raise CorruptArtefactError(
            "the student's output is not finite: its weights are damaged or training diverged; "
            "evaluate an earlier checkpoint"
        )
    table = row[:-2].view(-1, 6)[:count]
    chosen = table[:, 5].long()
    return Detections(
        boxes_xyxy=table[:, :4].float(),
        scores=table[:, 4].float(),
        labels=chosen % num_classes,
        queries=chosen // num_classes,
    )


def _best_pairs(
    flat: Float[Tensor, "batch pairs"], max_detections: int
) -> Int[Tensor, "batch kept"]:
    """Returns the places of the greatest values, the earlier first of equal ones.

    topk leaves open which of several equal values it takes. So each value's bits, as an integer
    that orders as the values do, stand before its place in one number of 64 bits: no two are equal.
    Logits order finer than scores, which saturate at 1.
    """
    bits = flat.view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    places = torch.arange(flat.shape[1], device=flat.device)
    keys = (ordered << 32) - places
    return keys.topk(min(max_detections, flat.shape[1]), dim=1).values.neg() & 0xFFFFFFFF
