"""Prints what deformable attention costs, forward and with its backward, beside transformers'.

python -m tests.benchmarks.attention [--batch 8] [--size 1024] [--repeats 20] [--types float16]

On a GPU at the paper's size (21,760 tokens): the Triton kernel, our PyTorch reference, and
transformers' module, in float32 and bfloat16 (float16 where there is no bfloat16), in float32 the
original CUDA operator, too, where it is installed. On a CPU, small, what runs there: the ratio is
what to read. All begin with reference points, offsets and logits, as a layer has them: the kernel
takes these, the others PyTorch's sampling places and softmax. An encoder looks around each token,
as a student does ("near": its first offsets, and a token's spread), or anywhere on the maps. The
error is the largest difference from float64, computed from the same rounded numbers, as a share of
the largest output. A small attention takes longer to start than to compute: what its kernels take
alone stands beside it. The Triton kernel comes as its table has it, with all gradients of values
added atomically, and with a level more and one less summed by products: what the table is judged
by.
"""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from dkdetr.precision import computing_type
from dkdetr.student.attention_backend import picks_triton
from dkdetr.student.attention_reference import plain_attention, sampling_locations
from dkdetr.student.deformable_attention import MultiScaleDeformableAttention
from dkdetr.student.encoder import TokenGrid, token_centres
from tests.benchmarks.machine import describe
from tests.benchmarks.original_op import MODULE, original_attention
from tests.benchmarks.peers import Peers

HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = (8, 16, 32, 64)
SUMMED = {f"triton, {cells} summed": cells for cells in (0, 256, 4096)}
"""Up to how many cells a level's gradients are summed by products, beside what the table says."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Values, reference points, offsets, logits."""
Shapes = list[tuple[int, int]]
Code = Callable[..., Tensor]
"""Takes inputs, gives the result."""
Make = Callable[[Shapes, torch.device], Code]


@dataclass(frozen=True)
class Row:
    """What was measured of a code: milliseconds, and the error as a share of the largest number."""

    name: str
    forward: float
    both: float
    kernels: str
    error: float


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=8 if on_gpu else 1)
    parser.add_argument("--size", type=int, default=1024 if on_gpu else 256)
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5)
    device = torch.device("cuda" if on_gpu else "cpu")
    half = str(computing_type("auto", device)).removeprefix("torch.")
    parser.add_argument(
        "--types", nargs="+", choices=("float32", "float16", "bfloat16"),
        default=["float32", half] if on_gpu else ["float32"],
    )  # fmt: skip
    options = parser.parse_args()
    peers = Peers()
    torch.set_num_threads(1)
    shapes = [(options.size // stride,) * 2 for stride in STRIDES]
    num_tokens = sum(height * width for height, width in shapes)
    print(describe("torch", "triton", "transformers"))
    print(
        f"batch {options.batch}, {num_tokens} tokens, {HEADS} heads x {CHANNELS}, {POINTS} points"
    )
    print(
        "what              type      code                forward ms  with backward ms  "
        "(transformers = 1)  kernels alone ms  error"
    )
    for what in ("encoder, near", "encoder, anywhere"):
        papers = [(1024 // stride,) * 2 for stride in STRIDES]
        met = squares_met(
            draw(what, 1, papers, torch.float32, torch.device("cpu")), papers, level=2
        )
        print(
            f"{what}: at 1024 x 1024, 64 queries meet {met:.2f} of the 4 squares of 32 x 32 cells"
        )
    for what in ("encoder, near", "encoder, anywhere", "decoder"):
        for name in options.types:
            inputs = draw(what, options.batch, shapes, getattr(torch, name), device)
            report(what, inputs, shapes, options.repeats, peers)
    return peers.exit_code()


def report(what: str, inputs: Inputs, shapes: Shapes, repeats: int, peers: Peers) -> None:
    """Prints a line for each code that runs here."""
    value = inputs[0]
    first = [tensor[:1] for tensor in inputs]
    exact = plain_attention(first[0].double(), shapes, *(tensor.double() for tensor in first[1:]))
    rows = [timed(name, run, inputs, exact, repeats) for name, run in ours(value, shapes).items()]
    for name, (module, make) in peer_codes(value).items():
        row = peers.measured(
            name, (module,),
            lambda name=name, make=make: timed(
                name, make(shapes, value.device), inputs, exact, repeats
            ),
        )  # fmt: skip
        rows += [] if row is None else [row]
    theirs = next((row for row in rows if row.name == "transformers"), None)
    for row in rows:
        ratios = "(-, -)"
        if theirs is not None:
            ratios = f"({row.forward / theirs.forward:.2f}, {row.both / theirs.both:.2f})"
        kind = str(value.dtype).removeprefix("torch.")
        print(
            f"{what:17} {kind:9} {row.name:19} {row.forward:10.3f} {row.both:17.3f}  {ratios:18} "
            f"{row.kernels:>16}  {row.error:.1e}"
        )


def timed(name: str, run: Code, inputs: Inputs, exact: Tensor, repeats: int) -> Row:
    """Returns what a code takes; `exact` is the first image's result in float64."""
    device = inputs[0].device
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    leaves[1].requires_grad_(False)
    with torch.no_grad():
        found = run(*(tensor[:1] for tensor in inputs)).double()
        forward = milliseconds(lambda: run(*inputs), repeats, device)
        grad = torch.randn_like(run(*inputs))

    def step() -> object:
        return torch.autograd.grad(run(*leaves), [leaves[0], *leaves[2:]], grad)

    with summing(SUMMED[name]) if name in SUMMED else contextlib.nullcontext():
        both = milliseconds(step, repeats, device)
        kernels = kernel_milliseconds(step, device)
    error = ((found - exact).abs().max() / exact.abs().max()).item()
    return Row(name, forward, both, kernels, error)


def ours(value: Tensor, shapes: Shapes) -> dict[str, Code]:
    """Returns our own code that runs here, by name."""
    found: dict[str, Code] = {}
    if picks_triton("auto", value.device, value.dtype, (HEADS, CHANNELS, len(shapes), POINTS)):
        from dkdetr.student.attention_op import triton_attention

        for name in ("triton", *SUMMED):
            found[name] = lambda v, *others: triton_attention(v, shapes, *others)
    return found | {"torch": lambda v, *others: plain_attention(v, shapes, *others)}


def peer_codes(value: Tensor) -> dict[str, tuple[str, Make]]:
    """Returns peers for such values by name: the module that each wants, what makes its code."""
    found: dict[str, tuple[str, Make]] = {}
    if value.is_cuda and value.dtype is torch.float32:
        found["original CUDA op"] = (MODULE, the_original)
    return found | {"transformers": ("transformers", as_installed)}


def the_original(shapes: Shapes, device: torch.device) -> Code:
    run = original_attention(shapes, device)
    return lambda v, points, offsets, logits: run(
        v, sampling_locations(points, offsets, shapes), weights_of(logits)
    )


def as_installed(shapes: Shapes, device: torch.device) -> Code:
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention as Theirs,
    )

    theirs, sizes = Theirs(), torch.tensor(shapes, device=device)

    def run(v: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        # Theirs samples in the type of the values: locations are rounded with them.
        locations = sampling_locations(points, offsets, shapes).to(v.dtype)
        return theirs(v, sizes, shapes, None, locations, weights_of(logits), 64)

    return run


def weights_of(logits: Tensor) -> Tensor:
    return logits.flatten(3).softmax(-1).view(logits.shape)


@contextlib.contextmanager
def summing(cells: int) -> Generator[None]:
    """Lets the backward kernels sum levels of at most so many cells by products."""
    from dkdetr.student import attention_op

    tile_for = attention_op._tile_for
    changed = lambda device: replace(tile_for(device), summed_cells=cells)  # noqa: E731
    with patch.object(attention_op, "_tile_for", changed):
        yield


def draw(what: str, batch: int, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Returns what an encoder's or a decoder's layer gives its attention, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(height * width for height, width in shapes)
    num_queries = 320 if what == "decoder" else num_tokens
    places = (batch, num_queries, HEADS, len(shapes), POINTS)
    value = torch.randn(batch, num_tokens, HEADS, CHANNELS, generator=generator)
    if what == "decoder":
        points = torch.rand(batch, num_queries, 1, 4, generator=generator)
        points = points.expand(-1, -1, len(shapes), -1).contiguous()
    else:
        nothing_padded = torch.zeros(1, num_tokens, dtype=torch.bool)
        grid = TokenGrid(tuple(shapes), nothing_padded, torch.ones(1, len(shapes), 2))
        points = token_centres(grid)[:, :, None]
        points = points.expand(batch, -1, len(shapes), -1).contiguous()
    if what == "encoder, anywhere":
        sides = torch.tensor([(width, height) for height, width in shapes])[:, None]
        offsets = (
            torch.rand(*places, 2, generator=generator) - points[:, :, None, :, None]
        ) * sides
    else:
        width = HEADS * CHANNELS
        start = MultiScaleDeformableAttention(
            width, HEADS, len(shapes), POINTS
        ).sampling_offsets.bias
        offsets = torch.randn(*places, 2, generator=generator)
        offsets += start.detach().view(HEADS, len(shapes), POINTS, 2)
    logits = torch.randn(places, generator=generator)
    half = [tensor.to(device, dtype) for tensor in (value, offsets, logits)]
    return half[0], points.to(device), half[1], half[2]


def squares_met(inputs: Inputs, shapes: Shapes, level: int) -> float:
    """Returns of how many squares a block of queries meets some: what the level sum must do."""
    side, block = 16, 64
    height, width = shapes[level]
    _, points, offsets, _ = inputs
    places = (
        points[:, :, None, level, None] * torch.tensor([width, height]) + offsets[:, :, :, level]
    )
    first = (places.float() - 0.5).floor()
    met = 0.0
    for top, left in itertools.product(range(0, height, side), range(0, width, side)):
        corner = torch.tensor([left, top])
        inside = ((first >= corner - 1) & (first < corner + side)).all(-1).any(-1)
        blocks = functional.pad(inside, (0, 0, 0, -inside.shape[1] % block)).unflatten(
            1, (-1, block)
        )
        met += blocks.any(2).float().mean().item()
    return met


def milliseconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median time of a call, after some to warm up.

    On a GPU up to ten are started at a time, and slow ones are repeated less often.
    """
    calls, times = 1, list[float]()
    for number in itertools.count():
        if device.type == "cuda" and number == 2:
            calls = max(1, min(10, int(0.05 / times[1])))
            repeats = repeats if times[1] < 0.02 else max(3, repeats // 4)
        if number > repeats + 1:
            break
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return 1000 * sorted(times[2:])[repeats // 2]


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
    sys.exit(main())
