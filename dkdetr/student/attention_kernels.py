"""Triton kernels of deformable attention: a program does a block of queries of one head.

Shape letters as in `attention_reference`; in a program q counts its queries, p points, c channels.
A tile [q, p, c] is laid over the threads so that a thread holds 16 bytes of neighbouring channels;
the points of a level lie side by side, the levels are unrolled. Levels' sizes are plain numbers: a
kernel serves pictures of every size. `level_sum_kernel` goes the other way round, a program does a
square of a coarse map's cells.

The file is imported by `attention_op` alone, when a kernel is first wanted. `no_type_check`: Triton
reads these functions as text, so the tests' shape checks must not wrap them.
"""

from typing import no_type_check

import triton
import triton.language as tl

_SIZES = ("num_tokens", "num_queries", "heights", "widths", "starts")


@triton.jit
@no_type_check
def _place(location, size):
    """Returns (first cell, share of the second) of a sample on one axis.

    The share is that of the exact product: x alone, rounded to float32, would be 4e-6 of a cell
    off on a map of 128. Nine maps away is outside, as infinity is.
    """
    location = tl.minimum(tl.maximum(location, -9.0), 9.0)  # tl.clamp knows no float64
    x = tl.fma(location, size, -0.5)
    cell = tl.floor(x)
    # Not -(x + 0.5), which is rounded where it passes a power of two.
    return cell.to(tl.int32), (x - cell) + (tl.fma(location, size, -x) - 0.5)


@triton.jit
@no_type_check
def _samples(locations_ptr, weights_ptr, place, asked, width, height, EXACT: tl.constexpr):
    """Returns (weight, left, right_share, top, bottom_share) of a level's samples at `place`.

    `left` and `top` are the cell that a sample begins in. What is not asked for lies outside.
    """
    weight = tl.load(weights_ptr + place, mask=asked, other=0.0)
    x = tl.load(locations_ptr + 2 * place, mask=asked, other=-1.0)
    y = tl.load(locations_ptr + 2 * place + 1, mask=asked, other=-1.0)
    left, right_share = _place(x, width.to(EXACT))
    top, bottom_share = _place(y, height.to(EXACT))
    return weight, left, right_share, top, bottom_share


@triton.jit
@no_type_check
def _corner(left, right_share, top, bottom_share, width, height, corner: tl.constexpr):
    """Returns (share across, share down, cell in the map, is there one) of one of four corners.

    Corners are counted in rows from the top left: 1 and 3 lie right, 2 and 3 below.
    """
    column, line = left + corner % 2, top + corner // 2
    share_x = right_share if corner % 2 else 1 - right_share
    share_y = bottom_share if corner // 2 else 1 - bottom_share
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    return share_x, share_y, line * width + column, inside


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def forward_kernel(
    value_ptr, locations_ptr, weights_ptr, out_ptr,
    num_tokens, num_queries, heights, widths, starts,
    H: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Writes [B, Q, H, C]; sums in `EXACT`, the type of locations and weights."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    row = (image * num_queries + q) * H + head
    asked = (q < num_queries)[:, None] & (p < P)[None, :]
    maps = value_ptr + (image * num_tokens * H + head) * C
    total = tl.zeros((BLOCK_Q, BLOCK_P, BLOCK_C), dtype=EXACT)
    for level in tl.static_range(L):
        height, width, start = heights[level], widths[level], starts[level]
        place = row[:, None] * (L * P) + level * P + p[None, :]
        weight, left, right_share, top, bottom_share = _samples(
            locations_ptr, weights_ptr, place, asked, width, height, EXACT
        )
        for corner in tl.static_range(4):
            share_x, share_y, number, inside = _corner(
                left, right_share, top, bottom_share, width, height, corner
            )
            cells = (start + number)[:, :, None] * (H * C) + c[None, None, :]
            read = inside[:, :, None] & (c < C)[None, None, :]
            cell = tl.load(maps + cells, mask=read, other=0.0).to(EXACT)
            total += (weight * (share_x * share_y))[:, :, None] * cell
    written = (q < num_queries)[:, None] & (c < C)[None, :]
    out = tl.sum(total, axis=1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * C + c[None, :], out, mask=written)


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def backward_kernel(
    value_ptr, locations_ptr, weights_ptr, grad_out_ptr,
    grad_value_ptr, grad_locations_ptr, grad_weights_ptr,
    num_tokens, num_queries, heights, widths, starts,
    H: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr, TOGETHER: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Adds to `grad_value` [B, T, H, C], which is of type `EXACT`; writes the two others.

    A thread reads and adds to `TOGETHER` neighbouring channels at once. Only the first `ADDED`
    levels are added to: the others are `level_sum_kernel`'s.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    row = (image * num_queries + q) * H + head
    asked = (q < num_queries)[:, None] & (p < P)[None, :]
    first = (image * num_tokens * H + head) * C
    maps, grad_maps = value_ptr + first, grad_value_ptr + first
    # Every tensor of the tile in one layout, that of the atomic additions.
    c = tl.max_contiguous(c, TOGETHER)
    rows = tl.broadcast_to(row[:, None, None] * C + c[None, None, :], (BLOCK_Q, BLOCK_P, BLOCK_C))
    known = asked[:, :, None] & (c < C)[None, None, :]
    grad = tl.load(grad_out_ptr + rows, mask=known, other=0.0).to(EXACT)
    for level in tl.static_range(L):
        height, width, start = heights[level], widths[level], starts[level]
        place = row[:, None] * (L * P) + level * P + p[None, :]
        weight, left, right_share, top, bottom_share = _samples(
            locations_ptr, weights_ptr, place, asked, width, height, EXACT
        )
        by_weight = tl.zeros((BLOCK_Q, BLOCK_P), dtype=EXACT)
        by_x = tl.zeros((BLOCK_Q, BLOCK_P), dtype=EXACT)
        by_y = tl.zeros((BLOCK_Q, BLOCK_P), dtype=EXACT)
        for corner in tl.static_range(4):
            share_x, share_y, number, inside = _corner(
                left, right_share, top, bottom_share, width, height, corner
            )
            cells = (start + number)[:, :, None] * (H * C) + c[None, None, :]
            read = inside[:, :, None] & (c < C)[None, None, :]
            cell = tl.load(maps + cells, mask=read, other=0.0).to(EXACT)
            likeness = tl.sum(cell * grad, axis=2)
            by_weight += share_x * share_y * likeness
            by_x += (share_y if corner % 2 else -share_y) * likeness
            by_y += (share_x if corner // 2 else -share_x) * likeness
            if level < ADDED:
                added = (weight * share_x * share_y)[:, :, None] * grad
                tl.atomic_add(grad_maps + cells, added, mask=read, sem="relaxed")
        tl.store(grad_weights_ptr + place, by_weight, mask=asked)
        tl.store(grad_locations_ptr + 2 * place, by_x * weight * width, mask=asked)
        tl.store(grad_locations_ptr + 2 * place + 1, by_y * weight * height, mask=asked)


@triton.jit
@no_type_check
def _given(cells, first, second_share):
    """Returns [cells, samples]: what each sample gives each cell of one axis."""
    second = tl.where(cells[:, None] == first[None, :] + 1, second_share[None, :], 0.0)
    return tl.where(cells[:, None] == first[None, :], 1 - second_share[None, :], second)


@triton.jit(do_not_specialize=(*_SIZES[:2], "height", "width", "start", "level"))
@no_type_check
def level_sum_kernel(
    locations_ptr, weights_ptr, grad_out_ptr, grad_value_ptr,
    num_tokens, num_queries, height, width, start, level,
    H: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    SIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Adds one level's part to `grad_value` [B, T, H, C] in float32, as products of matrices.

    For a square of `SIDE` x `SIDE` cells and `QUERIES` queries: what each query gives each
    cell, times what it is given. Many queries share a cell of a coarse map, and only the sums of a
    program are added atomically. Shares are rounded to the type of `grad_out` for the product,
    which is done in `PRODUCT`, that type as well but in the interpreter.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    across = tl.cdiv(width, SIDE)
    squares = across * tl.cdiv(height, SIDE)
    square, part = tl.program_id(0) % squares, tl.program_id(0) // squares
    top_line, left_column = square // across * SIDE, square % across * SIDE
    lines, columns = top_line + tl.arange(0, SIDE), left_column + tl.arange(0, SIDE)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((SIDE * SIDE, BLOCK_C), dtype=tl.float32)
    for first in range(0, QUERIES, BLOCK_Q):
        q = part * QUERIES + first + tl.arange(0, BLOCK_Q)
        asked = q < num_queries
        row = (image * num_queries + q) * H + head
        given = tl.zeros((SIDE, SIDE, BLOCK_Q), dtype=tl.float32)
        for point in tl.static_range(P):
            place = row * (L * P) + level * P + point
            weight, left, right_share, top, bottom_share = _samples(
                locations_ptr, weights_ptr, place, asked, width, height, tl.float32
            )
            down = weight[None, :] * _given(lines, top, bottom_share)
            given += down[:, None, :] * _given(columns, left, right_share)[None, :, :]
        known = asked[:, None] & (c < C)[None, :]
        grad = tl.load(grad_out_ptr + row[:, None] * C + c[None, :], mask=known, other=0.0)
        given = tl.reshape(given.to(grad.dtype).to(PRODUCT), (SIDE * SIDE, BLOCK_Q))
        total = tl.dot(given, grad.to(PRODUCT), total, input_precision="tf32x3")
    cell = tl.arange(0, SIDE * SIDE)
    line, column = top_line + cell // SIDE, left_column + cell % SIDE
    token = image * num_tokens + start + line * width + column
    inside = (line < height) & (column < width)
    tl.atomic_add(
        grad_value_ptr + (token * H + head)[:, None] * C + c[None, :],
        total, mask=inside[:, None] & (c < C)[None, :], sem="relaxed",
    )  # fmt: skip
