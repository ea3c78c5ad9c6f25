"""SKD against hand-computed values, and the geometry that surprises its readers."""

import math

import pytest
import torch
from tiny_student import unit_rows
from torch.nn import functional

from dkdetr.losses.semantic_kd import alignment_margin, semantic_bce_loss, semantic_l1_loss

TAU = 0.05


def rows(*shape: int, seed: int) -> torch.Tensor:
    return unit_rows(*shape, seed=seed, dtype=torch.float64)


def skd(student: torch.Tensor, teacher: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
    valid = torch.ones(student.shape[:2], dtype=torch.bool)
    return semantic_bce_loss(student, teacher, valid, scale=1 / TAU, bias=bias)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_orthonormal_imitation_by_hand():
    orthonormal = torch.eye(32, dtype=torch.float64)[None, :20]
    per_region = skd(orthonormal, orthonormal).item() / 20
    assert per_region == pytest.approx(softplus(-20) + 19 * math.log(2), rel=1e-12)


def test_two_regions_by_hand():
    teacher = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64)
    student = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]], dtype=torch.float64)
    # cos: [[1, .6], [0, .8]]; the diagonal is positive.
    expected = softplus(-1 / TAU) + softplus(0.6 / TAU) + softplus(0.0) + softplus(-0.8 / TAU)
    assert skd(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    biased = softplus(-17.0) + softplus(9.0) + softplus(-3.0) + softplus(-13.0)
    assert skd(student, teacher, bias=-3.0).item() == pytest.approx(biased, rel=1e-12)


def test_images_do_not_meet():
    teacher, student = rows(2, 4, 16, seed=1), rows(2, 4, 16, seed=2)
    apart = skd(student[:1], teacher[:1]) + skd(student[1:], teacher[1:])
    torch.testing.assert_close(skd(student, teacher), apart)


def test_optimum_leaves_the_teachers_cone():
    """Imitation is not the minimum: negatives end up pointing away from each other's teacher."""
    common = rows(1, 1, 32, seed=1)
    teacher = functional.normalize(common + 0.8 * rows(1, 8, 32, seed=2), dim=-1)
    assert (teacher @ teacher.mT).mean() > 0.5
    student = teacher.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([student], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = skd(student, teacher)
        loss.backward()
        return loss

    optimiser.step(closure)
    cosines = (functional.normalize(student, dim=-1) @ teacher.mT)[0].detach()
    own = cosines.diagonal().mean()
    others = (cosines.sum() - cosines.trace()) / 56
    assert others < 0 < own
    assert skd(student, teacher) < 0.2 * skd(teacher, teacher)


def test_l1_by_hand():
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    student = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]], dtype=torch.float64)
    valid = torch.tensor([[True, True]])
    assert semantic_l1_loss(student, teacher, valid).item() == pytest.approx(0.4 + 0.8)
    assert semantic_l1_loss(student, teacher, ~valid).item() == 0


def test_empty_places_change_nothing():
    teacher, student = rows(2, 5, 16, seed=1), rows(2, 5, 16, seed=2).requires_grad_()
    valid = torch.tensor([[True, False, True, False, True], [False] * 5])
    loss = semantic_bce_loss(student, teacher, valid, scale=1 / TAU)
    torch.testing.assert_close(loss, skd(student[:1, valid[0]], teacher[:1, valid[0]]))
    loss.backward()
    assert student.grad is not None
    assert not student.grad[~valid].any()


@pytest.mark.parametrize("places", [0, 1, 3])
def test_without_regions_the_loss_is_a_zero_tied_to_the_graph(places: int):
    valid = torch.zeros(2, places, dtype=torch.bool)
    for loss_function in (
        lambda f, v: semantic_bce_loss(f, v, valid, scale=1 / TAU),
        lambda f, v: semantic_l1_loss(f, v, valid),
    ):
        student = rows(2, places, 16, seed=2).requires_grad_()
        loss = loss_function(student, rows(2, places, 16, seed=1))
        loss.backward()
        assert loss.item() == 0
        assert student.grad is not None
        assert not student.grad.any()


def test_one_region_is_all_positive():
    teacher, student = rows(1, 1, 16, seed=1), rows(1, 1, 16, seed=2)
    cosine = (teacher * student).sum().item()
    assert skd(student, teacher).item() == pytest.approx(softplus(-cosine / TAU))


def test_a_feature_of_norm_zero_stays_finite():
    student = torch.zeros(1, 2, 16, requires_grad=True)
    loss = skd(student, unit_rows(1, 2, 16))
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_margin_by_hand():
    teacher = torch.eye(4, dtype=torch.float64)[None, :3]
    valid = torch.tensor([[True, True, False]])
    # Perfect imitation: own cosine 1, mean over the two valid ones 1/2.
    assert alignment_margin(teacher, teacher, valid).item() == pytest.approx(0.5)
    swapped = teacher[:, [1, 0, 2]]
    assert alignment_margin(swapped, teacher, valid).item() == pytest.approx(-0.5)
    assert alignment_margin(teacher, teacher, ~valid & False).item() == 0
