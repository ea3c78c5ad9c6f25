"""A teacher that differs in one silent detail is refused by its canary."""

import dataclasses

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn

from dkdetr.errors import MismatchError
from pipeline.canary import canary_embeddings, check_canary, pack_canary
from pipeline.teacher import load_teacher
from tests.unit.test_pipeline_teacher import weights  # noqa: F401  a fixture


def _other_activation(teacher):
    found = 0
    for module in teacher._model.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.GELU, QuickGELU)):
                setattr(module, name, QuickGELU() if isinstance(child, nn.GELU) else nn.GELU())
                found += 1
    assert found


def _blue_first(teacher):
    encode = teacher.crop_features
    teacher.crop_features = lambda crops: encode(crops.flip(1))


def _without_mean_and_std(teacher):
    teacher._scale = torch.full_like(teacher._scale, 1 / 255)
    teacher._shift = torch.zeros_like(teacher._shift)


def _other_interpolation(teacher):
    now = teacher.preprocessing.interpolation
    other = "bilinear" if now == "bicubic" else "bicubic"
    teacher.preprocessing = dataclasses.replace(teacher.preprocessing, interpolation=other)


def _one_changed_weight(teacher):
    tensor = max(teacher._model.parameters(), key=lambda each: each.ndim == 2)
    with torch.no_grad():
        tensor.view(-1)[: tensor.numel() // 50].mul_(2).add_(0.1)


_IN_PIXELS_AND_WEIGHTS = [_blue_first, _without_mean_and_std, _other_interpolation]


def _refused(spec, swap):
    teacher = load_teacher(spec)
    recorded = pack_canary(canary_embeddings(teacher))
    assert check_canary(recorded, load_teacher(spec), where="a cache") > 0.9999
    swap(teacher)
    with pytest.raises(MismatchError, match=r"canary cosine \S+ < 0.9999") as caught:
        check_canary(recorded, teacher, where="a cache")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("swap", [_other_activation, _one_changed_weight, *_IN_PIXELS_AND_WEIGHTS])
def test_a_silent_difference_of_a_vision_transformer_is_refused(weights, swap):  # noqa: F811
    _refused(f"tiny-clip:{weights}", swap)


@pytest.mark.parametrize("swap", [_one_changed_weight, *_IN_PIXELS_AND_WEIGHTS])
def test_a_silent_difference_of_the_shipped_teacher_is_refused(swap):
    """Its picture tower has no GELU, and its prompts turn by less than 1e-4 with the other one."""
    _refused("pictograms", swap)
