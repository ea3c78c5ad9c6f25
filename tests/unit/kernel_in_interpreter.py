"""The Triton kernels on a CPU, through Triton's interpreter.

`test_student_kernel` runs this file in a process of its own: TRITON_INTERPRET=1 must stand in the
environment before Triton is imported for the first time.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dkdetr.errors import UsageError
from dkdetr.student import attention_backend, attention_op
from dkdetr.student.attention_backend import picks_triton, use_backend
from dkdetr.student.attention_op import triton_attention
from dkdetr.student.attention_reference import SpatialShapes, plain_attention
from dkdetr.student.deformable_attention import (
    MultiScaleDeformableAttention,
    deformable_attention,
)
from tests.attention_cases import CASES, SUMMED, Case, check, draw, sum_levels

CPU = torch.device("cpu")


@pytest.mark.parametrize("summed", SUMMED)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, summed: str, monkeypatch: pytest.MonkeyPatch):
    sum_levels(monkeypatch, SUMMED[summed])
    check(CASES[name](), triton_attention, "cpu", torch.float32)


@pytest.mark.parametrize("summed", ["added", "summed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name", ["the student's own", "on borders and middles", "far outside", "around boxes"]
)
def test_equals_the_reference_in_other_types(
    name: str, dtype: torch.dtype, summed: str, monkeypatch: pytest.MonkeyPatch
):
    sum_levels(monkeypatch, SUMMED[summed])
    check(CASES[name](), triton_attention, "cpu", dtype)


def test_coarse_levels_are_summed_where_many_queries_share_them(monkeypatch: pytest.MonkeyPatch):
    """Which levels are added to is the tile's word, but the levels that are summed are the last."""
    sizes = [40, 40, 4, 4, 30, 30, 16, 16, 0, 3]
    softmax = torch.empty(1, 5000, 1, 2)
    tile = replace(attention_op._TILES[9, 0], summed_cells=512)
    monkeypatch.setattr(attention_op, "_tile_for", lambda _device: tile)
    value = torch.empty(1, 1, 1, 32)
    assert attention_op._num_added(value, softmax, sizes) == 3
    assert attention_op._num_added(value, softmax[:, :2047], sizes) == 5
    assert attention_op._num_added(value, softmax.double(), sizes) == 5
    assert attention_op._num_added(torch.empty(1, 1, 1, 33), softmax, sizes) == 5
    tile = replace(tile, summed_cells=0)
    assert attention_op._num_added(value, softmax, sizes[:-2]) == 4
    tile = replace(tile, summed_cells=1600)
    assert attention_op._num_added(value, softmax, sizes) == 0


@pytest.mark.parametrize("coordinates", [2, 4])
def test_gradients_equal_finite_differences(coordinates: int):
    case = draw(((2, 2), (1, 2)), Q=2, C=2, P=1, R=coordinates).to("cpu", torch.float64)
    assert torch.autograd.gradcheck(
        lambda v, o, w: triton_attention(v, case.shapes, case.reference_points, o, w),
        leaves(case), eps=1e-7, atol=1e-5, fast_mode=True,
    )  # fmt: skip


def leaves(case: Case) -> list[Tensor]:
    """What has a gradient."""
    return [t.clone().requires_grad_() for t in (case.value, case.offsets, case.logits)]


# It looks at gradients of tensors of its own.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operators_keep_torch_s_contract():
    """Schema, fake tensors, autograd, and tracing with static and dynamic shapes."""
    case = draw(((2, 2), (1, 2)), Q=2, C=2, P=1)
    value, offsets, logits = leaves(case)
    sizes = [2, 2, 1, 2]
    tensors = (value, case.reference_points, offsets, logits)
    torch.library.opcheck(torch.ops.dkdetr.deformable_attention.default, (*tensors, sizes))
    fixed = [tensor.detach() for tensor in tensors]
    softmax = torch.ones(1, 2, 1, 2)
    torch.library.opcheck(
        torch.ops.dkdetr.deformable_attention_backward.default,
        (torch.randn(1, 2, 2), *fixed, softmax, sizes),
    )


def test_reference_points_get_no_gradient_and_say_so():
    case = draw(((2, 2),))
    points = case.reference_points.clone().requires_grad_()
    with pytest.raises(ValueError, match="detach them"):
        triton_attention(case.value, case.shapes, points, case.offsets, case.logits)
    with torch.no_grad():
        triton_attention(case.value, case.shapes, points, case.offsets, case.logits)


def test_far_along_a_map_shares_are_of_the_exact_sum():
    """On a map of 128 a place rounded to float32 would be 4e-6 of a cell off."""
    case = draw(((1, 128),), Q=200, P=1)
    generator = torch.Generator().manual_seed(2)
    points, offsets = torch.full_like(case.reference_points, 0.5), torch.zeros_like(case.offsets)
    # 128 is a power of two: the interpreter, which fuses nothing, multiplies exactly as well.
    points[..., 0] = 0.5 + torch.rand(points.shape[:-1], generator=generator) / 2 - 0.02
    offsets[..., 0] = torch.rand(offsets.shape[:-1], generator=generator)
    value = torch.ones_like(case.value)
    value[:, ::2] = -1
    found = triton_attention(value, case.shapes, points, offsets, case.logits)
    exact = (each.double() for each in (points, offsets, case.logits))
    wanted = plain_attention(value.double(), case.shapes, *exact)
    assert (found - wanted).abs().max() < 1e-6


def test_no_gradient_of_the_softmax_is_filled_with_zeros():
    """Nobody differentiates what it is known by."""
    case = draw(((2, 2),), Q=7, H=3)
    inputs = leaves(case)
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    out = triton_attention(inputs[0], case.shapes, case.reference_points, *inputs[1:])
    with Watch():
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert "dkdetr.deformable_attention_backward.default" in called
    assert not [name for name in called if "zeros" in name]


def test_levels_of_few_cells_are_summed_and_no_other(monkeypatch: pytest.MonkeyPatch):
    summed: list[int] = []

    def watched(level: int, *given: Any, run: Any = attention_op._sum_level) -> None:
        summed.append(level)
        run(level, *given)

    monkeypatch.setattr(attention_op, "_sum_level", watched)
    sum_levels(monkeypatch, 6)
    check(draw(((4, 4), (2, 3), (1, 1))), triton_attention, "cpu", torch.float32)
    assert summed == [1, 2]


def test_tensors_of_any_strides_are_read():
    case = draw(((3, 2), (1, 2)), H=2)
    tensors = (case.value, case.reference_points, case.offsets, case.logits)
    value, *others = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)
    wanted = triton_attention(tensors[0], case.shapes, *tensors[1:])
    assert torch.equal(triton_attention(value, case.shapes, *others), wanted)


def sum_of_level(points: Tensor, grad_out: Tensor) -> Tensor:
    """Gradients of a map of 32 x 32, in rows, of queries that look at these (x, y) alone."""
    Q = len(points)
    case = draw(((32, 32),), Q=Q, C=16)
    softmax = torch.tensor([0.0, 1.0]).expand(1, Q, 1, 2).contiguous()  # all weights are 1
    sums = torch.zeros_like(case.value)
    given = [points.view(1, Q, 1, 2), torch.zeros_like(case.offsets), torch.zeros_like(case.logits)]
    attention_op._sum_level(0, [*given, softmax, grad_out, sums], [32, 32])
    return sums.view(32, 32, 16)


def test_queries_that_look_elsewhere_are_passed_by():
    """A query's gradient that is no number spoils the square of cells it looks at, no other."""
    points = torch.full((130, 2), 0.25)  # in the square at the top left
    points[64:] = 0.75
    grad_out = torch.ones(1, 130, 16)
    grad_out[:, 3] = float("nan")
    sums = sum_of_level(points, grad_out)
    spoilt = sums.isnan().any(-1)
    assert spoilt[:16, :16].all()
    assert spoilt.sum() == 16 * 16
    # At 24 x 24 the two samples of a query meet in the corner of four cells, from 66 queries.
    assert sums[23:25, 23:25].flatten().tolist() == [66 * 2 / 4] * 64


def test_squares_that_a_sample_only_touches_are_met():
    """The cells around the middle of 32 x 32 lie in four squares of 16 x 16, one in each."""
    sums = sum_of_level(torch.full((64, 2), 0.5), torch.ones(1, 64, 16))
    assert sums[15:17, 15:17].flatten().tolist() == [64 * 2 / 4] * 64
    assert sums.sum() == 64 * 2 * 16


def test_nothing_asked_is_nothing_done():
    case = draw(((2, 2),), Q=0)
    inputs = leaves(case)
    out = triton_attention(inputs[0], case.shapes, case.reference_points, *inputs[1:])
    assert out.shape == (1, 0, 4)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert not any(grad.any() for grad in grads)


def test_the_module_compiles_whole():
    torch.manual_seed(0)
    attention = MultiScaleDeformableAttention(8, num_heads=2, num_levels=2, num_points=1)
    use_backend(attention, "triton", torch.device("cpu"))
    shapes: SpatialShapes = ((2, 3), (1, 2))
    tokens, query = torch.randn(1, 8, 8, requires_grad=True), torch.randn(1, 4, 8)
    padding = torch.zeros(1, 8, dtype=torch.bool)
    reference = torch.rand(1, 4, 2, 4)

    def step(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
        out = module(query, reference, tokens, padding, shapes)
        return out, torch.autograd.grad(out.square().sum(), tokens)[0]

    wanted = step(attention)
    found = step(torch.compile(attention, fullgraph=True, backend="aot_eager"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_under_autocast_reference_points_and_the_softmax_stay_exact():
    attention = MultiScaleDeformableAttention(8, num_heads=2, num_levels=1, num_points=2)
    use_backend(attention, "triton", torch.device("cpu"))
    seen: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.dkdetr.deformable_attention.default:
                seen.extend(tensor.dtype for tensor in args[:4])
                out = func(*args, **(kwargs or {}))
                seen.append(out[1].dtype)
                return out
            return func(*args, **(kwargs or {}))

    tokens = torch.randn(1, 4, 8)
    padding = torch.zeros(1, 4, dtype=torch.bool)
    with Watch(), torch.autocast("cpu", dtype=torch.bfloat16):
        attention(tokens, torch.rand(1, 4, 1, 2), tokens, padding, ((2, 2),))
    half, exact = torch.bfloat16, torch.float32
    assert seen[-5:] == [half, exact, half, half, exact]


def test_deterministic_algorithms_go_by_gathering():
    case = draw(((2, 2),))
    tensors = (case.value, case.shapes, case.reference_points, case.offsets, case.logits)
    assert picks_triton("triton", torch.device("cpu"), torch.float32, (1, 4, 1, 2))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UsageError, match="deterministic"):
            use_backend(torch.nn.Linear(1, 1), "triton", torch.device("cpu"))
        found = deformable_attention(*tensors, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, deformable_attention(*tensors, backend="torch"))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_trial_accepts_plain_numbers_alone(coordinates: int, monkeypatch: pytest.MonkeyPatch):
    """Fine maps are added to and coarse ones summed; one wrong tensor of the four is noticed."""
    sum_levels(monkeypatch, 256)
    summed: list[int] = []
    sum_level = attention_op._sum_level
    monkeypatch.setattr(
        attention_op,
        "_sum_level",
        lambda level, *rest: summed.append(level) or sum_level(level, *rest),
    )

    def trial() -> str | None:
        return attention_backend._try_out(CPU, torch.float32, (2, 4, 2, 2), 64, coordinates)

    assert trial() is None
    assert summed == [1]
    spoilt = "the kernels give other numbers than plain PyTorch"
    with monkeypatch.context() as patch:
        patch.setattr(
            attention_backend, "plain_attention",
            lambda *given: plain_attention(*given) + 0.02 * plain_attention(*given).detach(),
        )  # fmt: skip
        assert trial() == spoilt
    gradients = torch.autograd.grad
    for wrong in range(3):

        def one_is_wrong(*given: Any, wrong: int = wrong) -> list[Tensor]:
            return [1.02 * g if n == wrong else g for n, g in enumerate(gradients(*given))]

        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", one_is_wrong)
            assert trial() == spoilt
