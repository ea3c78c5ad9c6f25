"""Deformable attention as a registered operator: Triton forward and backward, known to autograd
and to torch.compile.

Equal to `reference_attention` rounded to the type of `value`. Gradients of values are added up
atomically, so their last bits differ from run to run.
"""

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
    (9, 0): _Tile(4096, 4096, adds_together=4, num_warps=4, summed_cells=512),  # Hopper
    # Ampere adds one by one, so in rows.
    (8, 0): _Tile(4096, 2048, adds_together=1, num_warps=4, summed_cells=512),
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
    sampling_locations: Float[Tensor, "B Q H L P 2"],
    attention_weights: Float[Tensor, "B Q H L P"],
) -> Float[Tensor, "B Q HC"]:
    """Returns what `reference_attention` does, in the type of `value`.

    Locations, weights and sums are float32, or float64 where value or locations are.
    """
    exact = torch.promote_types(value.dtype, sampling_locations.dtype)
    exact = torch.promote_types(exact, torch.float32)
    sizes = [side for shape in spatial_shapes for side in shape]
    return torch.ops.dkdetr.deformable_attention(
        value, sampling_locations.to(exact), attention_weights.to(exact), sizes
    )


@torch.library.custom_op("dkdetr::deformable_attention", mutates_args=())
def _forward(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    B, _, H, C = value.shape
    Q = locations.shape[1]
    out = value.new_empty(B, Q, H * C)
    if not (out.numel() and weights.numel()):
        return out.zero_()
    _launch(forward_kernel, [*_laid_out(value, locations, weights), out], sizes)
    return out


@_forward.register_fake
def _(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("dkdetr::deformable_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    given = _laid_out(value, locations, weights, grad_out)
    plain = torch.contiguous_format
    grad_value = torch.zeros_like(given[0], dtype=locations.dtype, memory_format=plain)  # added to
    grad_locations = torch.empty_like(given[1], memory_format=plain)
    grad_weights = torch.empty_like(given[2], memory_format=plain)
    if grad_out.numel() and weights.numel():
        added = _num_added(value, locations, sizes)
        grads = [grad_value, grad_locations, grad_weights]
        _launch(backward_kernel, [*given, *grads], sizes, ADDED=added)
        for level in range(added, len(sizes) // 2):
            _sum_level(level, [*given[1:], grad_value], sizes)
    else:
        grad_locations.zero_()
        grad_weights.zero_()
    return grad_value.to(value.dtype), grad_locations, grad_weights


@_backward.register_fake
def _(
    grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.contiguous_format
    return (
        torch.empty_like(value, memory_format=layout),
        torch.empty_like(locations, memory_format=layout),
        torch.empty_like(weights, memory_format=layout),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    op = torch.ops.dkdetr.deformable_attention_backward
    return *op(grad_out, *ctx.saved_tensors, ctx.sizes), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _laid_out(*tensors: Tensor) -> list[Tensor]:
    """Returns the tensors as the kernels read them: without gaps, last axis first."""
    return [tensor.contiguous() for tensor in tensors]


def trial_queries(device: torch.device) -> set[int]:
    """Returns numbers of queries that together run every kernel there is for maps of one cell."""
    return {MOST_QUERIES, max(MOST_QUERIES, _tile_for(device).summed_queries)}


def _num_added(value: Tensor, locations: Tensor, sizes: Sequence[int]) -> int:
    """Returns how many levels, from the first, have their gradients of values added atomically."""
    tile, L = _tile_for(value.device), len(sizes) // 2
    if (
        locations.dtype is torch.float64
        or locations.shape[1] < tile.summed_queries
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


def _launch(kernel: Any, tensors: Sequence[Tensor], sizes: Sequence[int], **options: Any) -> None:
    """Runs a kernel over all queries; the first three tensors are value, locations, weights."""
    value, locations = tensors[:2]
    B, T, H, C = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    heights, widths = tuple(sizes[0::2]), tuple(sizes[1::2])
    *starts, num_tokens = _starts(sizes)
    assert len(heights) == L, f"{len(heights)} levels, locations for {L}"
    assert num_tokens == T, f"levels of {heights} x {widths} are not {T} tokens"
    assert T * H * C < 2**31, f"{T} tokens of {H * C} channels are more than the kernel counts"
    tile = _tile_for(value.device)
    block_p, block_c = triton.next_power_of_2(P), triton.next_power_of_2(C)
    if kernel is forward_kernel:
        room = tile.forward_bytes // value.element_size()
    else:
        room = tile.backward_bytes // locations.element_size()
        options["TOGETHER"] = min(tile.adds_together, block_c)
    block_q = room // (block_p * block_c)
    block_q = max(1, min(MOST_QUERIES, block_q, triton.next_power_of_2(Q)))
    with on(value.device):
        kernel[(triton.cdiv(Q, block_q), H, B)](
            *tensors,
            T, Q, heights, widths, tuple(starts),
            H=H, C=C, L=L, P=P,
            BLOCK_Q=block_q, BLOCK_P=block_p, BLOCK_C=block_c,
            EXACT=tl.float64 if locations.dtype is torch.float64 else tl.float32,
            num_warps=tile.num_warps,
            **options,
        )  # fmt: skip


def _sum_level(level: int, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Runs `level_sum_kernel` on locations, weights, gradients of results and of values."""
    locations, _, grad_out, grad_value = tensors
    B, T, H, C = grad_value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    height, width = sizes[2 * level : 2 * level + 2]
    squares = triton.cdiv(height, _SIDE) * triton.cdiv(width, _SIDE)
    if not squares:
        return
    kernel: Any = level_sum_kernel
    with on(locations.device):
        kernel[(squares * triton.cdiv(Q, _QUERIES_SUMMED), H, B)](
            *tensors,
            T, Q, height, width, _starts(sizes)[level], level,
            H=H, C=C, L=L, P=P,
            QUERIES=_QUERIES_SUMMED, SIDE=_SIDE, PRODUCT=_product_type(grad_out),
            BLOCK_Q=64, BLOCK_C=max(16, triton.next_power_of_2(C)),
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
