"""A teacher that differs in one silent detail is refused by its canary."""

import dataclasses

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn

from dkdetr.errors import MismatchError
from pipeline.canary import canary_embeddings, check_canary, pack_canary
from pipeline.teacher import load_teacher


@pytest.fixture(scope="module")
def recorded():
    return pack_canary(canary_embeddings(load_teacher("pictograms")))


def _other_activation(teacher):
    found = 0
    for module in teacher._model.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.GELU, QuickGELU)):
                setattr(module, name, QuickGELU() if isinstance(child, nn.GELU) else nn.GELU())
                found += 1
    assert found


def _blue_first(teacher):
    encode = teacher.encode_crops
    teacher.encode_crops = lambda crops: encode(crops.flip(1))


def _without_mean_and_std(teacher):
    teacher._scale = torch.full_like(teacher._scale, 1 / 255)
    teacher._shift = torch.zeros_like(teacher._shift)


def _other_interpolation(teacher):
    now = teacher.preprocessing.interpolation
    other = "bilinear" if now == "bicubic" else "bicubic"
    teacher.preprocessing = dataclasses.replace(teacher.preprocessing, interpolation=other)


def _one_changed_weight(teacher):
    weights = max(teacher._model.parameters(), key=lambda tensor: tensor.ndim == 2)
    with torch.no_grad():
        weights.view(-1)[: weights.numel() // 50].mul_(2).add_(0.1)


@pytest.mark.parametrize(
    "swap",
    [
        _other_activation,
        _blue_first,
        _without_mean_and_std,
        _other_interpolation,
        _one_changed_weight,
    ],
)
def test_a_silent_difference_is_refused(recorded, swap):
    teacher = load_teacher("pictograms")
    assert check_canary(recorded, teacher, where="a cache") > 0.9999
    swap(teacher)
    with pytest.raises(MismatchError, match=r"canary cosine \S+ < 0.9999") as caught:
        check_canary(recorded, teacher, where="a cache")
    assert caught.value.exit_code == 4
