"""Windows of a picture at the teacher's size, resampled with antialiasing on the picture's device.

On a CPU torchvision's uint8 kernels, window by window: they agree with Pillow's to 2 grey levels
and need half its time. On a GPU the kernels of `crop_kernels`, all windows of a chunk of pictures
at once, which give Pillow's pixels. Where Triton does not run, a window is two matrix products,
dozens of windows at once, of several pictures: rows of weights times the picture times columns of
weights. Tests run all three on a CPU and hold them against Pillow.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as kernels

from dkdetr.resampling import Interpolation, axis_weights
from pipeline.crop_backend import cuts_by_kernel
from pipeline.window_fit import Look, fit_windows

_MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
_WINDOWS_AT_ONCE = 64


def resampling_on(device: torch.device) -> str:
    """Returns the way of resampling on a device, as the cache's fingerprint records it."""
    if device.type == "cpu":
        return "torchvision uint8, antialias"
    if cuts_by_kernel(device):
        return "Pillow's rule in whole numbers, across then down, antialias"
    return "matrix products across pictures, float16, antialias"


def cut_windows(
    image: UInt8[Tensor, "3 height width"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
    """Returns the windows (left, top, right, bottom) of a picture, on its device."""
    return next(cut_pictures([image], [windows], look))


def cut_pictures(
    images: Sequence[UInt8[Tensor, "3 _h _w"]],
    windows: Sequence[Int[np.ndarray, "_ 4"]],
    look: Look,
) -> Iterator[UInt8[Tensor, "_ 3 crop_height crop_width"]]:
    """Yields each picture's windows, in order; the pictures are on one device."""
    if images and images[0].device.type != "cpu":
        if cuts_by_kernel(images[0].device):
            yield from cut_by_kernel(images, windows, look)
        else:
            yield from cut_together(images, windows, look, dtype=torch.float16)
        return
    for image, wanted in zip(images, windows, strict=True):
        # torchvision has another kernel, of other last bits, for pixels side by side.
        yield cut_one_by_one(image.contiguous(), wanted, look)


def cut_by_kernel(
    images: Sequence[UInt8[Tensor, "3 _h _w"]],
    windows: Sequence[Int[np.ndarray, "_ 4"]],
    look: Look,
) -> Iterator[UInt8[Tensor, "_ 3 crop_height crop_width"]]:
    """Yields each picture's windows, cut by the Triton kernels; nothing waits for the device."""
    from pipeline.crop_launch import cut_in_parts

    owners, flat, counts = _flat(windows)
    yield from _by_picture(cut_in_parts(images, owners, flat, look), counts, images, look)


def cut_one_by_one(
    image: UInt8[Tensor, "3 height width"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
    """Returns the windows of a contiguous picture by torchvision's uint8 kernels."""
    height, width = look.size_hw
    crops = torch.tensor(look.fill, dtype=torch.uint8).view(1, 3, 1, 1)
    crops = crops.repeat(len(windows), 1, height, width)
    how = _MODES[look.interpolation]
    fits = fit_windows(windows, look)
    fitted = zip(fits.sizes_hw.tolist(), fits.offsets_yx.tolist(), strict=True)
    for index, (size, (y, x)) in enumerate(fitted):
        left, top, right, bottom = windows[index].tolist()
        window = image[:, top:bottom, left:right]
        resized = kernels.resize_image(window, size, how, antialias=True)
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
    owners, flat, counts = _flat(windows)
    starts = range(0, len(flat), _WINDOWS_AT_ONCE)
    parts = (slice(start, start + _WINDOWS_AT_ONCE) for start in starts)
    stacks = (_cut_chunk(images, owners[part], flat[part], look, dtype) for part in parts)
    yield from _by_picture(stacks, counts, images, look)


def _flat(
    windows: Sequence[Int[np.ndarray, "_ 4"]],
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n 4"], list[int]]:
    """Returns each window's picture, all windows, and how many a picture has."""
    counts = [len(each) for each in windows]
    flat = np.concatenate([*windows, np.zeros((0, 4), dtype=np.int64)])
    return np.repeat(np.arange(len(windows)), counts), flat, counts


def _by_picture(
    stacks: Iterator[UInt8[Tensor, "_ 3 crop_height crop_width"]],
    counts: Sequence[int],
    images: Sequence[Tensor],
    look: Look,
) -> Iterator[UInt8[Tensor, "_ 3 crop_height crop_width"]]:
    """Yields each picture's crops out of stacks that end where they like."""
    if not images:
        return
    kept = images[0].new_empty((0, 3, *look.size_hw))
    for count in counts:
        parts = [kept[:count]]
        missing, kept = count - len(parts[0]), kept[count:]
        while missing:
            stack = next(stacks)
            parts.append(stack[:missing])
            missing, kept = missing - len(parts[-1]), stack[missing:]
        full = [part for part in parts if len(part)] or parts
        yield torch.cat(full) if len(full) > 1 else full[0]


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
    fits = fit_windows(windows, look)
    sizes, offsets = fits.sizes_hw, fits.offsets_yx
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
        pixels = images[index].to(dtype).reshape(3 * h, w)
        found = pixels @ across[place, :, :w].mT
        rows[place, :, :h] = found.view(-1, 3, h, look.size_hw[1])
    rows = (rows + 0.5).floor().clamp(0, 255)  # whole grey levels between the passes, as Pillow has
    crops = ((down.unsqueeze(1) @ rows).float() + 0.5).floor().clamp(0, 255).byte()
    seen = seen_y[:, :, None] & seen_x[:, None, :]
    for channel, level in enumerate(look.fill):  # a number, which no copy takes to the device
        crops[:, channel].masked_fill_(~seen, level)
    return crops


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
    numbers = torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))
    if device.type == "cuda":  # pageable memory would make the CPU wait
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)
