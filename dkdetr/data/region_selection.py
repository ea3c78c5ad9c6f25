"""Which cached regions of a view are distilled (method B.3, B.5)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import nms

from dkdetr.boxes import clip_xyxy, pairwise_iou, visible_fraction
from dkdetr.config import RegionSelectionConfig
from dkdetr.data.transforms import ViewGeometry


@dataclass(frozen=True)
class SelectedRegions:
    """Rows of an image's cached regions, most object-like first, and their anchors in the view."""

    indices: Int[Tensor, "num_selected"]
    boxes_cxcywh: Float[Tensor, "num_selected 4"]


def select_regions(
    boxes_xyxy: Float[Tensor, "n 4"],
    objectness: Float[Tensor, "n"],
    cached_max_base_iou: Float[Tensor, "n"],
    *,
    base_boxes_xyxy: Float[Tensor, "m 4"],
    geometry: ViewGeometry,
    num_regions: int,
    settings: RegionSelectionConfig,
) -> SelectedRegions:
    """Returns at most `num_regions` regions of a view, without randomness.

    Dropped are regions that overlap a base object (IoU in the original image, with *all* base
    boxes, those that the crop removed included; the greater of the cached and the recomputed
    value), that the view shows too little of, or that are too small in it. Of the rest,
    non-maximum suppression in the view and then the highest objectness decide; ties keep the
    cache's order. Novel annotations have no say.

    Args:
        boxes_xyxy: cached regions, pixels of the original image.
        objectness: their scores.
        cached_max_base_iou: their greatest IoU with a base object as stage 1 saw it.
        base_boxes_xyxy: all base ground truth of the image, pixels of the original image.
        geometry: how the view was made.
        num_regions: the most that are wanted.
        settings: the thresholds.
    """
    height, width = geometry.view_hw
    regions = boxes_xyxy.to(torch.float64)
    base = base_boxes_xyxy.to(torch.float64)
    base_iou = cached_max_base_iou.to(torch.float64)
    if len(base) and len(regions):
        base_iou = torch.maximum(base_iou, pairwise_iou(regions, base).amax(dim=1))
    moved = geometry.move_boxes(regions)
    clipped = clip_xyxy(moved, height=height, width=width)
    shortest_side = (clipped[:, 2:] - clipped[:, :2]).amin(dim=1)
    eligible = (
        (base_iou < settings.max_base_iou)
        & (visible_fraction(moved, height=height, width=width) >= settings.min_visible)
        & (shortest_side >= settings.min_side)
    )
    indices = eligible.nonzero().squeeze(1)
    ranking = torch.sort(objectness[indices], descending=True, stable=True).indices
    indices = indices[ranking]
    # The rank stands for the score, so that no two are equal and the result is a function.
    falling = -torch.arange(len(indices), dtype=clipped.dtype)
    kept = nms(clipped[indices], falling, settings.nms_iou)
    chosen = indices[kept[:num_regions]]
    return SelectedRegions(chosen, geometry.normalise(clipped[chosen]).to(torch.float32))
