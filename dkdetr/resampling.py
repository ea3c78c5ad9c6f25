"""Antialiased resampling as matrices: one side's weights, for Pillow's and torchvision's kernels.

Two products, rows of weights times a picture times columns of weights, resample it on any device:
the teacher's crops (pipeline.resampling) and the student's views (dkdetr.data.device_views).
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Interpolation = Literal["bicubic", "bilinear"]

SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}


def axis_weights(
    begin: Shaped[Tensor, "n"],
    end: Shaped[Tensor, "n"],
    size: Shaped[Tensor, "n"],
    place: Shaped[Tensor, "n_or_1 taps"],
    seen: Bool[Tensor, "n taps"],
    *,
    length: int,
    interpolation: Interpolation,
) -> Float[Tensor, "n taps length"]:
    """Returns each output pixel's weights over a whole side of its picture, in float32.

    Pillow's rule: the kernel is as wide as an output pixel where that is wider than an input one,
    is cut off at the window's ends, and its weights sum to 1.

    Args:
        begin: where each window begins on the side, pixels of the picture.
        end: where it ends.
        size: how many pixels the whole window is resampled to.
        place: which of these an output pixel is; outside of 0..size only where it is not `seen`.
        seen: False for output pixels that show nothing of the window; their weights are 0.
        length: pixels of the (padded) picture's side.
        interpolation: which kernel.
    """
    first, last, count = (column.float().view(-1, 1, 1) for column in (begin, end, size))
    step = (last - first) / count
    centre = first + (place.float().unsqueeze(2) + 0.5) * step
    pixel = torch.arange(length, device=begin.device).view(1, 1, -1) + 0.5
    distance = ((pixel - centre) / step.clamp(min=1)).abs()
    inside = (pixel > first) & (pixel < last) & (distance < SUPPORT[interpolation])
    raw = torch.where(inside & seen.unsqueeze(2), _kernel(distance, interpolation), 0)
    return raw / raw.sum(dim=2, keepdim=True).where(seen.unsqueeze(2), 1)


def _kernel(distance: Tensor, interpolation: Interpolation) -> Tensor:
    if interpolation == "bilinear":
        return 1 - distance
    a = -0.5  # Pillow's and torchvision's with antialiasing (Keys 1981)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * a
    return torch.where(distance < 1, near, far)
