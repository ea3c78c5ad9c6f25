"""Windows of a picture at the teacher's size, resampled with antialiasing on the picture's device.

On a CPU torchvision's uint8 kernels, window by window: they agree with Pillow's to 2 grey levels
and need half its time. On an accelerator hundreds of small kernels would wait for their launches,
so there a window is two matrix products, dozens of windows at once, of several pictures: rows of
weights times the picture times columns of weights. Tests run both on a CPU and hold both against
Pillow.
"""

from collections.abc import Iterator, Sequence
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
    return "matrix products across pictures, float16, antialias"


def cut_windows(
    image: UInt8[Tensor, "3 height width"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
    """Returns the windows (left, top, right, bottom) of a contiguous picture, on its device."""
    return next(cut_pictures([image], [windows], look))


def cut_pictures(
    images: Sequence[UInt8[Tensor, "3 _h _w"]],
    windows: Sequence[Int[np.ndarray, "_ 4"]],
    look: Look,
) -> Iterator[UInt8[Tensor, "_ 3 crop_height crop_width"]]:
    """Yields each picture's windows, in order; the pictures are contiguous and on one device."""
    if images and images[0].device.type != "cpu":
        yield from cut_together(images, windows, look, dtype=torch.float16)
        return
    for image, wanted in zip(images, windows, strict=True):
        yield cut_one_by_one(image, wanted, look)


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
    """Returns the windows of one picture as `cut_together` cuts them."""
    return next(cut_together([image], [windows], look, dtype=dtype))


def cut_together(
    images: Sequence[UInt8[Tensor, "3 _h _w"]],
    windows: Sequence[Int[np.ndarray, "_ 4"]],
    look: Look,
    *,
    dtype: torch.dtype,
) -> Iterator[UInt8[Tensor, "_ 3 crop_height crop_width"]]:
    """Yields each picture's windows, cut by matrix products that run across pictures.

    float16 holds a grey level exactly and a weight to 1/2048; what it rounds in between is less
    than half a grey level.
    """
    counts = [len(each) for each in windows]
    ends = np.cumsum(counts)
    flat = np.concatenate([*windows, np.zeros((0, 4), dtype=np.int64)])
    owners = np.repeat(np.arange(len(images)), counts)
    done: list[Tensor] = []
    picture = cut = 0
    for start in range(0, len(flat), _WINDOWS_AT_ONCE):
        part = slice(start, start + _WINDOWS_AT_ONCE)
        done.append(_cut_chunk(images, owners[part], flat[part], look, dtype))
        reached = start + len(done[-1])
        while picture < len(images) and ends[picture] <= reached:
            joined = torch.cat(done)
            yield joined[: ends[picture] - cut]
            done, cut, picture = [joined[ends[picture] - cut :]], int(ends[picture]), picture + 1
    for image in images[picture:]:  # those at the end that have no window
        yield image.new_empty((0, 3, *look.size_hw))


def _cut_chunk(
    images: Sequence[Tensor],
    owners: Int[np.ndarray, "num_windows"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
    dtype: torch.dtype,
) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
    seen_pictures = np.unique(owners).tolist()
    device = images[0].device
    height = max(images[index].shape[1] for index in seen_pictures)
    width = max(images[index].shape[2] for index in seen_pictures)
    fits = [_fit((b - t, r - left), look) for left, t, r, b in windows.tolist()]
    sizes = np.array([fit.size_hw for fit in fits])
    offsets = np.array([fit.offset_yx for fit in fits])
    axes = [
        _weights(
            _on(device, windows[:, axis], windows[:, axis + 2], sizes[:, 1 - axis],
                offsets[:, 1 - axis]),
            length=length,
            taps=look.size_hw[1 - axis],
            interpolation=look.interpolation,
        )
        for axis, length in ((0, width), (1, height))
    ]  # fmt: skip
    (across, seen_x), (down, seen_y) = axes
    across, down = across.to(dtype), down.to(dtype)
    rows = torch.zeros((len(windows), 3, height, look.size_hw[1]), dtype=dtype, device=device)
    for index in seen_pictures:
        mine = np.flatnonzero(owners == index)
        place, (_, h, w) = slice(int(mine[0]), int(mine[-1]) + 1), images[index].shape
        pixels = images[index].to(dtype).view(3 * h, w)
        found = pixels @ across[place, :, :w].mT
        rows[place, :, :h] = found.view(-1, 3, h, look.size_hw[1])
    rows = (rows + 0.5).floor().clamp(0, 255)  # whole grey levels between the passes, as Pillow has
    crops = ((down.unsqueeze(1) @ rows).float() + 0.5).floor().clamp(0, 255).byte()
    seen = seen_y[:, None, :, None] & seen_x[:, None, None, :]
    fill = torch.tensor(look.fill, device=device, dtype=torch.uint8).view(1, 3, 1, 1)
    return torch.where(seen, crops, fill)


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
