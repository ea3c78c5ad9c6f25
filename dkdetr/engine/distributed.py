"""Ranks: who am I, and sums and votes over all of us. `torchrun` sets the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from dkdetr.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on the rank that prints and writes."""
        return self.rank == 0

    def mean(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Returns the mean over ranks, the same on each."""
        if self.world_size == 1:
            return value
        total = value.clone()
        distributed.all_reduce(total)
        return total / self.world_size

    def gather(self, rows: Float[Tensor, "*shape"]) -> Float[Tensor, "*more"]:
        """Returns every rank's rows along the first axis, in rank order; as many from each.

        A gradient with respect to a rank's rows is the sum of what all ranks' losses say, as if
        one process had done it all.
        """
        if self.world_size == 1:
            return rows
        if rows.dtype is torch.bool:
            return self.gather(rows.to(torch.uint8)).bool()
        return cast("Tensor", _AllGather.apply(rows, self.rank, self.world_size))

    def any(self, flag: bool) -> bool:
        """Returns True on every rank if it is True on one."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
        return bool(votes.item())

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.world_size > 1:
            distributed.barrier()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.rank, ctx.num_rows = rank, len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        first = ctx.rank * ctx.num_rows
        return total[first : first + ctx.num_rows], None, None


@contextmanager
def join_ranks(device: str, *, timeout: timedelta | None = None) -> Iterator[Ranks]:
    """Yields this process's place; starts and ends the process group where there are several.

    Args:
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        timeout: how long a rank waits for the others; None: torch's own.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = pick_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timeout)
    try:
        yield Ranks(rank=rank, world_size=world_size, device=chosen)
    finally:
        distributed.destroy_process_group()


def pick_device(device: str, *, local_rank: int = 0) -> torch.device:
    """Returns the device that a `--device` option names.

    Raises:
        UsageError: CUDA is asked for and not there, or the name means nothing.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device}: give auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this PyTorch sees no CUDA device; try --device cpu")
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", local_rank)
    return chosen
