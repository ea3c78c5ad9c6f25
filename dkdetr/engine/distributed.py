"""Ranks: who am I, and sums and votes over all of us. `torchrun` sets the environment."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from dkdetr.engine.roll_call import RollCall
from dkdetr.errors import PeerFailedError, PeerLostError, PreemptedError, UsageError


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

    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks the first one's values, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """Returns True on every rank if it is True on one."""
        return self.vote(flag)[0]

    def vote(self, *flags: bool) -> tuple[bool, ...]:
        """Returns for each flag True on every rank if it is True on one.

        Waits for the other ranks, but for nothing that this one's GPU still has to do.
        """
        if self.world_size == 1:
            return flags
        with _beside(self.device):
            votes = torch.stack([torch.full((), float(flag), device=self.device) for flag in flags])
            distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
            return tuple(vote > 0 for vote in votes.tolist())

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.world_size > 1:
            distributed.barrier()


def _beside(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context whose work on a GPU stands in a queue of its own."""
    return torch.cuda.stream(_own_queue(device)) if device.type == "cuda" else nullcontext()


@cache
def _own_queue(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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


def num_ranks() -> int:
    """Returns how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Returns True unless torchrun has started this process beside a first one."""
    return _own_rank() == 0


def _own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def join_ranks(device: str, *, timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Yields this process's place; starts and ends the process group where there are several.

    Args:
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        timeout_s: how long this rank waits for the others' part in anything.

    Raises:
        PeerLostError: another rank died or did not answer in time.
    """
    world_size, rank = num_ranks(), _own_rank()
    chosen = pick_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    roll: RollCall | None = None
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        roll = RollCall(_store(), rank, world_size)
        yield Ranks(rank=rank, world_size=world_size, device=chosen)
    except Exception as error:
        lost = _is_lost_peer(error)
        if roll is not None:
            own = not lost and not isinstance(error, PeerFailedError)
            roll.leave(f"{type(error).__name__}: {_first_line(error)}" if own else "")
        if not lost:
            raise
        died = roll.who_died() if roll is not None else ""
        how = died or (
            f"it died, or did not answer for {timeout_s:g} s (of a training, "
            "compute.rank_timeout_s)"
        )
        raise PeerLostError(
            f"lost another rank: {how}; this rank ends too. What was saved stands, the same "
            f"command goes on ({_first_line(error)})"
        ) from None
    finally:
        # After an error the others may be gone, and nobody waits for a good-bye.
        if distributed.is_initialized() and sys.exc_info()[0] in (None, PreemptedError):
            distributed.destroy_process_group()


def _store() -> Any:
    """Returns the process group's own: it leads to the job's wherever torchrun has put that."""
    return distributed.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _is_lost_peer(error: Exception) -> bool:
    """Returns True for what gloo, NCCL and their store say when another rank is gone."""
    if not isinstance(error, RuntimeError):
        return False
    if isinstance(error, distributed.DistError):
        return True
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    return any(sign in str(error) for sign in signs)


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
