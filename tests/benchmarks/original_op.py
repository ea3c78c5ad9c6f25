"""Deformable DETR's own CUDA operator, as a peer where its extension is installed and loads.

The module is called `MultiScaleDeformableAttention` whoever built it: the original repository's
`ops/make.sh`, or the wheel `ms-deform-attn`, whose 1.0.1 wants a PyTorch of CUDA 12. It takes
float32 alone, sampling places and weights ready made.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MODULE = "MultiScaleDeformableAttention"
_IMAGES_AT_ONCE = 64
"""`im2col_step`, as the original has it."""


Shapes = list[tuple[int, int]]


def original_attention(
    shapes: Shapes, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns what makes [B, Q, HC] of values [B, T, H, C], places [B, Q, H, L, P, 2], weights."""
    sizes = torch.tensor(shapes, device=device)
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
    return lambda value, places, weights: _Original.apply(
        value, sizes, starts, places.contiguous(), weights.contiguous()
    )


class _Original(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        return importlib.import_module(MODULE).ms_deform_attn_forward(*given, _IMAGES_AT_ONCE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        value, locations, weights = importlib.import_module(MODULE).ms_deform_attn_backward(
            *ctx.saved_tensors, grad_out.contiguous(), _IMAGES_AT_ONCE
        )
        return value, None, None, locations, weights
