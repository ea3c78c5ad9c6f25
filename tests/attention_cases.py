"""Inputs for deformable attention, friendly and not, and what the kernel must make of them.

Everything is drawn in float32 and, for values, rounded to the type under test: the reference
computes in float64 from exactly the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dkdetr.student.attention_reference import SpatialShapes, reference_attention

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
    value: Tensor
    shapes: SpatialShapes
    locations: Tensor
    weights: Tensor

    def to(self, device: str, dtype: torch.dtype) -> "Case":
        exact = torch.promote_types(dtype, torch.float32)
        return Case(
            self.value.to(device, dtype),
            self.shapes,
            self.locations.to(device, exact),
            self.weights.to(device, exact),
        )


def draw(
    shapes: SpatialShapes, *, B: int = 1, Q: int = 5, H: int = 1, C: int = 4, P: int = 2
) -> Case:
    """Normal values, a third of the places outside."""
    generator = torch.Generator().manual_seed(0)
    tokens, L = sum(height * width for height, width in shapes), len(shapes)
    return Case(
        torch.randn(B, tokens, H, C, generator=generator),
        shapes,
        1.4 * torch.rand(B, Q, H, L, P, 2, generator=generator) - 0.2,
        torch.rand(B, Q, H, L, P, generator=generator) / (L * P),
    )


def on_borders() -> Case:
    """Every edge, middle and quarter of the cells of an 8 x 4 map, and one and two cells beyond.

    All are exact in float32: so is the side on which a sample at a middle has its gradient.
    """
    x = torch.arange(-8, 24) / 16
    y = torch.arange(-16, 48) / 32
    places = torch.stack(torch.meshgrid(x, y[::3], indexing="ij"), dim=-1).view(1, -1, 1, 1, 8, 2)
    case = draw(((8, 4),), Q=places.shape[1], P=8)
    return Case(case.value, case.shapes, places, case.weights)


def on_one_pixel() -> Case:
    case = draw(((4, 4), (2, 2)), Q=33, H=2)
    return Case(case.value, case.shapes, torch.full_like(case.locations, 0.6), case.weights)


def far_outside() -> Case:
    case = draw(((4, 4), (2, 3)), Q=10)
    far = torch.tensor([-1.0, 2.0, -1e4, 1e9, -3e9, 1e30, -3e38, float("inf"), -float("inf"), 7.0])
    locations = case.locations.clone()
    locations[..., 0] = far[None, :, None, None, None]
    locations[:, 5:, ..., 1] = far[None, :5, None, None, None]
    return Case(case.value, case.shapes, locations, case.weights)


def wide_maps_many_queries() -> Case:
    """Places are thousandths (of 1024), exact on these maps: the interpreter fuses no products."""
    case = draw(((17, 33), (3, 16)), Q=530, P=1)
    places = (1024 * case.locations).round() / 1024
    return Case(case.value, case.shapes, places, case.weights)


CASES: dict[str, Callable[[], Case]] = {
    "prime sizes, several programs": lambda: draw(((7, 5), (3, 2)), B=2, Q=67, H=3, C=5, P=3),
    "the student's own": lambda: draw(((4, 6), (2, 3), (1, 2), (1, 1)), Q=5, H=2, C=32, P=4),
    "one of everything": lambda: draw(((1, 1),), Q=1, C=1, P=1),
    "empty levels": lambda: draw(((0, 0), (3, 4), (0, 5)), P=1),
    "on borders and middles": on_borders,
    "all on one pixel": on_one_pixel,
    "far outside": far_outside,
    "wide maps, many queries": wide_maps_many_queries,
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
    given = (case.value, case.locations, case.weights)
    inputs = [tensor.clone().requires_grad_() for tensor in given]
    exact = [tensor.cpu().double().requires_grad_() for tensor in given]
    # What grid_sample makes of infinity is its own affair: 9 lies outside as well.
    exact[1] = exact[1].detach().clamp(-9, 9).requires_grad_()
    out = run(inputs[0], case.shapes, inputs[1], inputs[2])
    wanted = reference_attention(exact[0], case.shapes, exact[1], exact[2])
    assert out.dtype == dtype
    _compare("output", out, wanted)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(out, inputs, grad.to(device))
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double(), retain_graph=True)
    # Sums as products of matrices round what each query gives each cell: weights are not negative,
    # so that the sum of all that is given, signs left out, is a gradient as well.
    (given,) = torch.autograd.grad(wanted, exact[:1], grad.double().abs())
    _compare("gradient of value", grads[0], wanted_grads[0], ROUNDING[dtype] * given)
    _compare("gradient of locations", grads[1], wanted_grads[1])
    _compare("gradient of weights", grads[2], wanted_grads[2])


def _compare(name: str, found: Tensor, wanted: Tensor, more: Tensor | float = 0.0) -> None:
    assert found.isfinite().all(), name
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    allowed = ROUNDING[found.dtype] * wanted.abs() + SHARE[found.dtype] * largest + more
    excess = ((found.cpu().double() - wanted).abs() - allowed).max()
    assert excess <= 0, f"{name}: {excess.item():.2e} beyond what is allowed"
