"""Which of the student's own anchors stands for which teacher region (method B.2)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import nms  # pyright: ignore[reportMissingTypeStubs]

from dkdetr.boxes import cxcywh_to_xyxy, pairwise_iou


def assign_by_overlap(
    anchors_cxcywh: Float[Tensor, "batch num_queries 4"],
    regions_cxcywh: Float[Tensor, "batch num_regions 4"],
    allowed: Bool[Tensor, "batch num_regions num_queries"],
    *,
    min_iou: float,
) -> tuple[Int[Tensor, "batch num_regions"], Bool[Tensor, "batch num_regions"]]:
    """Returns each region's query, and whether it has one (if not, the index means nothing).

    One to one: of all allowed pairs that overlap by `min_iou` the one with the greatest overlap is
    taken, then the greatest of those left, and so on; equal ones in the order of regions and
    then of queries. So a region gets the query that overlaps it most unless another region has
    more of that query.
    """
    batch, num_regions = regions_cxcywh.shape[:2]
    num_queries = anchors_cxcywh.shape[1]
    query = torch.zeros(batch, num_regions, dtype=torch.long, device=regions_cxcywh.device)
    found = torch.zeros_like(query, dtype=torch.bool)
    if num_regions == 0 or num_queries == 0:
        return query, found
    overlap = pairwise_iou(cxcywh_to_xyxy(regions_cxcywh), cxcywh_to_xyxy(anchors_cxcywh))
    overlap = overlap.masked_fill(~allowed | (overlap < min_iou), -1.0)
    image = torch.arange(batch, device=query.device)
    # Without a question to the device in between: a fixed number of rounds for the whole batch.
    for _ in range(min(num_regions, num_queries)):
        best, place = overlap.flatten(1).max(dim=1)
        row, column = place // num_queries, place % num_queries
        taken = best >= 0
        query[image, row] = torch.where(taken, column, query[image, row])
        found[image, row] |= taken
        overlap[image, row] = -1.0
        overlap[image, :, column] = -1.0
    return query, found


def first_by_rank(
    query: Int[Tensor, "batch num_regions"],
    found: Bool[Tensor, "batch num_regions"],
    count: int,
) -> Int[Tensor, "batch kept"]:
    """Returns which `count` regions to keep: those of the best-ranked queries, empty ones last."""
    behind = torch.iinfo(query.dtype).max
    order = torch.where(found, query, behind).sort(dim=1, stable=True).indices
    return order[:, :count]


def select_own_anchors(
    anchors_xyxy: Float[Tensor, "num_queries 4"],
    eligible: Bool[Tensor, "num_queries"],
    *,
    count: int,
    nms_iou: float,
    min_side: float,
) -> Int[Tensor, "num_selected"]:
    """Returns at most `count` anchors of one image (pixels), best-ranked first, for `online`.

    Small ones are left out and non-maximum suppression is applied; `nms_iou` = 1 and `min_side`
    = 0 leave all eligible ones in (the paper).
    """
    side = (anchors_xyxy[:, 2:] - anchors_xyxy[:, :2]).amin(dim=1)
    indices = (eligible & (side >= min_side)).nonzero().squeeze(1)
    if nms_iou < 1:
        falling = -torch.arange(len(indices), dtype=anchors_xyxy.dtype, device=indices.device)
        indices = indices[nms(anchors_xyxy[indices], falling, nms_iou)]
    return indices[:count]


def overlaps_base(
    anchors_cxcywh: Float[Tensor, "num_queries 4"],
    base_cxcywh: Float[Tensor, "num_boxes 4"],
    *,
    max_base_iou: float,
) -> Bool[Tensor, "num_queries"]:
    """Returns which anchors overlap a base object by at least `max_base_iou`."""
    if len(base_cxcywh) == 0:
        return torch.zeros(len(anchors_cxcywh), dtype=torch.bool, device=anchors_cxcywh.device)
    overlap = pairwise_iou(cxcywh_to_xyxy(anchors_cxcywh), cxcywh_to_xyxy(base_cxcywh))
    return (overlap >= max_base_iou).any(dim=1)
