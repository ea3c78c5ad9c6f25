"""The meaning of the batch-norm kernels that torch has for GPUs alone, in formulas."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AXES = (0, 2, 3)


def stand_in_kernels(replace: Callable[[Any, str, Any], None]) -> None:
    """Puts the formulas in the kernels' places in `torch`, by `setattr` or a monkeypatch's."""
    for kernel in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):
        replace(torch, kernel.__name__, kernel)


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(_wide(x), dim=AXES, correction=0)
    return mean, 1 / (variance + eps).sqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor, means: Tensor, invstds: Tensor, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float, counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert counts.dtype == running_mean.dtype
    assert means.is_contiguous()
    assert invstds.is_contiguous()
    n = counts[:, None]
    total = counts.sum()
    mean = (n * means).sum(0) / total
    squares = n * (1 / invstds.square() - eps + (means - mean).square())
    variance = squares.sum(0) / total
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * variance * total / (total - 1))
    return mean, 1 / (variance + eps).sqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    normal = (x - _maps(mean)) * _maps(invstd)
    return (normal * _maps(weight) + _maps(bias)).to(x.dtype)


def batch_norm_backward_reduce(
    grad_out: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert all(wanted)
    grad_sum = _wide(grad_out).sum(AXES)
    product_sum = (_wide(grad_out) * (x - _maps(mean))).sum(AXES)
    return grad_sum, product_sum, product_sum * invstd, grad_sum


def batch_norm_backward_elemt(
    grad_out: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, grad_sum: Tensor,
    product_sum: Tensor, counts: Tensor,
) -> Tensor:  # fmt: skip
    assert counts.dtype is torch.int32
    total = counts.sum()
    centred = grad_out - _maps(grad_sum / total)
    centred = centred - (x - _maps(mean)) * _maps(invstd.square() * product_sum / total)
    return (centred * _maps(invstd * weight)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _maps(channels: Tensor) -> Tensor:
    return channels[:, None, None]
