"""Triton kernels that cut windows out of pictures by Pillow's rule, bit for bit: across, then down.

As Pillow does: weights in double precision, rounded to whole 2^-22, first across, then down, sums
in whole numbers, whole grey levels between the passes. Weights are worked out once a window and
output pixel, and only where they are not 0; the passes are sums of integers.

A row of the table describes a window; its columns are named below. The file is imported by
`crop_launch` alone, when a kernel is first wanted. `no_type_check`: Triton reads these functions as
text, so the tests' shape checks must not wrap them.
"""

from typing import no_type_check

import triton
import triton.language as tl

NUM_COLUMNS = tl.constexpr(17)
PIXEL = tl.constexpr(0)
"""Where the window's first pixel lies in the buffer of pictures; then how far it is from there to
the pixel below, to the right, and to the next channel."""
ACROSS, DOWN = tl.constexpr(4), tl.constexpr(8)
"""Of each axis: pixels of the window, pixels it is resampled to, which of these the crop begins
with (perhaps a negative one), and weights of an output pixel."""
WEIGHTS_ACROSS, WEIGHTS_DOWN = tl.constexpr(12), tl.constexpr(13)
"""Where each axis's weights begin: [weights of a pixel, output pixels]."""
FIRST_ROW, NUM_ROWS = tl.constexpr(14), tl.constexpr(15)
"""The window's rows that the second pass reads."""
SCRATCH = tl.constexpr(16)
"""Where their grey levels between the passes begin: [3, rows, output width]."""

_BITS, _HALF, _ONE = tl.constexpr(22), tl.constexpr(1 << 21), tl.constexpr(1 << 22)


@triton.jit
@no_type_check
def _filter(x, CUBIC: tl.constexpr):
    """Returns Pillow's kernel at `x`, operation by operation."""
    x = tl.abs(x)
    if CUBIC:  # a = -0.5 (Keys 1981)
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:  # noqa: RET505  Triton reads one of the two
        return tl.where(x < 1.0, 1.0 - x, 0.0)


@triton.jit
@no_type_check
def _grey(total):
    """Returns a sum of weighted grey levels as a grey level."""
    level = (total + _HALF) >> _BITS
    return tl.minimum(tl.maximum(level, 0), 255)


@triton.jit(do_not_specialize=("start", "width", "height"))
@no_type_check
def weigh_kernel(
    table_ptr, firsts_ptr, weights_ptr, start, width, height,
    CUBIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the weights of output pixels, and each one's first input pixel.

    Firsts are [windows, width + height]. An output pixel that shows nothing of its window weighs 0.
    """
    window, axis = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = table_ptr + (start + window) * NUM_COLUMNS
    length = tl.load(row + ACROSS + 4 * axis).to(tl.int32)
    size = tl.load(row + ACROSS + 4 * axis + 1).to(tl.int32)
    offset = tl.load(row + ACROSS + 4 * axis + 2).to(tl.int32)
    taps = tl.load(row + ACROSS + 4 * axis + 3).to(tl.int32)
    outputs = width + axis * (height - width)
    out = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    place = offset + out
    seen = (place >= 0) & (place < size)
    scale = length.to(tl.float64) / size.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = stretch * 2.0 if CUBIC else stretch
    centre = (place.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    last = tl.minimum((centre + support + 0.5).to(tl.int32), length)
    first, last = tl.where(seen, first, 0), tl.where(seen, last, 0)
    tl.store(firsts_ptr + window * (width + height) + axis * width + out, first, mask=out < outputs)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    tap = 0
    while tap < taps:
        pixel = first + tap
        share = _filter(((pixel.to(tl.float64) - centre) + 0.5) * (1.0 / stretch), CUBIC)
        total += tl.where(pixel < last, share, 0.0)
        tap += 1
    total = tl.where(total == 0.0, 1.0, total)
    weights = weights_ptr + tl.load(row + WEIGHTS_ACROSS + axis)
    tap = 0
    while tap < taps:
        pixel = first + tap
        share = _filter(((pixel.to(tl.float64) - centre) + 0.5) * (1.0 / stretch), CUBIC)
        share = tl.where(pixel < last, share, 0.0) / total * _ONE
        whole = (tl.where(share < 0.0, -0.5, 0.5) + share).to(tl.int32)
        tl.store(weights + tap * outputs + out, whole, mask=out < outputs)
        tap += 1


@triton.jit(do_not_specialize=("start", "width", "height"))
@no_type_check
def across_kernel(
    pixels_ptr, table_ptr, firsts_ptr, weights_ptr, scratch_ptr, start, width, height,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the rows that are needed at the output's width, in grey levels."""
    window = tl.program_id(0).to(tl.int64)
    row = table_ptr + (start + window) * NUM_COLUMNS
    num_rows = tl.load(row + NUM_ROWS)
    if tl.program_id(1) * BLOCK_ROWS >= num_rows:
        return
    y = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    asked = (y < num_rows)[:, None] & (out < width)[None, :]
    down, right = tl.load(row + PIXEL + 1), tl.load(row + PIXEL + 2)
    channel = tl.load(row + PIXEL + 3)
    pixels = pixels_ptr + tl.load(row + PIXEL) + (tl.load(row + FIRST_ROW) + y)[:, None] * down
    length, taps = tl.load(row + ACROSS), tl.load(row + ACROSS + 3).to(tl.int32)
    weights = weights_ptr + tl.load(row + WEIGHTS_ACROSS)
    first = tl.load(firsts_ptr + window * (width + height) + out, mask=out < width, other=0)
    red = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.int32)
    green = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.int32)
    blue = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.int32)
    tap = 0
    while tap < taps:
        weight = tl.load(weights + tap * width + out, mask=out < width, other=0)[None, :]
        read = asked & (first + tap < length)[None, :]
        at = pixels + ((first + tap) * right)[None, :]
        red += weight * tl.load(at, mask=read, other=0).to(tl.int32)
        green += weight * tl.load(at + channel, mask=read, other=0).to(tl.int32)
        blue += weight * tl.load(at + 2 * channel, mask=read, other=0).to(tl.int32)
        tap += 1
    scratch = scratch_ptr + tl.load(row + SCRATCH) + y[:, None] * width + out[None, :]
    tl.store(scratch, _grey(red).to(tl.uint8), mask=asked)
    tl.store(scratch + num_rows * width, _grey(green).to(tl.uint8), mask=asked)
    tl.store(scratch + 2 * num_rows * width, _grey(blue).to(tl.uint8), mask=asked)


@triton.jit(do_not_specialize=("start", "width", "height", "fill"))
@no_type_check
def down_kernel(
    scratch_ptr, table_ptr, firsts_ptr, weights_ptr, crops_ptr, start, width, height, fill,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes crops [windows, 3, height, width]; `fill` is a colour, red in the lowest byte."""
    window = tl.program_id(0).to(tl.int64)
    row = table_ptr + (start + window) * NUM_COLUMNS
    num_rows, taps = tl.load(row + NUM_ROWS), tl.load(row + DOWN + 3).to(tl.int32)
    y = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    weights = weights_ptr + tl.load(row + WEIGHTS_DOWN)
    first = tl.load(
        firsts_ptr + window * (width + height) + width + y, mask=y < height, other=0
    ) - tl.load(row + FIRST_ROW)
    asked = (y < height)[:, None] & (out < width)[None, :]
    scratch = scratch_ptr + tl.load(row + SCRATCH) + out[None, :]
    red = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.int32)
    green = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.int32)
    blue = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.int32)
    tap = 0
    while tap < taps:
        weight = tl.load(weights + tap * height + y, mask=y < height, other=0)[:, None]
        source = first + tap
        read = asked & ((source >= 0) & (source < num_rows))[:, None]
        at = scratch + source[:, None] * width
        red += weight * tl.load(at, mask=read, other=0).to(tl.int32)
        green += weight * tl.load(at + num_rows * width, mask=read, other=0).to(tl.int32)
        blue += weight * tl.load(at + 2 * num_rows * width, mask=read, other=0).to(tl.int32)
        tap += 1
    place_x, place_y = tl.load(row + ACROSS + 2) + out, tl.load(row + DOWN + 2) + y
    seen_x = (place_x >= 0) & (place_x < tl.load(row + ACROSS + 1))
    seen_y = (place_y >= 0) & (place_y < tl.load(row + DOWN + 1))
    seen = seen_y[:, None] & seen_x[None, :]
    plane = height * width
    crop = crops_ptr + window * (3 * plane) + y[:, None] * width + out[None, :]
    red = tl.where(seen, _grey(red), fill & 255)
    green = tl.where(seen, _grey(green), (fill >> 8) & 255)
    blue = tl.where(seen, _grey(blue), fill >> 16)
    tl.store(crop, red.to(tl.uint8), mask=asked)
    tl.store(crop + plane, green.to(tl.uint8), mask=asked)
    tl.store(crop + 2 * plane, blue.to(tl.uint8), mask=asked)
