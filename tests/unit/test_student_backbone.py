"""Weights that do not fit a trunk are refused by the settings that do not fit each other."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from tiny_student import tiny_config
from torch import nn

from dkdetr.errors import CorruptArtefactError, DataError, UsageError
from dkdetr.experiment_file import load_experiment
from dkdetr.student.backbone import resnet50, slim_resnet
from dkdetr.student.build import build_student


def test_weights_of_another_width_are_refused_by_both_settings(tmp_path):
    options = {"norm": "batch", "frozen_stages": 0, "used_stages": (3, 4)}
    said = "weights = pictograms are of width 32, and student.backbone.width = 16"
    with pytest.raises(UsageError, match=said):
        slim_resnet(weights="pictograms", width=16, **options)
    state = slim_resnet(weights="random", width=8, **options).state_dict()
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    with pytest.raises(UsageError, match=r"are of width 8, and student\.backbone\.width = 32"):
        slim_resnet(weights=str(path), width=32, **options)
    assert slim_resnet(weights=str(path), width=8, **options)
    key = next(key for key in state if key.startswith("stages.1") and state[key].ndim == 4)
    save_file(state | {key: state[key][:1].clone()}, path)
    with pytest.raises(CorruptArtefactError, match="1 tensors of other shapes") as raised:
        slim_resnet(weights=str(path), width=8, **options)
    assert len(str(raised.value)) < 250


def test_a_file_of_another_resnet_is_refused_in_one_line(tmp_path):
    """ResNet-50's names, another's shapes: PyTorch would list every tensor."""
    state = torchvision.models.wide_resnet50_2(weights=None).state_dict()
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(
        CorruptArtefactError, match=r"is no ResNet-50: .* of other shapes"
    ) as raised:
        resnet50(
            weights=str(tmp_path / "wide.pth"),
            norm="frozen",
            frozen_stages=1,
            used_stages=(3, 4, 5),
        )
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("arch", "weights", "known"),
    [("resnet50", "pictograms", "imagenet"), ("slim_resnet", "imagenet", "pictograms")],
)
def test_the_other_trunk_s_weights_are_refused_by_both_settings(arch, weights, known):
    settings = [f"student.backbone.{each}" for each in (f"arch={arch}", f"weights={weights}")]
    width = 64 if arch == "resnet50" else 32
    config = load_experiment("trial", [*settings, f"student.backbone.width={width}"]).config
    said = f"arch = {arch} has no weights = {weights}: set student.backbone.weights={known}"
    with pytest.raises(UsageError, match=said):
        build_student(config, text_dim=8)


def test_dropout_and_frozen_stages_are_the_settings():
    student = build_student(tiny_config(dropout=0.3, backbone={"frozen_stages": 1}), text_dim=16)
    drops = [each.p for each in student.modules() if isinstance(each, nn.Dropout)]
    assert set(drops) == {0.3}
    attentions = [each for each in student.modules() if isinstance(each, nn.MultiheadAttention)]
    assert {each.dropout for each in attentions} == {0.3}
    backbone = student.trunk.backbone
    assert not any(each.requires_grad for each in backbone.stem.parameters())
    frozen, moving = backbone.stages[0].parameters(), backbone.stages[1].parameters()
    assert not any(each.requires_grad for each in frozen)
    assert all(each.requires_grad for each in moving)


def test_a_resnet_s_frozen_stages_are_the_settings():
    settings = [
        "student.backbone.arch=resnet50", "student.backbone.width=64",
        "student.backbone.weights=random", "student.backbone.frozen_stages=2",
    ]  # fmt: skip
    backbone = build_student(load_experiment("trial", settings).config, text_dim=8).trunk.backbone
    moves = [any(p.requires_grad for p in each.parameters()) for each in backbone.stages]
    assert not any(each.requires_grad for each in backbone.stem.parameters())
    assert moves == [False, False, True]  # C2 and C3, of the three that are used


def test_a_mistyped_word_is_told_the_words():
    config = load_experiment("trial", ["student.backbone.weights=pictogram"]).config
    with pytest.raises(DataError, match=r"imagenet \(of resnet50\) or pictograms \(of"):
        build_student(config, text_dim=8)
