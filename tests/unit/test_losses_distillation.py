"""From the settings to the distilled parts: each is its own formula, with the paper's numbers."""

import pytest
import torch
from tiny_student import (
    TEXT_DIM,
    image_batch,
    loss_of,
    targets,
    teacher_regions,
    text_embeddings,
    tiny_config,
    tiny_student,
    unit_rows,
)

from dkdetr.config import ExperimentConfig
from dkdetr.experiment_file import config_from_dict, config_to_dict
from dkdetr.losses.distillation import Distillation
from dkdetr.losses.relational_kd import batch_relational_loss, lay_end_to_end, relational_loss
from dkdetr.losses.semantic_kd import (
    semantic_bce_loss,
    semantic_centred_loss,
    semantic_infonce_loss,
    semantic_l1_loss,
)


def config_of(**kd: object) -> ExperimentConfig:
    return config_from_dict(config_to_dict(tiny_config()) | {"kd": kd})


@pytest.fixture(scope="module")
def output():
    return tiny_student()(image_batch(), text_embeddings(), teacher_regions())


def parts_of(output, **kd: object) -> dict[str, torch.Tensor]:
    return dict(loss_of(output, targets(), teacher_regions(), config_of(**kd)).parts)


def given(output):
    """What the last layer says, what the teacher does, and how many regions share the loss."""
    regions = teacher_regions()
    rows = (output.distillation.features[-1], regions.embeddings, regions.valid)
    return rows, regions.valid.sum()


def test_by_default_they_are_the_papers(output):
    rows, count = given(output)
    parts = parts_of(output)
    laid = lay_end_to_end(*rows)
    expected = {
        "skd": 0.1 * semantic_bce_loss(*rows, scale=20.0),
        "rkd_image": 2 * relational_loss(*rows, temperature=0.2),
        "rkd_batch": 2 * batch_relational_loss(laid, laid, first_column=0, temperature=0.2),
    }
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value / count)


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({"loss": "l1"}, semantic_l1_loss),
        (
            {"loss": "infonce", "temperature": 0.1, "duplicate_similarity": 0.9},
            lambda *rows: semantic_infonce_loss(*rows, temperature=0.1, duplicate_similarity=0.9),
        ),
        (
            {"temperature": 0.1, "bias": -3.0, "duplicate_similarity": 0.9},
            lambda *rows: semantic_bce_loss(*rows, scale=10.0, bias=-3.0, duplicate_similarity=0.9),
        ),
    ],
)
def test_each_setting_of_skd_reaches_its_formula(output, settings, formula):
    rows, count = given(output)
    skd = parts_of(output, skd={"weight": 0.7, **settings})["skd"]
    torch.testing.assert_close(skd, 0.7 * formula(*rows) / count)


def test_the_centred_loss_is_given_the_mean_and_the_settings(output):
    rows, count = given(output)
    mean = 0.3 * unit_rows(1, TEXT_DIM, seed=11)[0]
    kd = config_of(skd={"loss": "centred", "bias": -2.0}).kd
    parts = Distillation(kd, across_ranks=None, teacher_mean=mean)(
        output, teacher_regions(), count.float()
    )
    expected = semantic_centred_loss(*rows, teacher_mean=mean, scale=20.0, bias=-2.0)
    torch.testing.assert_close(parts["skd"], 0.1 * expected / count)


@pytest.mark.parametrize(
    "settings", [{"include_self": False}, {"reverse": True}, {"temperature": 0.5}]
)
def test_each_setting_of_rkd_reaches_both_relations(output, settings):
    rows, count = given(output)
    parts = parts_of(output, rkd=settings)
    how = {"temperature": 0.2, **settings}
    laid = lay_end_to_end(*rows)
    torch.testing.assert_close(parts["rkd_image"], 2 * relational_loss(*rows, **how) / count)
    expected = 2 * batch_relational_loss(laid, laid, first_column=0, **how) / count
    torch.testing.assert_close(parts["rkd_batch"], expected)


def test_cross_only_leaves_out_pairs_of_one_image(output):
    rows, count = given(output)
    laid = lay_end_to_end(*rows)
    expected = batch_relational_loss(laid, laid, first_column=0, temperature=0.2, cross_only=True)
    part = parts_of(output, rkd={"cross_only": True})["rkd_batch"]
    torch.testing.assert_close(part, 2 * expected / count)
