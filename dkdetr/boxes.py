"""Pure box geometry. Every function names the formats it takes and gives.

`xyxy` is (left, top, right, bottom); `cxcywh` is (centre x, centre y, width, height). Pixel
coordinates are continuous: a box that covers the first pixel is (0, 0, 1, 1).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Returns the same boxes as (left, top, right, bottom)."""
    centre, size = boxes_cxcywh.chunk(2, dim=-1)
    half = size / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Returns the same boxes as (centre x, centre y, width, height)."""
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    centre_and_size = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return torch.stack(centre_and_size, dim=-1)


def box_area(boxes_xyxy: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Returns areas; a box turned inside out has area 0."""
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def pairwise_intersection(
    boxes_a_xyxy: Float[Tensor, "*batch a 4"], boxes_b_xyxy: Float[Tensor, "*batch b 4"]
) -> Float[Tensor, "*batch a b"]:
    """Returns the area that each box of `a` shares with each box of `b`."""
    top_left = torch.maximum(boxes_a_xyxy[..., :, None, :2], boxes_b_xyxy[..., None, :, :2])
    bottom_right = torch.minimum(boxes_a_xyxy[..., :, None, 2:], boxes_b_xyxy[..., None, :, 2:])
    size = (bottom_right - top_left).clamp(min=0)
    return size[..., 0] * size[..., 1]


def pairwise_iou(
    boxes_a_xyxy: Float[Tensor, "*batch a 4"], boxes_b_xyxy: Float[Tensor, "*batch b 4"]
) -> Float[Tensor, "*batch a b"]:
    """Returns intersection over union of each pair; 0 where both boxes are empty."""
    shared = pairwise_intersection(boxes_a_xyxy, boxes_b_xyxy)
    areas = box_area(boxes_a_xyxy)[..., :, None] + box_area(boxes_b_xyxy)[..., None, :]
    return shared / (areas - shared).clamp(min=torch.finfo(shared.dtype).tiny)


def elementwise_giou(
    boxes_a_xyxy: Float[Tensor, "*#batch 4"], boxes_b_xyxy: Float[Tensor, "*#batch 4"]
) -> Float[Tensor, "*batch"]:
    """Returns generalised IoU, in [-1, 1], of boxes paired by position (arXiv 1902.09630).

    Of each pair: with `boxes_a_xyxy[..., :, None, :]` and `boxes_b_xyxy[..., None, :, :]`.
    """
    # Both axes at once: half the kernels. Where there are many pairs on a CPU, let coordinates be
    # planes of their own (a view of [4, ...]): several times faster there than pairs of numbers.
    top_left_a, bottom_right_a = boxes_a_xyxy.chunk(2, dim=-1)
    top_left_b, bottom_right_b = boxes_b_xyxy.chunk(2, dim=-1)
    shared = _area(
        torch.maximum(top_left_a, top_left_b), torch.minimum(bottom_right_a, bottom_right_b)
    )
    union = _area(top_left_a, bottom_right_a) + _area(top_left_b, bottom_right_b) - shared
    hull = _area(
        torch.minimum(top_left_a, top_left_b), torch.maximum(bottom_right_a, bottom_right_b)
    )
    tiny = torch.finfo(shared.dtype).tiny
    return shared / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _area(
    top_left: Float[Tensor, "*batch 2"], bottom_right: Float[Tensor, "*batch 2"]
) -> Float[Tensor, "*batch"]:
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


def clip_xyxy(
    boxes_xyxy: Float[Tensor, "*batch 4"], *, height: float, width: float
) -> Float[Tensor, "*batch 4"]:
    """Returns the boxes cut at the borders of a `height` x `width` view."""
    x = boxes_xyxy[..., 0::2].clamp(0, width)
    y = boxes_xyxy[..., 1::2].clamp(0, height)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)


def visible_fraction(
    boxes_xyxy: Float[Tensor, "*batch 4"], *, height: float, width: float
) -> Float[Tensor, "*batch"]:
    """Returns the share of each box's area that lies in a `height` x `width` view; 0 if empty."""
    area = box_area(boxes_xyxy)
    seen = box_area(clip_xyxy(boxes_xyxy, height=height, width=width))
    return torch.where(area > 0, seen / area.clamp(min=torch.finfo(area.dtype).tiny), 0)


def nms_keep(
    boxes_xyxy: Float[Tensor, "n 4"], scores: Float[Tensor, "n"], *, iou_threshold: float
) -> Bool[Tensor, "n"]:
    """Returns which boxes greedy non-maximum suppression keeps, best score first.

    Ties keep their order of input, so the result does not depend on a sort's whim. Written with
    one matrix of overlaps: meant for the few hundred boxes of one image.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    overlaps = pairwise_iou(boxes_xyxy[order], boxes_xyxy[order]) > iou_threshold
    kept_in_order = torch.ones(len(order), dtype=torch.bool, device=boxes_xyxy.device)
    for rank in range(len(order)):
        if kept_in_order[rank]:
            kept_in_order[rank + 1 :] &= ~overlaps[rank, rank + 1 :]
    keep = torch.zeros_like(kept_in_order)
    keep[order] = kept_in_order
    return keep


def inverse_sigmoid(x: Float[Tensor, "*shape"], *, eps: float = 1e-6) -> Float[Tensor, "*shape"]:
    """Returns log(x / (1 - x)) for x in [0, 1], finite at both ends; wants float32 or wider.

    `eps` bounds what comes back from the ends: a thousandth of a pixel at 1024 pixels. Deformable
    DETR's 1e-5 would be a hundredth.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
