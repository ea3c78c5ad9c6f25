"""Prints what deformable attention costs, forward and with its backward, beside transformers'.

python -m tests.benchmarks.attention [--batch 8] [--size 1024] [--repeats 20]

On a GPU at the paper's size (21,760 tokens): the Triton kernel, our PyTorch reference, and
transformers' module, in float32 and bfloat16. On a CPU, small, what runs there: the ratio is what
to read. The error is the largest difference from float64, computed from the same rounded numbers,
as a share of the largest output. A small attention takes longer to start than to compute: what its
kernels take alone stands beside it. The Triton kernel comes as its table has it, with all gradients
of values added atomically, and with one level more summed by products: what the table is judged by.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention as Theirs,
)

from dkdetr.student.attention_backend import picks_triton
from dkdetr.student.attention_reference import reference_attention
from tests.benchmarks.machine import describe

HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = (8, 16, 32, 64)
SUMMED = {"triton, added": 0, "triton, 1024 summed": 1024}
"""Up to how many cells a level's gradients are summed by products, beside what the table says."""

Inputs = tuple[Tensor, Tensor, Tensor]
Shapes = list[tuple[int, int]]


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=8 if on_gpu else 1)
    parser.add_argument("--size", type=int, default=1024 if on_gpu else 256)
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5)
    options = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(1)
    shapes = [(options.size // stride,) * 2 for stride in STRIDES]
    num_tokens = sum(height * width for height, width in shapes)
    print(describe("torch", "triton", "transformers"))
    print(
        f"batch {options.batch}, {num_tokens} tokens, {HEADS} heads x {CHANNELS}, {POINTS} points"
    )
    print(
        "what     type      code                forward ms  with backward ms  (transformers = 1)  "
        "kernels alone ms  error"
    )
    for what, num_queries in (("encoder", num_tokens), ("decoder", 320)):
        for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
            inputs = draw(options.batch, num_queries, num_tokens, dtype, device)
            report(what, inputs, shapes, options.repeats)


def report(what: str, inputs: Inputs, shapes: Shapes, repeats: int) -> None:
    value, locations, weights = inputs
    one = (value[:1].double(), shapes, locations[:1].double(), weights[:1].double())
    exact = reference_attention(*one)
    codes = contestants(value, shapes)
    rows: list[tuple[str, float, float, str, float]] = []
    for name, run in codes.items():
        leaves = tuple(tensor.clone().requires_grad_() for tensor in inputs)
        with torch.no_grad():
            found = run(value[:1], locations[:1], weights[:1]).double()
            forward = milliseconds(lambda run=run: run(*inputs), repeats, value.device)
        grad = torch.randn_like(run(*inputs))

        def step(run: Callable[..., Tensor] = run, leaves: Inputs = leaves, grad: Tensor = grad):
            return torch.autograd.grad(run(*leaves), leaves, grad)

        with summing(SUMMED[name]) if name in SUMMED else contextlib.nullcontext():
            both = milliseconds(step, repeats, value.device)
            kernels = kernel_milliseconds(step, value.device)
        error = ((found - exact).abs().max() / exact.abs().max()).item()
        rows.append((name, forward, both, kernels, error))
    _, their_forward, their_both, *_ = rows[-1]
    for name, forward, both, kernels, error in rows:
        ratios = f"({forward / their_forward:.2f}, {both / their_both:.2f})"
        kind = str(value.dtype).removeprefix("torch.")
        print(
            f"{what:8} {kind:9} {name:19} {forward:10.3f} {both:17.3f}  {ratios:18} "
            f"{kernels:>16}  {error:.1e}"
        )


def contestants(value: Tensor, shapes: Shapes) -> dict[str, Callable[..., Tensor]]:
    """Returns what runs here, by name; transformers' module last."""
    found: dict[str, Callable[..., Tensor]] = {}
    if picks_triton("auto", value.device, value.dtype, (HEADS, CHANNELS, len(shapes), POINTS)):
        from dkdetr.student.attention_op import triton_attention

        for name in ("triton", *SUMMED):
            found[name] = lambda v, loc, w: triton_attention(v, shapes, loc, w)
    found["torch"] = lambda v, loc, w: reference_attention(v, shapes, loc, w)
    theirs, sizes = Theirs(), torch.tensor(shapes, device=value.device)

    def as_installed(v: Tensor, loc: Tensor, w: Tensor) -> Tensor:
        # Theirs samples in the type of the values: locations are rounded with them.
        return theirs(v, sizes, shapes, None, loc.to(v.dtype), w.to(v.dtype), 64)

    return found | {"transformers": as_installed}


@contextlib.contextmanager
def summing(cells: int) -> Generator[None]:
    """Lets the backward kernels sum levels of at most so many cells by products."""
    from dkdetr.student import attention_op

    tile_for = attention_op._tile_for
    changed = lambda device: replace(tile_for(device), summed_cells=cells)  # noqa: E731
    with patch.object(attention_op, "_tile_for", changed):
        yield


def draw(
    batch: int, num_queries: int, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sizes = (batch, num_queries, HEADS, len(STRIDES), POINTS)
    value = torch.randn(batch, num_tokens, HEADS, CHANNELS, generator=generator)
    locations = torch.rand(*sizes, 2, generator=generator)
    weights = torch.rand(sizes, generator=generator).flatten(3).softmax(-1).view(sizes)
    return value.to(device, dtype), locations.to(device), weights.to(device)


def milliseconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median time of a call, after one to warm up; on a GPU ten are started at a time."""
    calls, times = 10 if device.type == "cuda" else 1, list[float]()
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return 1000 * sorted(times[1:])[repeats // 2]


def kernel_milliseconds(function: Callable[[], object], device: torch.device) -> str:
    """What a GPU computes in a call, without the gaps in which it waits to be told what."""
    if device.type != "cuda":
        return "-"
    calls = 10
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    on_gpu = [each for each in profiler.key_averages() if each.device_type.name == "CUDA"]
    return f"{sum(each.self_device_time_total for each in on_gpu) / 1000 / calls:.3f}"


if __name__ == "__main__":
    main()
