"""Deformable attention as a registered operator: Triton forward and backward, known to autograd
and to torch.compile.

Equal to `plain_attention` rounded to the type of `value`. Gradients of values are added up
atomically, so their last bits differ from run to run.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dkdetr.student.attention_kernels import (
    backward_kernel,
    coded_sizes,
    forward_kernel,
    level_sum_kernel,
)
from dkdetr.student.attention_reference import SpatialShapes
from dkdetr.triton_trial import LEAST_CAPABILITY, on


@dataclass(frozen=True)
class _Tile:
    """How much a program does at once.

    Attributes:
        forward_bytes: of the values in a tile.
        backward_bytes: of the sums in a tile, which are added to.
        adds_together: neighbouring numbers that a thread adds to memory at once.
        num_warps: of a program.
        summed_cells: the last levels of at most so many cells are summed by `level_sum_kernel`;
            0 where there is no product of matrices for it.
        summed_queries: as long as there are so many queries.
    """

    forward_bytes: int
    backward_bytes: int
    adds_together: int
    num_warps: int
    summed_cells: int
    summed_queries: int = 2048


# By compute capability, from the newest down. Chosen by registers and instructions of the compiled
# kernels, not by the clock: student/README.md.
_TILES = {
    (9, 0): _Tile(4096, 4096, adds_together=4, num_warps=4, summed_cells=1024),  # Hopper
    # Ampere adds one by one, so in rows.
    (8, 0): _Tile(4096, 2048, adds_together=1, num_warps=4, summed_cells=1024),
    (7, 0): _Tile(2048, 2048, adds_together=1, num_warps=4, summed_cells=0),  # Volta: untested
}
assert min(_TILES) == LEAST_CAPABILITY
_INTERPRETED = _Tile(
    1 << 20, 1 << 20, adds_together=4, num_warps=1, summed_cells=20, summed_queries=1
)
MOST_QUERIES = 64
"""Of a program; as many or more of them always run the same compiled kernel."""
_SIDE, _QUERIES_SUMMED, _MOST_CHANNELS_SUMMED = 16, 512, 32
"""What a program of `level_sum_kernel` does: a square of cells, so many queries, and at most so
many channels, or its sums find no room in registers."""


def triton_attention(
    value: Float[Tensor, "B T H C"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Tensor, "B Q L two_or_four"],
    offsets: Float[Tensor, "B Q H L P 2"],
    logits: Float[Tensor, "B Q H L P"],
) -> Float[Tensor, "B Q HC"]:
    """Returns what `plain_attention` does, in the type of `value`.

    Sampling places, the softmax and sums are float32, or float64 where an input is.

    Raises:
        ValueError: reference points want a gradient, which is not computed here.
    """
    sizes = [side for shape in spatial_shapes for side in shape]
    inputs = (value, reference_points, offsets, logits)
    return torch.ops.dkdetr.deformable_attention(*inputs, sizes)[0]


@torch.library.custom_op("dkdetr::deformable_attention", mutates_args=())
def _forward(
    value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Returns the result, and what the backward kernels know a softmax by."""
    out, softmax = _empty_results(value, reference, offsets, logits)
    if not (out.numel() and logits.numel()):
        return out.zero_(), softmax.zero_()
    given = _laid_out(value, reference, offsets, logits)
    block_s = triton.next_power_of_2(logits.shape[3] * logits.shape[4])
    _launch(forward_kernel, given, [out, softmax], sizes, BLOCK_S=block_s)
    return out, softmax


def _empty_results(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    value, B, Q, H = inputs[0], *inputs[3].shape[:3]
    softmax = value.new_empty(B, Q, H, 2, dtype=_exact_type(inputs))
    return value.new_empty(B, Q, H * value.shape[3]), softmax


@_forward.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(*given[:4])


@torch.library.custom_op("dkdetr::deformable_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    value: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    softmax: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    given = _laid_out(value, reference, offsets, logits, softmax, grad_out)
    plain = torch.contiguous_format
    grad_value = torch.zeros_like(given[0], dtype=softmax.dtype, memory_format=plain)  # added to
    grad_offsets = torch.empty_like(given[2], memory_format=plain)
    grad_logits = torch.empty_like(given[3], memory_format=plain)
    if grad_out.numel() and logits.numel():
        added = _num_added(value, softmax, sizes)
        grads = [grad_value, grad_offsets, grad_logits]
        _launch(backward_kernel, given, grads, sizes, ADDED=added)
        for level in range(added, len(sizes) // 2):
            _sum_level(level, [*given[1:], grad_value], sizes)
    else:
        grad_offsets.zero_()
        grad_logits.zero_()
    return grad_value.to(value.dtype), grad_offsets, grad_logits


@_backward.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    _, value, _, offsets, logits, *_ = given
    return tuple(
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in (value, offsets, logits)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.sizes = inputs
    if ctx.needs_input_grad[1]:
        raise ValueError(
            "the Triton kernel has no gradient for reference points: detach them, or take "
            "ops.backend=torch"
        )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 5
    op = torch.ops.dkdetr.deformable_attention_backward
    grad_value, grad_offsets, grad_logits = op(grad_out, *ctx.saved_tensors, ctx.sizes)
    return grad_value, None, grad_offsets, grad_logits, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _laid_out(*tensors: Tensor) -> list[Tensor]:
    """Returns the tensors as the kernels read them: without gaps, last axis first."""
    return [tensor.contiguous() for tensor in tensors]


def _exact_type(inputs: Sequence[Tensor]) -> torch.dtype:
    """Returns the type of sampling places, softmax and sums."""
    return functools.reduce(torch.promote_types, [t.dtype for t in inputs], torch.float32)


def trial_queries(device: torch.device) -> set[int]:
    """Returns numbers of queries of which one is few and one as many as an encoder has."""
    return {MOST_QUERIES, max(MOST_QUERIES, _tile_for(device).summed_queries)}


def _num_added(value: Tensor, softmax: Tensor, sizes: Sequence[int]) -> int:
    """Returns how many levels, from the first, have their gradients of values added atomically."""
    tile, L = _tile_for(value.device), len(sizes) // 2
    if (
        softmax.dtype is torch.float64
        or softmax.shape[1] < tile.summed_queries
        or value.shape[3] > _MOST_CHANNELS_SUMMED
    ):
        return L
    cells = [height * width for height, width in zip(sizes[0::2], sizes[1::2], strict=True)]
    return next((L - n for n, each in enumerate(reversed(cells)) if each > tile.summed_cells), 0)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Returns each level's first token, and the number of all."""
    starts = [0]
    for height, width in zip(sizes[0::2], sizes[1::2], strict=True):
        starts.append(starts[-1] + height * width)
    return starts


def _launch(
    kernel: Any,
    given: Sequence[Tensor],
    written: Sequence[Tensor],
    sizes: Sequence[int],
    **options: Any,
) -> None:
    """Runs a kernel over all queries; value, reference points, offsets and logits come first."""
    value, reference, offsets = given[:3]
    B, T, H, C = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    heights, widths = tuple(sizes[0::2]), tuple(sizes[1::2])
    *starts, num_tokens = _starts(sizes)
    assert len(heights) == L, f"{len(heights)} levels, offsets for {L}"
    assert num_tokens == T, f"levels of {heights} x {widths} are not {T} tokens"
    # Numbers are int32, and coded sizes are twice as large.
    assert T * H * C < 2**30, f"{T} tokens of {H * C} channels are more than the kernel counts"
    exact = _exact_type(given)
    tile = _tile_for(value.device)
    block_p, block_c = triton.next_power_of_2(P), triton.next_power_of_2(C)
    if kernel is forward_kernel:
        room = tile.forward_bytes // value.element_size()
    else:
        room = tile.backward_bytes // exact.itemsize
        options["TOGETHER"] = min(tile.adds_together, block_c)
    block_q = room // (block_p * block_c)
    block_q = max(1, min(MOST_QUERIES, block_q, triton.next_power_of_2(Q)))
    with on(value.device):
        kernel[(triton.cdiv(Q, block_q), H, B)](
            *given, *written,
            T, Q, coded_sizes(heights), coded_sizes(widths), coded_sizes(starts),
            H=H, C=C, L=L, P=P, R=reference.shape[3],
            BLOCK_Q=block_q, BLOCK_P=block_p, BLOCK_C=block_c,
            EXACT=tl.float64 if exact is torch.float64 else tl.float32,
            num_warps=tile.num_warps,
            **options,
        )  # fmt: skip


def _sum_level(level: int, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Runs `level_sum_kernel`: reference points to gradients of results, then those of values."""
    reference, offsets, _, _, grad_out, grad_value = tensors
    B, T, H, C = grad_value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    height, width = sizes[2 * level : 2 * level + 2]
    squares = triton.cdiv(height, _SIDE) * triton.cdiv(width, _SIDE)
    if not squares:
        return
    kernel: Any = level_sum_kernel
    with on(offsets.device):
        kernel[(squares * triton.cdiv(Q, _QUERIES_SUMMED), H, B)](
            *tensors,
            T, Q, height, width, _starts(sizes)[level], level,
            H=H, C=C, L=L, P=P, R=reference.shape[3],
            QUERIES=_QUERIES_SUMMED, SIDE=_SIDE, PRODUCT=_product_type(grad_out),
            BLOCK_Q=64, BLOCK_P=triton.next_power_of_2(P),
            BLOCK_C=max(16, triton.next_power_of_2(C)),
            # Eight warps for float32, whose product in three parts would spill with four.
            num_warps=4 if grad_out.element_size() == 2 else 8, num_stages=1,
        )  # fmt: skip


def _product_type(grad_out: Tensor) -> Any:
    """Returns what matrices are multiplied in: the interpreter takes bfloat16 for integers."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return types[grad_out.dtype]


def _tile_for(device: torch.device) -> _Tile:
    if device.type != "cuda":
        return _INTERPRETED
    capability = torch.cuda.get_device_capability(device)
    return next(tile for least, tile in _TILES.items() if capability >= least)
