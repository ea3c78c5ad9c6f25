"""SKD against hand-computed values, and the geometry that surprises its readers."""

import math

import pytest
import torch
from tiny_student import unit_rows
from torch.nn import functional

from dkdetr.losses.semantic_kd import (
    alignment_margin,
    semantic_bce_loss,
    semantic_centred_loss,
    semantic_infonce_loss,
    semantic_l1_loss,
)

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


def test_infonce_two_regions_by_hand():
    teacher = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64)
    student = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]], dtype=torch.float64)
    # Similarities [[1, .6], [0, .8]]: rows and columns, each a choice of two.
    rows = softplus(-0.4 / TAU) + softplus(-0.8 / TAU)
    columns = softplus(-1.0 / TAU) + softplus(-0.2 / TAU)
    everything = torch.ones(1, 2, dtype=torch.bool)
    loss = semantic_infonce_loss(student, teacher, everything, temperature=TAU)
    assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-12)
    one = semantic_infonce_loss(student[:, :1], teacher[:, :1], everything[:, :1], temperature=TAU)
    assert one.item() == 0  # a choice of one


def test_infonce_does_not_mind_a_cone():
    common = rows(1, 1, 32, seed=1)
    teacher = functional.normalize(common + 0.8 * rows(1, 8, 32, seed=2), dim=-1)
    everything = torch.ones(1, 8, dtype=torch.bool)
    imitation = semantic_infonce_loss(teacher, teacher, everything, temperature=TAU)
    assert imitation < 0.05 * skd(teacher, teacher)


def test_calibration_learns_by_the_formula():
    teacher, student = rows(1, 3, 16, seed=1), rows(1, 3, 16, seed=2)
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(1, 3, dtype=torch.bool)
    semantic_bce_loss(student, teacher, valid, scale=scale, bias=bias).backward()
    cosine = student[0] @ teacher[0].T
    residual = (10 * cosine - 2).sigmoid() - torch.eye(3)
    torch.testing.assert_close(bias.grad, residual.sum())
    torch.testing.assert_close(scale.grad, (residual * cosine).sum())


def test_centring_makes_imitation_nearly_the_minimum():
    common = rows(1, 1, 64, seed=1)
    teacher = functional.normalize(common + 0.8 * rows(1, 8, 64, seed=2), dim=-1)
    everything = torch.ones(1, 8, dtype=torch.bool)
    mean = teacher[0].mean(0)

    def centred(student: torch.Tensor) -> torch.Tensor:
        return semantic_centred_loss(student, teacher, everything, teacher_mean=mean, scale=20.0)

    away = functional.normalize(teacher - mean, dim=-1)
    expected = functional.binary_cross_entropy_with_logits(
        20 * away @ away.mT, torch.eye(8, dtype=torch.float64)[None], reduction="sum"
    )
    torch.testing.assert_close(centred(3 * teacher), expected)
    assert centred(teacher) < 0.1 * skd(teacher, teacher)
    turned = functional.normalize(-mean + 0.1 * rows(1, 8, 64, seed=4), dim=-1)
    assert centred(teacher) < centred(turned)


@pytest.mark.parametrize("kind", ["bce", "infonce", "centred"])
def test_duplicates_are_no_negatives(kind: str):
    teacher = rows(1, 4, 16, seed=1)
    teacher[0, 1] = functional.normalize(teacher[0, 0] + 0.1 * teacher[0, 2], dim=-1)
    student = rows(1, 4, 16, seed=2)
    valid = torch.tensor([[True, True, True, False]])
    mean = torch.zeros(16, dtype=torch.float64)

    def loss(twins: float, places: list[int]) -> float:
        some = (student[:, places], teacher[:, places], valid[:, places])
        if kind == "infonce":
            return semantic_infonce_loss(*some, temperature=TAU, duplicate_similarity=twins).item()
        if kind == "centred":
            return semantic_centred_loss(
                *some, teacher_mean=mean, scale=1 / TAU, duplicate_similarity=twins
            ).item()
        return semantic_bce_loss(*some, scale=1 / TAU, duplicate_similarity=twins).item()

    everywhere = [0, 1, 2, 3]
    assert loss(0.9, everywhere) < loss(0.0, everywhere)
    assert loss(0.9999, everywhere) == loss(0.0, everywhere)
    if kind != "infonce":  # pairs are apart: 0 and 1 with 2, but not with each other
        pair = loss(0.0, [0, 1]) - loss(0.0, [0]) - loss(0.0, [1])
        assert loss(0.9, everywhere) == pytest.approx(loss(0.0, everywhere) - pair)
    assert loss(0.9, [0, 1]) == pytest.approx(loss(0.0, [0]) + loss(0.0, [1]))


@pytest.mark.parametrize("places", [0, 1, 3])
def test_the_other_losses_without_regions_are_zeros_tied_to_the_graph(places: int):
    valid = torch.zeros(2, places, dtype=torch.bool)
    mean = rows(1, 16, seed=3)[0]
    for loss_function in (
        lambda f, v: semantic_infonce_loss(f, v, valid, temperature=TAU),
        lambda f, v: semantic_centred_loss(f, v, valid, teacher_mean=mean, scale=20.0),
    ):
        student = rows(2, places, 16, seed=2).requires_grad_()
        loss = loss_function(student, rows(2, places, 16, seed=1))
        loss.backward()
        assert loss.item() == 0
        assert student.grad is not None
        assert not student.grad.any()
