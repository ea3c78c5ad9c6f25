"""Training steps with every option: they learn, empty is harmless, what is off is absent."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from launches import Launches
from step_options import OPTIONS, FakeTeacher, step_of, training_batch
from tiny_student import TEXT_DIM, tiny_config

from dkdetr.data.transforms import ViewGeometry
from dkdetr.engine.pairing import boxes_in_original, embed_own_anchors
from dkdetr.engine.step import _means
from dkdetr.experiment_file import ConfigError, config_from_dict, config_to_dict
from dkdetr.structures import OriginalImage
from dkdetr.student.build import build_student


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_learns(name: str):
    step = step_of(name)
    batch = training_batch(step.config)
    result = step(batch)
    assert all(value.isfinite() for value in (result.parts | result.statistics).values())
    for parameter_name, parameter in step.student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name
    again = step(batch)
    if name not in (
        "fed",
        "denoising",
        "everything extra",
    ):  # another draw of classes, another loss
        assert again.parts["total"] < result.parts["total"]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("counts", [(0, 0), (2, 0)])
@pytest.mark.parametrize("filled", [(0, 0), (1, 0)])
def test_empty_images_and_few_regions_are_finite_and_reach_every_parameter(
    name: str, counts: tuple[int, int], filled: tuple[int, int]
):
    step = step_of(name)
    batch = training_batch(step.config, counts=counts, filled=filled)
    result = step(batch)
    assert all(value.isfinite() for value in (result.parts | result.statistics).values())
    for parameter_name, parameter in step.student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_where_every_own_anchor_is_a_base_object_nothing_is_distilled():
    for name in ("iou", "hybrid", "online", "iou without auxiliary"):
        step = step_of(name, all_base=True)
        batch = training_batch(step.config)
        result = step(batch)
        half = name == "hybrid"  # its anchored half does not ask the student's anchors
        assert (result.statistics["kd_regions_per_image"] > 0) == half
        assert (result.parts["skd"] != 0) == half
        assert all(weight.grad is not None for weight in step.student.parameters())


KD_NAMES = {
    "cached": {"kd_content"},
    "siglip_bias": {"kd_content", "kd_calibration.log_scale", "kd_calibration.bias"},
    "cached without auxiliary": set(),
    "extra queries alone": set(),
    "denoising": {"kd_content", "denoising_content.weight", "denoising_content.bias"},
}


@pytest.mark.parametrize("name", KD_NAMES)
def test_what_is_off_has_no_parameters(name: str):
    student = step_of(name).student
    names = {n for n, _ in student.named_parameters()}
    off = replace(tiny_config(), kd=replace(tiny_config().kd, regions_per_image=0))
    plain = {n for n, _ in build_student(off, text_dim=TEXT_DIM).named_parameters()}
    assert names - plain == KD_NAMES[name]
    assert plain <= names


@pytest.mark.parametrize(
    ("name", "num_queries"),
    [
        ("cached", 12 + 4),
        ("cached without auxiliary", 12),
        ("iou", 12 + 12),
        ("hybrid", 12 + 2 + 12),
        ("online", 12 + 12),
        ("extra queries alone", 12 + 6),
        ("extra queries", 12 + 4 + 6),
        ("denoising", 12 + 4 + 2 * 2),
    ],
)
def test_what_is_off_is_not_computed(name: str, num_queries: int):
    """Counted: queries through the decoder, in an epoch that distils and in one before."""
    denoising = 4 if name == "denoising" else 0  # in every epoch
    for epoch, expected in ((40, num_queries), (39, 12 + denoising)):
        step = step_of(name)
        seen: list[int] = []
        step.student.decoder.layers[0].register_forward_hook(
            lambda _module, _args, out, seen=seen: seen.append(out.shape[1])
        )
        batch = training_batch(step.config)
        if epoch < 40:
            batch = replace(batch, regions=None, originals=())
        result = step(batch, epoch=epoch)
        assert seen == [expected]
        distils = name != "extra queries alone" and epoch == 40
        assert ("skd" in result.parts) == distils
        assert step.teacher.num_calls == (2 if name == "online" and epoch == 40 else 0)


def test_matching_is_done_again_only_where_pairs_depend_on_it(monkeypatch: pytest.MonkeyPatch):
    from dkdetr.losses import criterion

    calls = itertools.count()
    match = criterion.assign
    monkeypatch.setattr(criterion, "assign", lambda *a: (next(calls), match(*a))[1])
    for name, expected in (("cached", 1), ("iou", 1), ("cached without auxiliary", 2)):
        before = next(calls)
        step_of(name)(training_batch(step_of(name).config))
        assert next(calls) - before - 1 == expected, name


def test_figures_are_means_over_the_micro_batches_that_have_them_in_two_launches_a_count():
    one, two, three, ten = torch.tensor([1.0, 2.0, 3.0, 10.0])
    with Launches() as counted:
        means = _means([{"a": one, "b": two, "c": ten}, {"a": three, "b": three}])
    assert {name: value.item() for name, value in means.items()} == {"a": 2, "b": 2.5, "c": 10}
    assert list(means) == ["a", "b", "c"]
    assert counted.total == 4
    assert _means([]) == {}


def test_buffers_are_kept_and_put_back_in_a_launch_a_type():
    each = step_of("cached")
    assert each.step._copy_of_buffers() == []  # without a scaler no step is taken back
    each.step.scaler = torch.amp.GradScaler("cpu")
    before = {name: value.clone() for name, value in each.student.named_buffers()}
    assert {value.dtype for value in before.values()} == {torch.float32, torch.int64}
    with Launches() as counted:
        kept = each.step._copy_of_buffers()
    assert counted.by_name == {"_foreach_copy_": 2}
    for buffer in each.student.buffers():
        buffer += 1
    each.step._put_back(kept)
    assert all(torch.equal(value, before[name]) for name, value in each.student.named_buffers())


@pytest.mark.parametrize("flip", [False, True])
def test_a_box_finds_its_way_back_to_the_original(flip: bool):
    geometry = ViewGeometry((200, 400), (300, 600), 30, 70, (256, 250), flip)
    boxes = torch.tensor([[60.0, 25.0, 190.0, 180.0], [100, 50, 120, 90]], dtype=torch.float64)
    view = geometry.normalise(geometry.move_boxes(boxes))
    original = OriginalImage(np.zeros((200, 400, 3), np.uint8), *geometry.to_original())
    torch.testing.assert_close(boxes_in_original(view, original), boxes)


def test_the_teacher_sees_no_more_than_the_view_shows():
    """An anchor that reaches beyond the view is cut at its edges, flipped or not."""
    boxes = torch.tensor([[[0.9, 0.5, 0.4, 1.2], [0.5, 0.5, 0.2, 0.2]]])
    for flip, expected in ((False, [62.0, 20, 80, 60]), (True, [20.0, 20, 38, 60])):
        geometry = ViewGeometry((100, 100), (100, 100), 20, 20, (40, 60), flip)
        original = OriginalImage(np.zeros((100, 100, 3), np.uint8), *geometry.to_original())
        teacher = FakeTeacher()
        embed_own_anchors(teacher, [original], boxes, torch.tensor([[True, False]]))
        np.testing.assert_allclose(teacher.asked[0], [expected], atol=1e-4)


def test_the_teacher_sees_filled_places_only():
    teacher = FakeTeacher()
    originals = [OriginalImage(np.zeros((9, 9, 3), np.uint8), (9.0, 9.0), (0.0, 0.0))] * 2
    boxes = torch.rand(2, 3, 4)
    valid = torch.tensor([[True, False, True], [False] * 3])
    embeddings = embed_own_anchors(teacher, originals, boxes, valid)
    assert embeddings.shape == (2, 3, TEXT_DIM)
    assert not embeddings[~valid].any()
    torch.testing.assert_close(embeddings[valid].norm(dim=-1), torch.ones(2))
    assert [len(boxes) for boxes in teacher.asked] == [2, 0]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (
            {"auxiliary_queries": False, "alignment": "hybrid"},
            "^settings of 'kd': alignment.*= true$",
        ),
        ({"auxiliary_queries": False, "content": "slots"}, "auxiliary_queries = true"),
        ({"rkd": {"gather": True, "relations": ["image"]}}, "rkd.relations"),
        ({"rkd": {"relations": []}}, "kd.rkd.relations"),
        ({"alignment": "hybrid", "regions_per_image": 1}, "at least 2"),
        ({"align_iou": 1.5}, "kd.align_iou"),
        ({"skd": {"temperature": 0}}, "kd.skd.temperature"),
        ({"hybrid_queries": -1}, "kd.hybrid_queries"),
    ],
)
def test_impossible_settings_are_refused(table: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        config_from_dict({**config_to_dict(tiny_config()), "kd": table})


def test_a_scaler_goes_on_from_a_run_without_one():
    """A run that began on a device with bf16, or a burn-in in float32, goes on in float16."""
    whole, half = step_of("cached").step, step_of("cached").step
    half.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    half.load_state_dict(whole.state_dict())
    assert half.scaler.get_scale() == 8.0
    half.scaler.scale(torch.ones(()))  # it exists from its first use on
    half.scaler.update(4.0)
    other = step_of("cached").step
    other.scaler = torch.amp.GradScaler("cpu")
    other.load_state_dict(half.state_dict())
    assert other.scaler.get_scale() == 4.0
    whole.load_state_dict(half.state_dict())  # and back
    assert whole.scaler.state_dict() == {}
