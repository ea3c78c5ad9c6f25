"""From boxes to the teacher's view of them: windows, antialiased resampling, fixed batches.

The default crop (method B.4): the box, and the box grown 1.5 times about its centre, each clamped
to the picture, rounded outward to whole pixels and squashed to the teacher's input size; the two
unit embeddings are averaged and normalised again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as resampling

_MIN_SIDE = 2

Interpolation = Literal["bicubic", "bilinear"]
_INTERPOLATION = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


@dataclass(frozen=True)
class CropRule:
    """How a box becomes what the teacher sees.

    `squash` ignores the aspect ratio, so that the whole box is seen; `clip_center` is CLIP's own
    preprocessing (short side to size, centre cut), which shows a 4:1 box's central quarter only.
    """

    mode: Literal["squash", "clip_center"] = "squash"
    scales: tuple[float, ...] = (1.0, 1.5)

    def parts(self) -> dict[str, Any]:
        """Returns the rule as the cache's fingerprint records it."""
        return {
            "mode": self.mode,
            "scales": list(self.scales),
            "combine": "mean of unit vectors, normalised",
            "clamp": "to the picture",
            "rounding": "outward",
            "min_side": _MIN_SIDE,
            "resampling": "torchvision uint8, antialias",
        }


def crop_windows(
    boxes_xyxy: Float[np.ndarray, "num_boxes 4"], rule: CropRule, *, height: int, width: int
) -> Int[np.ndarray, "num_boxes num_scales 4"]:
    """Returns (left, top, right, bottom) in whole pixels of every box at every scale.

    Windows lie in the picture and are at least 2 pixels (or the whole picture) in each direction.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 1, 4)
    scales = np.asarray(rule.scales, dtype=np.float64)[None, :, None]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    half = (boxes[..., 2:] - boxes[..., :2]).clip(min=0) / 2 * scales
    limit = np.array([width, height])
    # A hair inward before rounding outward: 10.000001 from float32 arithmetic is pixel 10, not 11.
    low = np.floor((centre - half).clip(0, limit) + 1e-3).astype(np.int64)
    high = np.ceil((centre + half).clip(0, limit) - 1e-3).astype(np.int64)
    least = np.minimum(_MIN_SIDE, limit)
    low = np.minimum(low, limit - least)
    high = np.maximum(high, low + least)
    return np.concatenate((low, high), axis=-1)


def cut_crops(
    image: UInt8[Tensor, "3 height width"],
    windows: Int[np.ndarray, "num_windows 4"],
    size_hw: tuple[int, int],
    *,
    mode: str = "squash",
    interpolation: Interpolation = "bicubic",
) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
    """Returns the windows of a picture at the teacher's size, resampled with antialiasing.

    On a CPU torchvision's uint8 kernels agree with Pillow's to 2 grey levels and need half its
    time (the design note has the measurement); the picture must be contiguous for that.
    """
    crops = image.new_empty((len(windows), 3, *size_hw))
    how = _INTERPOLATION[interpolation]
    for index, (left, top, right, bottom) in enumerate(windows.tolist()):
        window = image[:, top:bottom, left:right]
        if mode == "squash":
            crop = resampling.resize_image(window, list(size_hw), how, antialias=True)
        else:
            short = resampling.resize_image(window, [min(size_hw)], how, antialias=True)
            crop = resampling.center_crop_image(short, list(size_hw))
        crops[index] = crop
    return crops


def combine_scales(
    embeddings: Float[np.ndarray, "num_boxes num_scales embed_dim"],
) -> Float[np.ndarray, "num_boxes embed_dim"]:
    """Returns the unit vector along the mean of each box's unit vectors."""
    mean = embeddings.astype(np.float32).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True).clip(min=1e-12)


def embed_stream(
    stacks: Iterable[UInt8[Tensor, "_ 3 crop_height crop_width"]],
    encode: Callable[[Tensor], np.ndarray],
    *,
    batch_size: int,
) -> Iterator[Float[np.ndarray, "_ embed_dim"]]:
    """Yields each stack's embeddings, in order, computed in batches of exactly `batch_size`.

    Batches run across stacks and the last one is padded with black, so that a crop's batch, and
    with it every bit of its embedding, depends on the stacks alone (an encoder's output changes
    in the last digits with the batch's size and a row's place in it).

    Args:
        stacks: crops, a stack for each picture; a stack may be empty, but not all of them.
        encode: crops [batch_size, 3, h, w] to float32 rows of unit norm.
        batch_size: crops at once.
    """
    waiting: deque[int] = deque()  # sizes of stacks not yet yielded
    crops: list[Tensor] = []
    num_crops = 0
    rows: list[np.ndarray] = []
    num_rows = 0
    for stack in stacks:
        waiting.append(len(stack))
        crops.append(stack)
        num_crops += len(stack)
        while num_crops >= batch_size:
            joined = torch.cat(crops)
            rows.append(encode(joined[:batch_size]))
            num_rows += batch_size
            crops, num_crops = [joined[batch_size:]], num_crops - batch_size
        while waiting and waiting[0] <= num_rows and rows:
            size = waiting.popleft()
            joined_rows = np.concatenate(rows)
            rows, num_rows = [joined_rows[size:]], num_rows - size
            yield joined_rows[:size]
    if num_crops:
        last = torch.cat(crops)
        padding = last.new_zeros((batch_size - num_crops, *last.shape[1:]))
        rows.append(encode(torch.cat((last, padding)))[:num_crops])
    for size in waiting:
        joined_rows = np.concatenate(rows)
        rows = [joined_rows[size:]]
        yield joined_rows[:size]
