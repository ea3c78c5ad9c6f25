"""RKD against hand-computed values and the properties of Eq. 5 as we read it."""

import math

import pytest
import torch
from tiny_student import unit_rows

from dkdetr.losses.relational_kd import batch_relational_loss, lay_end_to_end, relational_loss

TAU = 0.2


def rows(*shape: int, seed: int) -> torch.Tensor:
    return unit_rows(*shape, seed=seed, dtype=torch.float64)


def everything_valid(features: torch.Tensor) -> torch.Tensor:
    return torch.ones(features.shape[:2], dtype=torch.bool)


def rkd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return relational_loss(student, teacher, everything_valid(student), temperature=TAU)


def rotation(dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q


def test_value_by_hand():
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    # Teacher's rows are softmax([5, 0]), the student's softmax([5, 5]) = [1/2, 1/2].
    p = 1 / (1 + math.exp(-5))
    expected = 2 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert rkd(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_not_negative_and_zero_only_where_relations_agree(seed: int):
    teacher = rows(2, 5, 16, seed=seed)
    student = rows(2, 5, 16, seed=seed + 100)
    assert rkd(student, teacher) > 1e-3
    turned = teacher @ rotation(16, seed)
    assert rkd(3.0 * turned, teacher).item() == pytest.approx(0, abs=1e-12)


def test_does_not_depend_on_how_either_space_is_turned():
    teacher, student = rows(2, 6, 16, seed=1), rows(2, 6, 16, seed=2)
    plain = rkd(student, teacher)
    torch.testing.assert_close(rkd(student @ rotation(16, 3), teacher), plain)
    torch.testing.assert_close(rkd(student, teacher @ rotation(16, 4)), plain)


def test_gradient_of_a_row_is_student_minus_teacher_over_temperature():
    teacher = rows(1, 5, 16, seed=1)
    student = rows(1, 5, 16, seed=2).requires_grad_()
    rkd(student, teacher).backward()
    with torch.no_grad():
        similarity_gradient = (
            (student @ student.mT / TAU).softmax(-1) - (teacher @ teacher.mT / TAU).softmax(-1)
        ) / TAU
        # R = F F^T, so each feature is met in its row and in its column; then normalisation.
        gradient = (similarity_gradient + similarity_gradient.mT) @ student
        gradient -= (gradient * student).sum(-1, keepdim=True) * student
    torch.testing.assert_close(student.grad, gradient, rtol=1e-9, atol=1e-9)


def test_a_step_down_the_gradient_brings_relations_closer():
    """The printed Eq. 5 has a minus sign; with it this step would part them."""
    teacher = rows(1, 5, 16, seed=1)
    student = rows(1, 5, 16, seed=2).requires_grad_()
    before = rkd(student, teacher)
    (gradient,) = torch.autograd.grad(before, student)
    stepped = (student - 1e-3 * gradient).detach()

    def distance(features: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(features, dim=-1)
        return (unit @ unit.mT - teacher @ teacher.mT).square().sum()

    assert rkd(stepped, teacher) < before
    assert distance(stepped) < distance(student)


def test_the_teacher_gets_no_gradient():
    teacher = rows(1, 4, 16, seed=1).requires_grad_()
    student = rows(1, 4, 16, seed=2).requires_grad_()
    rkd(student, teacher).backward()
    assert teacher.grad is None


def test_groups_are_apart_and_one_group_is_together():
    teacher, student = rows(3, 4, 16, seed=1), rows(3, 4, 16, seed=2)
    apart = sum(rkd(student[i : i + 1], teacher[i : i + 1]) for i in range(3))
    torch.testing.assert_close(rkd(student, teacher), apart)
    together = rkd(student.reshape(1, 12, 16), teacher.reshape(1, 12, 16))
    laid = lay_end_to_end(student, teacher, everything_valid(student))
    as_one = batch_relational_loss(laid, laid, first_column=0, temperature=TAU)
    torch.testing.assert_close(as_one, together)
    assert not torch.isclose(together, torch.as_tensor(apart))


def test_empty_places_change_nothing():
    teacher, student = rows(2, 6, 16, seed=1), rows(2, 6, 16, seed=2).requires_grad_()
    valid = torch.tensor([[True, True, False, True, False, False], [False] * 6])
    loss = relational_loss(student, teacher, valid, temperature=TAU)
    expected = rkd(student[:1, valid[0]], teacher[:1, valid[0]])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad is not None
    assert not student.grad[~valid].any()
    spoilt = torch.where(valid[..., None], student, 1e3)
    torch.testing.assert_close(relational_loss(spoilt, teacher, valid, temperature=TAU), expected)


@pytest.mark.parametrize("places", [0, 1, 3])
def test_without_regions_the_loss_is_a_zero_tied_to_the_graph(places: int):
    student = rows(2, places, 16, seed=2).requires_grad_()
    valid = torch.zeros(2, places, dtype=torch.bool)
    loss = relational_loss(student, rows(2, places, 16, seed=1), valid, temperature=TAU)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_one_region_has_no_relation_to_learn():
    loss = rkd(rows(1, 1, 16, seed=1), rows(1, 1, 16, seed=2))
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_without_the_self_similarity_by_hand():
    teacher = torch.eye(3, dtype=torch.float64)[None]
    student = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    student = torch.nn.functional.pad(student, (0, 1))
    valid = everything_valid(student)
    loss = relational_loss(student, teacher, valid, temperature=TAU, include_self=False)
    # Each of the teacher's rows: two others, alike. The student's: [1, 0], [1, 0], [0, 0].
    p = 1 / (1 + math.exp(-5))
    expected = 2 * 0.5 * (math.log(0.5 / p) + math.log(0.5 / (1 - p)))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    single = valid & torch.tensor([[True, False, False]])
    alone = relational_loss(student, teacher, single, temperature=TAU, include_self=False)
    assert alone.item() == 0  # nobody to relate to


def test_reverse_is_the_divergence_the_other_way_round():
    teacher, student = rows(2, 5, 16, seed=1), rows(2, 5, 16, seed=2)
    valid = everything_valid(student)
    reverse = relational_loss(student, teacher, valid, temperature=TAU, reverse=True)
    torch.testing.assert_close(reverse, rkd(teacher, student))
    assert not torch.isclose(reverse, rkd(student, teacher))


def test_cross_only_by_hand():
    """Two images of two regions: a row keeps itself and the other image's regions."""
    teacher, student = rows(2, 2, 16, seed=1), rows(2, 2, 16, seed=2)
    laid = lay_end_to_end(student, teacher, everything_valid(student))
    for include_self in (True, False):
        loss = batch_relational_loss(
            laid, laid, first_column=0, temperature=TAU, cross_only=True, include_self=include_self
        )
        expected = 0.0
        for row in range(4):
            others = [2, 3] if row < 2 else [0, 1]
            kept = [row, *others] if include_self else others
            said = torch.log_softmax(laid.features[row] @ laid.features[kept].T / TAU, 0)
            wanted = torch.log_softmax(laid.embeddings[row] @ laid.embeddings[kept].T / TAU, 0)
            expected += (wanted.exp() * (wanted - said)).sum().item()
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cross_only", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
def test_shares_of_rows_add_up_to_the_whole_map(cross_only: bool, include_self: bool):
    teacher, student = rows(4, 3, 16, seed=1), rows(4, 3, 16, seed=2)
    valid = torch.tensor([[True, True, False], [False] * 3, [True] * 3, [True, False, False]])
    options = {"temperature": TAU, "cross_only": cross_only, "include_self": include_self}
    whole = lay_end_to_end(student, teacher, valid)
    together = batch_relational_loss(whole, whole, first_column=0, **options)
    shares = []
    for rank in (0, 1):
        mine = slice(2 * rank, 2 * rank + 2)
        own = lay_end_to_end(student[mine], teacher[mine], valid[mine], first_image=2 * rank)
        shares.append(batch_relational_loss(own, whole, first_column=6 * rank, **options))
    torch.testing.assert_close(shares[0] + shares[1], together)
