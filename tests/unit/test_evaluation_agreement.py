"""Agreement with the teacher, by hand."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from dkdetr.evaluation.teacher_agreement import TeacherAgreement, agreement_by_group


def test_two_regions_by_hand():
    """Teacher: two right angles. Student: 60 degrees apart, the first on its own embedding."""
    teacher = np.array([[1.0, 0.0], [0.0, 1.0]])
    student = np.array([[2.0, 0.0], [0.5 * 3, math.sqrt(0.75) * 3]])
    image = np.array([4, 4])
    whole, base, novel = agreement_by_group(
        student, teacher, image, ["novel", "base"], temperature=0.5
    )[0:3]
    assert (whole.group, base.group, novel.group) == ("all", "novel", "base")
    novel, base = base, novel
    # cosines: first (1, 0), second (.5, .866); own less the other
    assert novel.cosine == pytest.approx(1.0)
    assert novel.margin == pytest.approx(1.0)
    assert base.cosine == pytest.approx(math.sqrt(0.75))
    assert base.margin == pytest.approx(math.sqrt(0.75) - 0.5)
    assert whole.margin == pytest.approx((1.0 + math.sqrt(0.75) - 0.5) / 2)
    # rows / .5: teacher (2, 0), student (2, 1)
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert novel.relation_kl == pytest.approx(kl)
    assert base.relation_kl == pytest.approx(kl)
    # With one other region there is no order.
    assert math.isnan(whole.rank_correlation)
    assert whole.num_regions == 2


def test_perfect_imitation_agrees_in_everything_but_scale():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(12, 5))
    image = np.repeat([1, 2], 6)
    (whole,) = agreement_by_group(7 * teacher, teacher, image, ["x"] * 12)[:1]
    assert whole.cosine == pytest.approx(1.0)
    assert whole.relation_kl == pytest.approx(0.0, abs=1e-12)
    assert whole.rank_correlation == pytest.approx(1.0)
    # A rotation of the student's space changes cosines, but no relation.
    turned = teacher @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    (rotated,) = agreement_by_group(turned, teacher, image, ["x"] * 12)[:1]
    assert rotated.relation_kl == pytest.approx(0.0, abs=1e-12)
    assert rotated.rank_correlation == pytest.approx(1.0)
    assert rotated.cosine < 0.9


def test_relations_stay_within_an_image_and_ranks_are_spearmans():
    rng = np.random.default_rng(1)
    teacher, student = rng.normal(size=(2, 9, 4))
    image = np.array([3, 3, 3, 3, 3, 8, 8, 8, 8])
    groups = ["rare"] * 5 + ["frequent"] * 4
    whole, rare, frequent = agreement_by_group(student, teacher, image, groups)
    alone = agreement_by_group(student[:5], teacher[:5], image[:5], groups[:5])[0]
    assert (rare.group, frequent.group) == ("rare", "frequent")
    assert rare.margin == pytest.approx(alone.margin)
    assert rare.relation_kl == pytest.approx(alone.relation_kl)
    t = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    s = student / np.linalg.norm(student, axis=1, keepdims=True)
    by_hand = [
        spearmanr(np.delete(s[:5] @ s[i], i), np.delete(t[:5] @ t[i], i)).statistic
        for i in range(5)
    ]
    assert rare.rank_correlation == pytest.approx(np.mean(by_hand))
    assert whole.rank_correlation == pytest.approx(
        (5 * rare.rank_correlation + 4 * frequent.rank_correlation) / 9
    )


def test_a_region_alone_in_its_image_has_a_cosine_only():
    one = agreement_by_group(np.ones((1, 3)), np.ones((1, 3)), np.array([1]), ["rare"])[0]
    assert one.cosine == pytest.approx(1.0)
    assert math.isnan(one.margin)
    assert math.isnan(one.relation_kl)
    kept = TeacherAgreement("KD queries", "s", True, 1, (one,))
    again = TeacherAgreement.from_json(kept.as_json())
    assert again.groups[0].cosine == one.cosine
    assert math.isnan(again.groups[0].margin)
    assert kept.as_json()["groups"][0]["margin"] is None
