"""Windows of a picture at the teacher's size, resampled with antialiasing on the picture's device.

On a CPU torchvision's uint8 kernels, window by window: they agree with Pillow's to 2 grey levels
and need half its time. On an accelerator hundreds of small kernels would wait for their launches,
so there a window is two matrix products, dozens of windows at once: rows of weights times the
picture times columns of weights. Tests run both on a CPU and hold both against Pillow.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as kernels

from dkdetr.resampling import Interpolation, axis_weights

Placement = Literal["squash", "clip_center", "pad_square"]

_MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
_WINDOWS_AT_ONCE = 64


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


@dataclass(frozen=True)
class _Fit:
    """The size a window is resampled to, and where the input's first row and column lie in it."""

    size_hw: tuple[int, int]
    offset_yx: tuple[int, int]


def resampling_on(device: torch.device) -> str:
    """Returns the way of resampling on a device, as the cache's fingerprint records it."""
    if device.type == "cpu":
        return "torchvision uint8, antialias"
    return "matrix products, float16, antialias"


def cut_windows(
    image: UInt8[Tensor, "3 height width"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
    """Returns the windows (left, top, right, bottom) of a contiguous picture, on its device."""
    if image.device.type == "cpu":
        return cut_one_by_one(image, windows, look)
    return cut_by_matrices(image, windows, look, dtype=torch.float16)


def cut_one_by_one(
    image: UInt8[Tensor, "3 height width"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
    """Returns the windows by torchvision's uint8 kernels."""
    height, width = look.size_hw
    crops = torch.tensor(look.fill, dtype=torch.uint8).view(1, 3, 1, 1)
    crops = crops.repeat(len(windows), 1, height, width)
    how = _MODES[look.interpolation]
    for index, (left, top, right, bottom) in enumerate(windows.tolist()):
        fit = _fit((bottom - top, right - left), look)
        window = image[:, top:bottom, left:right]
        resized = kernels.resize_image(window, list(fit.size_hw), how, antialias=True)
        y, x = fit.offset_yx
        seen = resized[:, max(0, y) : y + height, max(0, x) : x + width]
        y, x = max(0, -y), max(0, -x)
        crops[index, :, y : y + seen.shape[1], x : x + seen.shape[2]] = seen
    return crops


def cut_by_matrices(
    image: UInt8[Tensor, "3 height width"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
    *,
    dtype: torch.dtype,
) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
    """Returns the windows by matrix products in `dtype`.

    float16 holds a grey level exactly and a weight to 1/2048; what it rounds in between is less
    than half a grey level.
    """
    device = image.device
    _, height, width = image.shape
    fits = [_fit((b - t, r - left), look) for left, t, r, b in windows.tolist()]
    sizes = np.array([fit.size_hw for fit in fits]).reshape(-1, 2)
    offsets = np.array([fit.offset_yx for fit in fits]).reshape(-1, 2)
    fill = torch.tensor(look.fill, device=device, dtype=torch.uint8).view(1, 3, 1, 1)
    crops = torch.empty((len(windows), 3, *look.size_hw), dtype=torch.uint8, device=device)
    pixels = image.to(dtype).view(3 * height, width)
    for start in range(0, len(windows), _WINDOWS_AT_ONCE):
        part = slice(start, start + _WINDOWS_AT_ONCE)
        axes = [
            _weights(
                _on(device, windows[part, axis], windows[part, axis + 2], sizes[part, 1 - axis],
                    offsets[part, 1 - axis]),
                length=length,
                taps=look.size_hw[1 - axis],
                interpolation=look.interpolation,
            )
            for axis, length in ((0, width), (1, height))
        ]  # fmt: skip
        (across, seen_x), (down, seen_y) = axes
        rows = (pixels @ across.to(dtype).mT).view(-1, 3, height, look.size_hw[1])
        rows = rows.round().clamp(0, 255)  # whole grey levels between the passes, as Pillow has
        found = (down.to(dtype).unsqueeze(1) @ rows).float().round().clamp(0, 255).byte()
        seen = seen_y[:, None, :, None] & seen_x[:, None, None, :]
        crops[part] = torch.where(seen, found, fill)
    return crops


def _fit(window_hw: tuple[int, int], look: Look) -> _Fit:
    """Returns how a window fills the input; whole numbers as torchvision's Resize has them."""
    (h, w), (height, width) = window_hw, look.size_hw
    if look.placement == "squash":
        return _Fit(look.size_hw, (0, 0))
    tall = height * w >= width * h  # the height needs the greater factor
    if look.placement == "clip_center":
        size = (height, w * height // h) if tall else (h * width // w, width)
        return _Fit(size, (round((size[0] - height) / 2), round((size[1] - width) / 2)))
    size = (
        (max(1, round(h * width / w)), width) if tall else (height, max(1, round(w * height / h)))
    )
    return _Fit(size, (-((height - size[0]) // 2), -((width - size[1]) // 2)))


def _weights(
    axis: Float[Tensor, "num_windows 4"],
    *,
    length: int,
    taps: int,
    interpolation: Interpolation,
) -> tuple[Float[Tensor, "num_windows taps length"], Bool[Tensor, "num_windows taps"]]:
    """Returns each output pixel's weights over a whole side of the picture, and which are seen.

    Args:
        axis: begin and end of each window, its resampled size, and the first output pixel in it.
        length: of the picture's side.
        taps: output pixels.
        interpolation: which kernel.
    """
    begin, end, size, offset = axis.unbind(1)
    place = torch.arange(taps, device=axis.device) + offset[:, None]
    seen = (place >= 0) & (place < size[:, None])
    weights = axis_weights(
        begin, end, size, place, seen, length=length, interpolation=interpolation
    )
    return weights, seen


def _on(device: torch.device, *columns: np.ndarray) -> Float[Tensor, "num_windows num_columns"]:
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32)).to(device)
