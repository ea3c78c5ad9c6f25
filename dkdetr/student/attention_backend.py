"""Which code does deformable attention (`ops.backend`): the Triton kernel, or plain PyTorch."""

import functools
import itertools
import os
from typing import Literal

import torch
from torch import nn

from dkdetr.errors import UsageError
from dkdetr.student.attention_reference import plain_attention
from dkdetr.triton_trial import problem_of, say_once

Backend = Literal["auto", "triton", "torch"]
_TRUSTED = 0.01
"""Mean error of a trial, as a share of the mean number: bfloat16's rounding is a fifth of it."""
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

    `auto` takes it on CUDA devices. It is compiled and run once, small, and must give plain
    PyTorch's numbers before it is trusted; where that fails, a line on stderr says so and plain
    PyTorch takes over.

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

    def trial() -> str | None:
        from dkdetr.student.attention_op import trial_queries

        for num_queries, coordinates in itertools.product(trial_queries(device), (2, 4)):
            problem = _try_out(device, dtype, dims, num_queries, coordinates)
            if problem is not None:
                return problem
        return None

    return problem_of(device, trial)


def _try_out(
    device: torch.device, dtype: torch.dtype, dims: Dims, num_queries: int, coordinates: int
) -> str | None:
    """Returns what is wrong with the numbers that the kernels give; None if nothing is.

    The maps are such that the gradients of fine levels are added and those of coarse ones summed,
    as at the paper's size: the kernels that are tried are those that an encoder and a decoder run.
    """
    H, C, L, P = dims
    shapes = [(48, 48)] * (L - L // 2) + [(16, 16)] * (L // 2)
    sizes = [side for shape in shapes for side in shape]
    num_tokens = sum(height * width for height, width in shapes)
    exact = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device, kind)

    with (
        torch.inference_mode(False),  # the trial may come in the midst of anything
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        value = draw(1, num_tokens, H, C) - 0.5
        reference = draw(1, num_queries, L, coordinates, kind=exact)
        offsets = 8 * draw(1, num_queries, H, L, P, 2) - 4
        logits = 4 * draw(1, num_queries, H, L, P)
        given = (value, reference, offsets, logits)
        out, softmax = torch.ops.dkdetr.deformable_attention(*given, sizes)
        grad_out = draw(*out.shape) - 0.5
        op = torch.ops.dkdetr.deformable_attention_backward
        found = (out, *op(grad_out, *given, softmax, sizes))
        leaves = [each.to(exact).requires_grad_() for each in (value, offsets, logits)]
        plain = plain_attention(leaves[0], shapes, reference, *leaves[1:])
        wanted = (plain, *torch.autograd.grad(plain, leaves, grad_out.to(exact)))
        for ours, theirs in zip(found, wanted, strict=True):
            # Of means: a sample near a cell's edge may be counted with either side.
            error = (ours.to(exact) - theirs).abs().mean()
            if not (error <= _TRUSTED * theirs.abs().mean()).item():
                return "the kernels give other numbers than plain PyTorch"
    return None
