"""Triton kernels of deformable attention: a program does a block of queries of one head.

Shape letters as in `attention_reference`; in a program q counts its queries, p points, c channels.
A tile [q, p, c] is laid over the threads so that a thread holds 16 bytes of neighbouring channels;
the points of a level lie side by side, the levels are unrolled. Levels' sizes are plain numbers,
coded (`coded_sizes`): a kernel serves pictures of every size. `level_sum_kernel` goes the other way
round, a program does a square of a coarse map's cells.

The file is imported by `attention_op` alone, when a kernel is first wanted. `no_type_check`: Triton
reads these functions as text, so the tests' shape checks must not wrap them.
"""

from collections.abc import Iterable
from typing import no_type_check

import triton
import triton.language as tl

_SIZES = ("num_tokens", "num_queries")


def coded_sizes(numbers: Iterable[int]) -> tuple[int, ...]:
    """Returns the numbers as kernels take them in a tuple: all odd and above 1.

    Of a tuple's numbers Triton tells apart 1, those that 16 divides, and others, whatever
    `do_not_specialize` says, and would compile a kernel for each pattern of levels.
    """
    return tuple(2 * number + 3 for number in numbers)


@triton.jit
@no_type_check
def _decoded(number):
    return number // 2 - 1


@triton.jit
@no_type_check
def _centre(reference_ptr, query, level, asked, size, axis: tl.constexpr, L: tl.constexpr,
            P: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Returns (reference point, cells that an offset of 1 goes) of queries on one axis of a level.

    An offset counts cells, or, where reference points have a size (`R` is 4), half of it over `P`.
    """
    first = reference_ptr + (query * L + level) * R + axis
    centre = tl.load(first, mask=asked, other=0.0).to(EXACT)
    step = tl.full(centre.shape, 1.0, EXACT)
    if R == 4:
        step = tl.load(first + 2, mask=asked, other=0.0).to(EXACT) * (0.5 / P) * size
    return centre, step


@triton.jit
@no_type_check
def _place(centre, size, shift):
    """Returns (first cell, share of the second) of samples `shift` cells from `centre` on one axis.

    The share is that of the exact sum: x alone, rounded to float32, would be 4e-6 of a cell off on
    a map of 128. Four million cells away is outside, as infinity is.
    """
    shift = tl.minimum(tl.maximum(shift, -4e6), 4e6) - 0.5  # tl.clamp knows no float64
    cell = tl.floor(tl.fma(centre, size, shift))
    return cell.to(tl.int32), tl.fma(centre, size, -cell) + shift


@triton.jit
@no_type_check
def _weight(logits_ptr, place, asked, highest, scale, EXACT: tl.constexpr):
    """Returns the softmax's numbers at `place`; 0 for what is not asked for."""
    logit = tl.load(logits_ptr + place, mask=asked, other=-float("inf")).to(EXACT)
    return tl.exp(logit - highest) * scale


@triton.jit
@no_type_check
def _samples(reference_ptr, offsets_ptr, query, place, level, asked, width, height,
             L: tl.constexpr, P: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Returns (left, right_share, top, bottom_share, step across, step down) of a level's samples.

    `left` and `top` are the cell that a sample begins in. What is not asked for lies outside, but
    where a reference point has no size.
    """
    width, height = width.to(EXACT), height.to(EXACT)
    query = tl.broadcast_to(query, place.shape)  # read as offsets are, or threads would exchange it
    centre_x, step_x = _centre(reference_ptr, query, level, asked, width, 0, L, P, R, EXACT)
    centre_y, step_y = _centre(reference_ptr, query, level, asked, height, 1, L, P, R, EXACT)
    x = tl.load(offsets_ptr + 2 * place, mask=asked, other=6e4).to(EXACT)
    y = tl.load(offsets_ptr + 2 * place + 1, mask=asked, other=6e4).to(EXACT)
    left, right_share = _place(centre_x, width, x * step_x)
    top, bottom_share = _place(centre_y, height, y * step_y)
    return left, right_share, top, bottom_share, step_x, step_y


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
    value_ptr, reference_ptr, offsets_ptr, logits_ptr, out_ptr, softmax_ptr,
    num_tokens, num_queries, heights, widths, starts,
    H: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes [B, Q, H, C], with sums in `EXACT`, and what softmaxes are known by, [B, Q, H, 2].

    A softmax is over the L * P samples of a query's head, at most `BLOCK_S`; it is known by its
    highest logit and 1 over its sum.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p, c, s = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    known = q < num_queries
    query = image * num_queries + q
    row = query * H + head
    asked = known[:, None] & (p < P)[None, :]
    logits = tl.load(
        logits_ptr + row[:, None] * (L * P) + s[None, :],
        mask=known[:, None] & (s < L * P)[None, :], other=-float("inf"),
    ).to(EXACT)  # fmt: skip
    # Of a row that is not there 0 and 1: minus infinity less itself would be no number.
    highest = tl.where(known, tl.max(logits, axis=1), 0.0)
    total = tl.where(known, tl.sum(tl.exp(logits - highest[:, None]), axis=1), 1.0)
    tl.store(softmax_ptr + 2 * row, highest, mask=known)
    tl.store(softmax_ptr + 2 * row + 1, 1 / total, mask=known)
    # By way of memory every thread has the rows that it samples for. Carried over in registers they
    # would draw the weights into a layout of their own, exchanged again at every corner.
    tl.debug_barrier()
    highest = tl.load(softmax_ptr + 2 * row, mask=known, other=0.0)
    scale = tl.load(softmax_ptr + 2 * row + 1, mask=known, other=1.0)
    maps = value_ptr + (image * num_tokens * H + head) * C
    gathered = tl.zeros((BLOCK_Q, BLOCK_P, BLOCK_C), dtype=EXACT)
    for level in tl.static_range(L):
        height, width = _decoded(heights[level]), _decoded(widths[level])
        start = _decoded(starts[level])
        place = row[:, None] * (L * P) + level * P + p[None, :]
        weight = _weight(logits_ptr, place, asked, highest[:, None], scale[:, None], EXACT)
        left, right_share, top, bottom_share, _, _ = _samples(
            reference_ptr, offsets_ptr, query[:, None], place, level, asked,
            width, height, L, P, R, EXACT,
        )  # fmt: skip
        for corner in tl.static_range(4):
            share_x, share_y, number, inside = _corner(
                left, right_share, top, bottom_share, width, height, corner
            )
            cells = (start + number)[:, :, None] * (H * C) + c[None, None, :]
            read = inside[:, :, None] & (c < C)[None, None, :]
            cell = tl.load(maps + cells, mask=read, other=0.0).to(EXACT)
            gathered += (weight * (share_x * share_y))[:, :, None] * cell
    written = known[:, None] & (c < C)[None, :]
    out = tl.sum(gathered, axis=1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * C + c[None, :], out, mask=written)


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def backward_kernel(
    value_ptr, reference_ptr, offsets_ptr, logits_ptr, softmax_ptr, grad_out_ptr,
    grad_value_ptr, grad_offsets_ptr, grad_logits_ptr,
    num_tokens, num_queries, heights, widths, starts,
    H: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
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
    known = q < num_queries
    query = image * num_queries + q
    row = query * H + head
    asked = known[:, None] & (p < P)[None, :]
    highest = tl.load(softmax_ptr + 2 * row, mask=known, other=0.0)
    scale = tl.load(softmax_ptr + 2 * row + 1, mask=known, other=1.0)
    first = (image * num_tokens * H + head) * C
    maps, grad_maps = value_ptr + first, grad_value_ptr + first
    # Every tensor of the tile in one layout, that of the atomic additions.
    c = tl.max_contiguous(c, TOGETHER)
    rows = tl.broadcast_to(row[:, None, None] * C + c[None, None, :], (BLOCK_Q, BLOCK_P, BLOCK_C))
    read = asked[:, :, None] & (c < C)[None, None, :]
    grad = tl.load(grad_out_ptr + rows, mask=read, other=0.0).to(EXACT)
    weights, by_weights = (), ()
    mean = tl.zeros((BLOCK_Q,), dtype=EXACT)
    for level in tl.static_range(L):
        height, width = _decoded(heights[level]), _decoded(widths[level])
        start = _decoded(starts[level])
        place = row[:, None] * (L * P) + level * P + p[None, :]
        weight = _weight(logits_ptr, place, asked, highest[:, None], scale[:, None], EXACT)
        left, right_share, top, bottom_share, step_x, step_y = _samples(
            reference_ptr, offsets_ptr, query[:, None], place, level, asked,
            width, height, L, P, R, EXACT,
        )  # fmt: skip
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
        offsets = grad_offsets_ptr + 2 * place
        tl.store(offsets, (by_x * weight * step_x).to(offsets.dtype.element_ty), mask=asked)
        tl.store(offsets + 1, (by_y * weight * step_y).to(offsets.dtype.element_ty), mask=asked)
        weights, by_weights = weights + (weight,), by_weights + (by_weight,)  # noqa: RUF005  Triton's
        mean += tl.sum(weight * by_weight, axis=1)
    for level in tl.static_range(L):
        by_logit = weights[level] * (by_weights[level] - mean[:, None])
        logits = grad_logits_ptr + row[:, None] * (L * P) + level * P + p[None, :]
        tl.store(logits, by_logit.to(logits.dtype.element_ty), mask=asked)


@triton.jit
@no_type_check
def _given(cells, first, second_share):
    """Returns [cells, samples]: what each sample gives each cell of one axis."""
    second = tl.where(cells[:, None] == first[None, :] + 1, second_share[None, :], 0.0)
    return tl.where(cells[:, None] == first[None, :], 1 - second_share[None, :], second)


@triton.jit
@no_type_check
def _meet(reference_ptr, offsets_ptr, query, row, level, known, left_column, top_line, width,
          height, L: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr,
          SIDE: tl.constexpr):  # fmt: skip
    """Returns whether any sample of these queries gives something to a square of cells."""
    p = tl.arange(0, BLOCK_P)
    place = row[:, None] * (L * P) + level * P + p[None, :]
    asked = known[:, None] & (p < P)[None, :]
    left, _, top, _, _, _ = _samples(
        reference_ptr, offsets_ptr, query[:, None], place, level, asked,
        width, height, L, P, R, tl.float32,
    )  # fmt: skip
    across = (left >= left_column - 1) & (left < left_column + SIDE)
    down = (top >= top_line - 1) & (top < top_line + SIDE)
    meets = (asked & across & down).to(tl.int32)
    return tl.max(tl.max(meets, axis=1), axis=0) > 0


@triton.jit(do_not_specialize=(*_SIZES, "height", "width", "start", "level"))
@no_type_check
def level_sum_kernel(
    reference_ptr, offsets_ptr, logits_ptr, softmax_ptr, grad_out_ptr, grad_value_ptr,
    num_tokens, num_queries, height, width, start, level,
    H: tl.constexpr, C: tl.constexpr, L: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    SIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Adds one level's part to `grad_value` [B, T, H, C] in float32, as products of matrices.

    For a square of `SIDE` x `SIDE` cells and `QUERIES` queries: what each query gives each
    cell, times what it is given. Many queries share a cell of a coarse map, and only the sums of a
    program are added atomically. `BLOCK_Q` queries of which no sample meets the square are passed
    by: neighbours look at the same places. Shares are rounded to the type of `grad_out` for the
    product, which is done in `PRODUCT`, that type as well but in the interpreter.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    across = tl.cdiv(width, SIDE)
    squares = across * tl.cdiv(height, SIDE)
    square, part = tl.program_id(0) % squares, tl.program_id(0) // squares
    top_line, left_column = square // across * SIDE, square % across * SIDE
    lines, columns = top_line + tl.arange(0, SIDE), left_column + tl.arange(0, SIDE)
    c = tl.arange(0, BLOCK_C)
    sums = tl.zeros((SIDE * SIDE, BLOCK_C), dtype=tl.float32)
    for first in range(0, QUERIES, BLOCK_Q):
        q = part * QUERIES + first + tl.arange(0, BLOCK_Q)
        known = q < num_queries
        query = image * num_queries + q
        row = query * H + head
        if _meet(
            reference_ptr, offsets_ptr, query, row, level, known, left_column, top_line,
            width, height, L, P, R, BLOCK_P, SIDE,
        ):  # fmt: skip
            highest = tl.load(softmax_ptr + 2 * row, mask=known, other=0.0)
            scale = tl.load(softmax_ptr + 2 * row + 1, mask=known, other=1.0)
            given = tl.zeros((SIDE, SIDE, BLOCK_Q), dtype=tl.float32)
            for point in tl.static_range(P):
                place = row * (L * P) + level * P + point
                weight = _weight(logits_ptr, place, known, highest, scale, tl.float32)
                left, right_share, top, bottom_share, _, _ = _samples(
                    reference_ptr, offsets_ptr, query, place, level, known,
                    width, height, L, P, R, tl.float32,
                )  # fmt: skip
                down = weight[None, :] * _given(lines, top, bottom_share)
                given += down[:, None, :] * _given(columns, left, right_share)[None, :, :]
            read = known[:, None] & (c < C)[None, :]
            grad = tl.load(grad_out_ptr + row[:, None] * C + c[None, :], mask=read, other=0.0)
            given = tl.reshape(given.to(grad.dtype).to(PRODUCT), (SIDE * SIDE, BLOCK_Q))
            sums = tl.dot(given, grad.to(PRODUCT), sums, input_precision="tf32x3")
    cell = tl.arange(0, SIDE * SIDE)
    line, column = top_line + cell // SIDE, left_column + cell % SIDE
    token = image * num_tokens + start + line * width + column
    inside = (line < height) & (column < width)
    tl.atomic_add(
        grad_value_ptr + (token * H + head)[:, None] * C + c[None, :],
        sums, mask=inside[:, None] & (c < C)[None, :], sem="relaxed",
    )  # fmt: skip
