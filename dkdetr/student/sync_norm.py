"""Batch norm whose statistics in training are those of all ranks' pictures together.

torch's `SyncBatchNorm` asks the GPU for a number in every layer, which drains its queue; it breaks
torch.compile's graph, and it refuses CPUs. This one does none of it. Its parameters and buffers
have the same names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all ranks; on one rank, and in evaluation mode, exactly that.

    Ranks may have different numbers of pixels. Each layer's forward pass sums one short vector over
    the ranks, and its backward pass another. In training every rank must go through it as often.
    Running statistics are computed on each rank from the same bits, so they are equal.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Returns the normalised map, in the type of `input`; statistics are float32 or wider."""
        if not self.training or _num_ranks() == 1:
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # The compiler makes kernels of the formula; without it torch's own read and write less.
        if input.is_cuda and not torch.compiler.is_compiling():
            return by_kernels(self, input)
        return by_formula(self, input)


def by_formula(norm: nn.BatchNorm2d, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Returns the map normalised over all ranks; running statistics have moved."""
    assert norm.momentum is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wide = x.to(norm.weight.dtype)
    own_variance, own_mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    means, variances, counts = _gathered(own_mean, own_variance, _num_pixels(x))
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(dim=0)
    # Variances about the ranks' own means: no difference of large squares (Chan et al.).
    variance = (share * (variances + (means - mean).square())).sum(dim=0)
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (total / (total - 1)), norm.momentum)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    normal = (wide - _on_maps(mean)) * _on_maps(scale) + _on_maps(norm.bias)
    return normal.to(x.dtype)


def by_kernels(norm: nn.BatchNorm2d, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Returns the same by the kernels of torch's `SyncBatchNorm`, which exist on GPUs alone."""
    running = (norm.running_mean, norm.running_var)
    options = (norm.momentum, norm.eps)
    return cast("Tensor", _ByKernels.apply(x, norm.weight, norm.bias, *running, *options))


class _ByKernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor,
        running_var: Tensor, momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        x = _dense(x)
        own_mean, own_invstd = torch.batch_norm_stats(x, eps)
        means, invstds, counts = _gathered(own_mean, own_invstd, _num_pixels(x))
        # No rank is without pixels: what torch looks for in the counts is never there.
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means.contiguous(), invstds.contiguous(), running_mean, running_var, momentum, eps,
            counts.flatten().to(running_mean.dtype),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, invstd, counts.flatten().to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_out = _dense(gradients[0])
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad_sum, product_sum, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad_out, x, mean, invstd, weight, True, True, True
        )
        sums = torch.cat((grad_sum, product_sum))
        distributed.all_reduce(sums)
        grad_sum, product_sum = sums.split(len(grad_sum))
        grad_x = torch.batch_norm_backward_elemt(
            grad_out, x, mean, invstd, weight.to(mean.dtype), grad_sum, product_sum, counts
        )
        return grad_x, grad_weight, grad_bias, None, None, None, None


@contextmanager
def own_statistics(module: nn.Module) -> Iterator[None]:
    """Lets norms over ranks go by the statistics of this rank's pictures, and asks nobody.

    Running statistics are neither used nor moved: another rank may have spoilt them. Norms of
    frozen stages, which have no gradient, keep to theirs: nobody has moved those.
    """
    norms = [
        each
        for each in module.modules()
        if isinstance(each, SyncBatchNorm2d) and each.weight.requires_grad
    ]
    kept = [(norm.training, dict(norm.named_buffers())) for norm in norms]
    for norm in norms:
        norm.train()
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.forward = partial(nn.BatchNorm2d.forward, norm)
    try:
        yield
    finally:
        for norm, (training, buffers) in zip(norms, kept, strict=True):
            del norm.forward
            norm.train(training)
            for name, value in buffers.items():
                setattr(norm, name, value)


def _gathered(mean: Tensor, spread: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each rank's means [ranks, C], spreads [ranks, C] and counts [ranks, 1]."""
    own = torch.cat((mean, spread, mean.new_full((1,), count)))
    before, after = distributed.get_rank(), _num_ranks() - distributed.get_rank() - 1
    # A sum of rows of which each rank fills its own: the one collective that every backend has.
    places = nn.functional.pad(own, (before * len(own), after * len(own)))
    rows = torch.ops.dkdetr.sum_over_ranks(places).view(_num_ranks(), -1)
    means, spreads, counts = rows.split((len(mean), len(mean), 1), dim=1)
    return means, spreads, counts


# An operator, so that torch.compile calls it as it is and autograd goes through it.
@torch.library.custom_op("dkdetr::sum_over_ranks", mutates_args=())
def _sum_over_ranks(values: Tensor) -> Tensor:
    total = values.clone()
    distributed.all_reduce(total)
    return total


@_sum_over_ranks.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _differentiate(_ctx: Any, grad_out: Tensor) -> Tensor:
    """Returns the sum of what all ranks' losses say: each of them depends on these values."""
    return torch.ops.dkdetr.sum_over_ranks(grad_out.contiguous())


_sum_over_ranks.register_autograd(_differentiate)


def _num_ranks() -> int:
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def _num_pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _dense(x: Tensor) -> Tensor:
    """Returns the map as the kernels read it."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _on_maps(channels: Tensor) -> Tensor:
    return channels[:, None, None]
