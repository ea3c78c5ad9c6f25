"""Inputs for deformable attention, friendly and not, and what the kernel must make of them.

Everything is drawn in float32 and, for values, rounded to the type under test: the reference
computes in float64 from exactly the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dkdetr.student.attention_reference import SpatialShapes, plain_attention

# What a result may be off by: a rounding to its own type (of bfloat16 a whole unit, for the
# interpreter cuts it off) and, of the largest number, this share: sums in float32, atomic additions
# in any order.
ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 0.0,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7,
}
SHARE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}


@dataclass(frozen=True)
class Case:
    """What attention takes, in its order."""

    value: Tensor
    shapes: SpatialShapes
    reference_points: Tensor
    offsets: Tensor
    logits: Tensor

    def to(self, device: str, dtype: torch.dtype) -> "Case":
        """As under autocast: of `dtype` but for reference points, which stay exact."""
        exact = torch.promote_types(dtype, torch.float32)
        return Case(
            self.value.to(device, dtype),
            self.shapes,
            self.reference_points.to(device, exact),
            self.offsets.to(device, dtype),
            self.logits.to(device, dtype),
        )


def draw(
    shapes: SpatialShapes, *, B: int = 1, Q: int = 5, H: int = 1, C: int = 4, P: int = 2, R: int = 2
) -> Case:
    """Normal values and logits; reference points on the map, a third of the samples beside it.

    Places are exact in float32 (the interpreter fuses no products), and never the middle of a cell,
    where the gradient has two sides: reference points are odd shares of 512, offsets count 1/16.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, L = sum(height * width for height, width in shapes), len(shapes)
    reference = torch.rand(B, Q, L, R, generator=generator)
    offsets = 2 * torch.rand(B, Q, H, L, P, 2, generator=generator) - 1
    if R == 2:
        offsets *= torch.tensor([(width, height) for height, width in shapes])[:, None] / 2
    else:
        offsets *= P
    return Case(
        torch.randn(B, tokens, H, C, generator=generator),
        shapes,
        ((256 * reference).floor() + 0.5) / 256,
        (16 * offsets).round() / 16,
        torch.randn(B, Q, H, L, P, generator=generator),
    )


def on_borders() -> Case:
    """Every edge, middle and quarter of the cells of an 8 x 4 map, and one and two cells beyond.

    All are exact in float32: so is the side on which a sample at a middle has its gradient.
    """
    x = torch.arange(-8, 24) / 2
    y = torch.arange(-16, 48) / 8
    places = torch.stack(torch.meshgrid(x, y[::3], indexing="ij"), dim=-1).view(1, -1, 1, 1, 8, 2)
    case = draw(((4, 8),), Q=places.shape[1], P=8)
    middles = torch.full_like(case.reference_points, 0.5)
    return replace(case, reference_points=middles, offsets=places - torch.tensor([4.0, 2.0]))


def on_one_pixel() -> Case:
    case = draw(((4, 4), (2, 2)), Q=33, H=2)
    reference = torch.full_like(case.reference_points, 0.625)
    return replace(case, reference_points=reference, offsets=torch.full_like(case.offsets, 0.125))


def far_outside() -> Case:
    case = draw(((4, 4), (2, 3)), Q=10)
    far = torch.tensor([-5.0, 9.0, -1e4, 6e4, -3e9, 1e30, -3e38, float("inf"), -float("inf"), 7.0])
    offsets = case.offsets.clone()
    offsets[..., 0] = far[None, :, None, None, None]
    offsets[:, 5:, ..., 1] = far[None, :5, None, None, None]
    return replace(case, offsets=offsets)


def steep_logits() -> Case:
    """One sample of a query has nearly all weight; of some, two share it."""
    case = draw(((4, 4), (2, 3)), Q=10, P=4)
    logits = 90 * case.logits
    logits[:, ::2, :, 0, 0] = logits[:, ::2, :, 1, 3] = 500.0
    return replace(case, logits=logits)


def boxes_without_a_side() -> Case:
    case = draw(((4, 4), (2, 3)), Q=9, P=3, R=4)
    reference = case.reference_points.clone()
    reference[:, ::2, :, 2] = 0.0
    return replace(case, reference_points=reference)


CASES: dict[str, Callable[[], Case]] = {
    "prime sizes, several programs": lambda: draw(((7, 5), (3, 2)), B=2, Q=67, H=3, C=5, P=3),
    "the student's own": lambda: draw(((4, 6), (2, 3), (1, 2), (1, 1)), Q=5, H=2, C=32, P=4),
    "one of everything": lambda: draw(((1, 1),), Q=1, C=1, P=1),
    "empty levels": lambda: draw(((0, 0), (3, 4), (0, 5)), P=1),
    "on borders and middles": on_borders,
    "all on one pixel": on_one_pixel,
    "far outside": far_outside,
    "wide maps, many queries": lambda: draw(((17, 33), (3, 16)), Q=530, P=1),
    "around boxes": lambda: draw(((7, 5), (3, 2)), B=2, Q=37, H=2, C=5, P=3, R=4),
    "boxes without a side": boxes_without_a_side,
    "steep logits": steep_logits,
}

SUMMED = {"added": 0, "summed": 1 << 20, "both": 20}
"""How gradients of values come about, and up to how many cells a level's are summed for it."""


def sum_levels(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    """Lets levels of at most so many cells be summed, however few queries there are."""
    from dkdetr.student import attention_op

    tile_for = attention_op._tile_for
    monkeypatch.setattr(
        attention_op,
        "_tile_for",
        lambda device: replace(tile_for(device), summed_cells=cells, summed_queries=1),
    )


def check(case: Case, run: Callable[..., Tensor], device: str, dtype: torch.dtype) -> None:
    """Result and gradients of `run` against the reference in float64."""
    case = case.to(device, dtype)
    given = (case.value, case.offsets, case.logits)
    inputs = [tensor.clone().requires_grad_() for tensor in given]
    exact = [tensor.cpu().double().requires_grad_() for tensor in given]
    # What grid_sample makes of infinity is its own affair: a thousand tokens away is outside.
    exact[1] = exact[1].detach().clamp(-1e3, 1e3).requires_grad_()
    points = case.reference_points
    out = run(inputs[0], case.shapes, points, *inputs[1:])
    wanted = plain_attention(exact[0], case.shapes, points.cpu().double(), *exact[1:])
    assert out.dtype == dtype
    _compare("output", out, wanted)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(out, inputs, grad.to(device))
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double(), retain_graph=True)
    # Sums as products of matrices round what each query gives each cell: weights are not negative,
    # so that the sum of all that is given, signs left out, is a gradient as well.
    (given,) = torch.autograd.grad(wanted, exact[:1], grad.double().abs())
    _compare("gradient of value", grads[0], wanted_grads[0], ROUNDING[dtype] * given)
    _compare("gradient of offsets", grads[1], wanted_grads[1])
    _compare("gradient of logits", grads[2], wanted_grads[2])


def _compare(name: str, found: Tensor, wanted: Tensor, more: Tensor | float = 0.0) -> None:
    assert found.isfinite().all(), name
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    allowed = ROUNDING[found.dtype] * wanted.abs() + SHARE[found.dtype] * largest + more
    excess = ((found.cpu().double() - wanted).abs() - allowed).max()
    assert excess <= 0, f"{name}: {excess.item():.2e} beyond what is allowed"
