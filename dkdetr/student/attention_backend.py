"""Which code does deformable attention (`ops.backend`): the Triton kernel, or plain PyTorch."""

import functools
import itertools
import os
from typing import Literal

import torch
from torch import nn

from dkdetr.errors import UsageError
from dkdetr.triton_trial import problem_of, say_once

Backend = Literal["auto", "triton", "torch"]
Dims = tuple[int, int, int, int]
"""Heads, channels a head, levels, points: what a kernel is compiled for."""


def use_backend(student: nn.Module, backend: Backend, device: torch.device) -> None:
    """Lets every attention of a student take `backend`.

    Raises:
        UsageError: it is "triton", which cannot run on this device or is not deterministic.
    """
    if backend == "triton":
        if torch.are_deterministic_algorithms_enabled():
            raise UsageError(
                "ops.backend=triton adds gradients up in whatever order threads come, and "
                "--deterministic was asked for: use ops.backend=auto"
            )
        picks_triton(backend, device, torch.float32, (8, 32, 4, 4))
    for module in student.modules():
        if hasattr(module, "backend"):
            setattr(module, "backend", backend)  # noqa: B010  a setting, no tensor or module


@torch.compiler.assume_constant_result
def picks_triton(backend: Backend, device: torch.device, dtype: torch.dtype, dims: Dims) -> bool:
    """Returns whether the Triton kernel does this attention.

    `auto` takes it on CUDA devices. It is compiled and run once, small, before it is trusted;
    where that fails, a line on stderr says so and plain PyTorch takes over.

    Raises:
        UsageError: "triton" is asked for and cannot run.
    """
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False
    problem = _problem(device, dtype, dims)
    if problem is None:
        return True
    if backend == "triton":
        raise UsageError(f"ops.backend=triton: {problem}; use ops.backend=auto or torch")
    say_once(f"deformable attention goes by plain PyTorch, which is slower: {problem}")
    return False


@functools.cache
def _problem(device: torch.device, dtype: torch.dtype, dims: Dims) -> str | None:
    """Returns why the kernel cannot run; None if it did."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernel runs on GPUs, not on '{device.type}'"

    def trial() -> None:
        from dkdetr.student.attention_op import trial_queries

        for num_queries, coordinates in itertools.product(trial_queries(device), (2, 4)):
            _try_out(device, dtype, dims, num_queries, coordinates)

    return problem_of(device, trial)


def _try_out(
    device: torch.device, dtype: torch.dtype, dims: Dims, num_queries: int, coordinates: int
) -> None:
    H, C, L, P = dims
    value = torch.zeros(1, L, H, C, dtype=dtype, device=device)
    reference = torch.full((1, num_queries, L, coordinates), 0.5, device=device)
    logits = torch.zeros(1, num_queries, H, L, P, dtype=dtype, device=device)
    inputs = (value, reference, torch.stack((logits, logits), dim=-1), logits)
    sizes = [1, 1] * L
    out, softmax = torch.ops.dkdetr.deformable_attention(*inputs, sizes)
    torch.ops.dkdetr.deformable_attention_backward(out, *inputs, softmax, sizes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a kernel's failure shows late
