"""Windows of many pictures cut by the Triton kernels: one table, one copy, three launches a part.

Nothing here waits for the device. Windows are cut in parts of at most `_PART_BYTES` of crops and of
what lies between the passes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from jaxtyping import Int, UInt8
from torch import Tensor

from dkdetr.resampling import SUPPORT
from dkdetr.triton_trial import on
from pipeline import crop_kernels as kernels
from pipeline.window_fit import Look, fit_windows

_PART_BYTES = 1 << 29


@dataclass(frozen=True)
class _Blocks:
    """What a program does at once: output pixels weighed; rows and columns of a pass."""

    weighed: int
    rows: int
    columns: int


_ON_GPU = _Blocks(128, 8, 64)
_INTERPRETED = _Blocks(64, 32, 64)


@dataclass(frozen=True, eq=False)
class _Table:
    """A row of `crop_kernels`' columns for each window; places count from a part's beginning."""

    rows: Int[np.ndarray, "num_windows num_columns"]
    parts: tuple["_Part", ...]


@dataclass(frozen=True)
class _Part:
    """Windows that are cut together, and what they take: rows of the highest, numbers, bytes."""

    start: int
    stop: int
    most_rows: int
    num_weights: int
    scratch_bytes: int


def cut_in_parts(
    pictures: Sequence[UInt8[Tensor, "3 _h _w"]],
    owners: Int[np.ndarray, "num_windows"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
) -> Iterator[UInt8[Tensor, "_ 3 crop_height crop_width"]]:
    """Yields the windows in order, some at a time: the pixels that Pillow gives.

    Args:
        pictures: on one device. Several are joined in one buffer; one is taken as it lies, if it
            has whole rows or whole pixels.
        owners: each window's picture.
        windows: left, top, right, bottom.
        look: how they are fitted.
    """
    if not len(windows):
        return
    buffer, places = _in_one_buffer(pictures)
    made = _table(places[owners], windows, look)
    device = buffer.device
    table = torch.from_numpy(made.rows)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    for part in made.parts:
        yield _cut_part(buffer, table, part, look)


def _in_one_buffer(
    pictures: Sequence[UInt8[Tensor, "3 _h _w"]],
) -> tuple[UInt8[Tensor, "num_bytes"], Int[np.ndarray, "num_pictures 4"]]:
    """Returns all pixels, and each picture's first byte and steps down, right, to a channel."""
    flat: list[Tensor] = []
    places = np.empty((len(pictures), 4), dtype=np.int64)
    begin = 0
    for index, picture in enumerate(pictures):
        height, width = picture.shape[1:]
        pixel_by_pixel = picture.permute(1, 2, 0)
        if pixel_by_pixel.is_contiguous():
            flat.append(pixel_by_pixel.view(-1))
            places[index] = begin, 3 * width, 3, 1
        else:
            flat.append(picture.reshape(-1))
            places[index] = begin, width, 1, height * width
        begin += len(flat[-1])
    return (flat[0] if len(flat) == 1 else torch.cat(flat)), places


def _table(
    places: Int[np.ndarray, "num_windows 4"],
    windows: Int[np.ndarray, "num_windows 4"],
    look: Look,
) -> _Table:
    height, width = look.size_hw
    fits = fit_windows(windows, look)
    rows = np.empty((len(windows), kernels.NUM_COLUMNS.value), dtype=np.int64)

    def column(at: Any) -> Int[np.ndarray, "num_windows"]:
        return rows[:, at.value]

    rows[:, kernels.PIXEL.value :][:, :4] = places
    column(kernels.PIXEL)[:] += windows[:, 1] * places[:, 1] + windows[:, 0] * places[:, 2]
    num_taps: list[np.ndarray] = []
    for at, axis in ((kernels.ACROSS, 0), (kernels.DOWN, 1)):
        length, size = windows[:, axis + 2] - windows[:, axis], fits.sizes_hw[:, 1 - axis]
        taps = np.ceil(2 * _reach(length / size, look)).astype(np.int64)
        described = length, size, fits.offsets_yx[:, 1 - axis], taps
        rows[:, at.value :][:, :4] = np.stack(described, axis=1)
        num_taps.append(taps)
    first, last = _rows_read(rows[:, kernels.DOWN.value :][:, :4], look)
    column(kernels.FIRST_ROW)[:], column(kernels.NUM_ROWS)[:] = first, last - first
    weights = num_taps[0] * width + num_taps[1] * height
    scratch = 3 * width * (last - first)
    taken = 4 * (weights + width + height) + scratch + 3 * height * width
    parts: list[_Part] = []
    for here in _divided(taken, _PART_BYTES):
        begin = np.cumsum(weights[here]) - weights[here]
        column(kernels.WEIGHTS_ACROSS)[here] = begin
        column(kernels.WEIGHTS_DOWN)[here] = begin + num_taps[0][here] * width
        column(kernels.SCRATCH)[here] = np.cumsum(scratch[here]) - scratch[here]
        most, total = int((last - first)[here].max()), int(weights[here].sum())
        parts.append(_Part(here.start, here.stop, most, total, int(scratch[here].sum())))
    return _Table(rows, tuple(parts))


def _reach(scale: np.ndarray, look: Look) -> np.ndarray:
    """Returns how far an output pixel's weights reach to either side, in input pixels."""
    return SUPPORT[look.interpolation] * np.maximum(scale, 1.0)


def _rows_read(
    down: Int[np.ndarray, "num_windows 4"], look: Look
) -> tuple[Int[np.ndarray, "num_windows"], Int[np.ndarray, "num_windows"]]:
    """Returns the first row of each window that its crop needs, and the one behind the last.

    Args:
        down: the table's columns from `DOWN` on.
        look: what is seen.
    """
    length, size, offset, _ = down.T
    scale = length / size
    reach = _reach(scale, look)
    first = (np.maximum(offset, 0) + 0.5) * scale - reach + 0.5
    last = (np.minimum(offset + look.size_hw[0], size) - 1 + 0.5) * scale + reach + 0.5
    return first.clip(min=0).astype(np.int64), np.minimum(last.astype(np.int64), length)


def _divided(taken: Int[np.ndarray, "n"], most: int) -> Iterator[slice]:
    """Yields stretches that take at most `most` each, or are one entry that takes more."""
    ends, start = np.cumsum(taken), 0
    while start < len(taken):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(start, stop)
        start = stop


def _cut_part(
    buffer: UInt8[Tensor, "num_bytes"],
    table: Int[Tensor, "num_windows num_columns"],
    part: _Part,
    look: Look,
) -> UInt8[Tensor, "_ 3 crop_height crop_width"]:
    (height, width), num = look.size_hw, part.stop - part.start
    firsts = table.new_empty(num * (width + height), dtype=torch.int32)
    weights = table.new_empty(part.num_weights, dtype=torch.int32)
    scratch = buffer.new_empty(part.scratch_bytes)
    crops = buffer.new_empty((num, 3, height, width))
    blocks = _ON_GPU if buffer.device.type == "cuda" else _INTERPRETED
    sizes, red, green, blue = (part.start, width, height), *look.fill
    tile = {"BLOCK_ROWS": blocks.rows, "BLOCK": blocks.columns}
    columns = triton.cdiv(width, blocks.columns)
    with on(buffer.device):
        _launch(
            kernels.weigh_kernel,
            (num, 2, triton.cdiv(max(width, height), blocks.weighed)),
            table, firsts, weights, *sizes,
            CUBIC=look.interpolation == "bicubic", BLOCK=blocks.weighed,
        )  # fmt: skip
        _launch(
            kernels.across_kernel, (num, triton.cdiv(part.most_rows, blocks.rows), columns),
            buffer, table, firsts, weights, scratch, *sizes, **tile,
        )  # fmt: skip
        _launch(
            kernels.down_kernel, (num, triton.cdiv(height, blocks.rows), columns),
            scratch, table, firsts, weights, crops, *sizes, red | green << 8 | blue << 16, **tile,
        )  # fmt: skip
    return crops


def _launch(kernel: Any, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
    """Starts a kernel; products and sums are never fused, or weights were not Pillow's."""
    kernel[grid](*given, **options, num_warps=4, enable_fp_fusion=False)
