"""How a window of a picture is fitted into the teacher's input: its size there, and its place."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from dkdetr.resampling import Interpolation

Placement = Literal["squash", "clip_center", "pad_square"]


@dataclass(frozen=True)
class Look:
    """How a window is fitted into the teacher's input.

    `squash` stretches it; `clip_center` scales its short side to the input and cuts the centre out;
    `pad_square` scales its long side and fills the rest with the colour `fill`.
    """

    size_hw: tuple[int, int]
    placement: Placement = "squash"
    interpolation: Interpolation = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class Fits:
    """What windows are resampled to, and where the input's first row and column lie in that."""

    sizes_hw: Int[np.ndarray, "num_windows 2"]
    offsets_yx: Int[np.ndarray, "num_windows 2"]


def fit_windows(windows: Int[np.ndarray, "num_windows 4"], look: Look) -> Fits:
    """Returns how windows fill the input; whole numbers as torchvision's Resize has them.

    Args:
        windows: left, top, right, bottom.
        look: the input.
    """
    left, top, right, bottom = windows.T
    (h, w), (height, width) = (bottom - top, right - left), look.size_hw
    target = np.broadcast_to(np.array([height, width]), (len(windows), 2))
    if look.placement == "squash":
        return Fits(target, np.zeros_like(target))
    tall = height * w >= width * h  # the height needs the greater factor
    if look.placement == "clip_center":
        sizes = np.where(tall, (height + 0 * w, w * height // h), (h * width // w, width + 0 * h)).T
        return Fits(sizes, np.rint((sizes - target) / 2).astype(np.int64))
    down, across = np.rint(h * width / w), np.rint(w * height / h)
    sizes = np.where(tall, (down, width + 0 * h), (height + 0 * w, across)).T
    sizes = sizes.clip(min=1).astype(np.int64)
    return Fits(sizes, -((target - sizes) // 2))
