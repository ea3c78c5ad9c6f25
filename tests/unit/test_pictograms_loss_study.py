"""The study of losses on cached embeddings: its spaces, its score and that it learns at all."""

import pytest
import torch
from torch.nn import functional

from pipeline.pictograms import loss_study
from pipeline.pictograms.loss_study import Material, _average_precision, learn, spaces
from pipeline.pictograms.loss_study_rows import Recipe, recipes, selected

NAMES, BASE, DIM, FEATURES = 8, 5, 16, 256


def unit(*shape, generator):
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.fixture(scope="module")
def material():
    """Features are a fixed random map of an object's kind; the teacher knows all kinds."""
    generator = torch.Generator().manual_seed(0)
    text = unit(NAMES, DIM, generator=generator)
    looks = torch.randn(NAMES, FEATURES, generator=generator)

    def seen(kinds):
        return looks[kinds] + 0.3 * torch.randn(*kinds.shape, FEATURES, generator=generator)

    regions = torch.randint(NAMES, (60, 12), generator=generator)
    labels = torch.randint(BASE, (60, 10), generator=generator)
    labels[:, 6:] = -1
    val = torch.randint(NAMES, (200,), generator=generator)
    return Material(
        region_features=seen(regions), region_embeddings=text[regions],
        region_valid=torch.ones(60, 12, dtype=torch.bool),
        base_features=seen(labels.clamp(min=0)), base_labels=labels,
        val_features=seen(val), val_labels=val,
        text=text, is_base=torch.arange(NAMES) < BASE,
    )  # fmt: skip


def test_average_precision_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    wanted = torch.tensor([True, False, True, False])
    assert _average_precision(scores, wanted) == pytest.approx((1 + 2 / 3) / 2)


def test_the_cone_is_clips_and_turning_changes_no_similarity(material):
    turned = dict(spaces(material, ["plain", "cone", "dim512"]))
    assert turned["plain"] is material
    cone = turned["cone"]
    for vectors in (cone.text, cone.region_embeddings):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(()), atol=1e-5)
    crops = cone.region_embeddings.flatten(0, 1)
    apart = material.region_embeddings.flatten(0, 1)
    # Two unrelated crops (cosine 0) get (0 + 1) / (1 + 1); names 2.89 / 3.89; across 0.2.
    assert torch.allclose(crops @ crops.T, (apart @ apart.T + 1) / 2, atol=1e-4)
    names = (material.text @ material.text.T + 1.7**2) / (1 + 1.7**2)
    assert torch.allclose(cone.text @ cone.text.T, names, atol=1e-4)
    assert ((crops @ cone.text.T) - (apart @ material.text.T) / 2.79).mean() == pytest.approx(
        0.2, abs=0.01
    )
    wide = turned["dim512"]
    assert wide.text.shape == (NAMES, 512)
    assert torch.allclose(
        wide.region_embeddings.flatten(0, 1) @ wide.text.T, apart @ material.text.T, atol=1e-4
    )


def test_a_taught_student_recognises_what_was_never_named(material):
    plain = learn(material, Recipe("none"), seed=0, steps=60, bias_init=-4.0)
    taught = learn(material, Recipe("l1", "l1", 1.0), seed=0, steps=60, bias_init=-4.0)
    assert taught.map_novel > plain.map_novel + 20
    assert taught.map_base > 80


def test_every_loss_meets_the_same_weights():
    by_name: dict[str, set[float]] = {}
    for recipe in recipes(-4.0):
        weight = recipe.skd_weight or recipe.rkd_weight / 10
        if "+" not in recipe.name and weight:
            by_name.setdefault(recipe.name, set()).add(round(weight, 3))
    assert set(by_name) == {"bce", "bce_biased", "sharp", "l1", "infonce", "rkd"}
    assert len({frozenset(weights) for weights in by_name.values()}) == 1


def test_a_bias_of_skds_own_leaves_the_classifiers():
    asked = selected(["cone"], ["none", "bce", "bce_biased"], [0.0, 1.0], -4.0)
    assert [(space, bias, row.name, row.skd_bias) for space, bias, row in asked] == [
        ("cone", 0.0, "none", 0.0), ("cone", 0.0, "bce", 0.0), ("cone", 0.0, "bce_biased", -4.0),
    ]  # fmt: skip
    by_space = {(space, bias, row.skd_bias) for space, bias, row in
                selected(["plain", "cone"], ["bce+rkd"], None, None)}  # fmt: skip
    assert by_space == {("plain", -4.0, -4.0), ("cone", 0.0, 0.0)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--spaces cones", "no space 'cones'"),
        ("--losses bce,kl", "no loss 'kl'"),
        ("--spaces cone --losses bce_biased", "add --skd-bias -4"),
        ("--losses bce --weights 0.5", "no row in space 'plain'"),
    ],
)
def test_a_selection_without_rows_is_refused_before_anything_is_read(
    words, told, monkeypatch, capsys, tmp_path
):
    command = ["loss_study", str(tmp_path / "no_cache"), "--val", "none", *words.split()]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        loss_study.main()
    assert told in capsys.readouterr().err.splitlines()[-1]
