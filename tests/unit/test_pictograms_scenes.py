"""Scenes: pure functions of their seed, tight boxes, objects that stay visible."""

import dataclasses

import numpy as np
import pytest

from pipeline.pictograms.backgrounds import make_background
from pipeline.pictograms.drawings import HELD_OUT_STYLE, named_drawings
from pipeline.pictograms.scenes import (
    PlannedObject,
    ScenePlan,
    SpriteBank,
    plan_scene,
    render_scene,
)

NUM_LABELS = 6
UPRIGHT = PlannedObject(
    label=0,
    style="full",
    centre_xy=(64.0, 64.0),
    side=60.0,
    angle=0.0,
    flipped=False,
    corner_shifts=(0.0,) * 8,
    gains=(1.0, 1.0, 1.0),
)


@pytest.fixture(scope="module")
def bank():
    return SpriteBank(named_drawings()[:: len(named_drawings()) // NUM_LABELS][:NUM_LABELS])


def make_plan(index, *, held=False, size=128):
    return plan_scene(
        (5, index),
        size=size,
        num_objects=3 + index % 5,
        side_range=(18, 62),
        held_out_style=held,
        draw_label=lambda generator: int(generator.integers(NUM_LABELS)),
    )


def test_a_plan_is_a_function_of_its_seed():
    assert make_plan(3) == make_plan(3)
    assert make_plan(3) != make_plan(8)


def test_the_same_plan_gives_the_same_bytes(bank):
    plan = make_plan(4)
    fresh = SpriteBank(bank.drawings)
    assert render_scene(plan, bank).jpeg == render_scene(plan, fresh).jpeg


def test_objects_overlap_little_and_stay_inside():
    for index in range(40):
        plan = make_plan(index)
        for i, first in enumerate(plan.objects):
            assert 18 <= first.side <= 62
            assert all(0.25 * first.side < c < 128 - 0.25 * first.side for c in first.centre_xy)
            for second in plan.objects[i + 1 :]:
                reach = (first.side + second.side) / 2
                smaller = min(first.side, second.side)
                gaps = np.abs(np.subtract(first.centre_xy, second.centre_xy))
                shared = np.clip(np.minimum(reach - gaps, smaller), 0, None)
                assert shared.prod() / smaller**2 <= 0.2 + 1e-9


@pytest.mark.parametrize("held", [False, True])
def test_every_planned_object_is_visible_and_its_box_is_tight(bank, held):
    for index in range(20):
        plan = make_plan(index, held=held)
        scene = render_scene(plan, bank)
        assert len(scene.masks) == len(plan.objects)
        assert scene.masks.sum(0).max() <= 1  # a pixel shows one object
        for mask, (left, top, right, bottom) in zip(
            scene.masks, scene.boxes_xyxy.astype(int), strict=True
        ):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            for edge in (
                mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]
            ):  # fmt: skip
                assert edge.any()


def test_a_flat_drawing_that_perspective_would_fold_is_drawn_without_it():
    """The world `full` plans two such cigarettes; nothing was left to put a box around."""
    cigarette = next(each for each in named_drawings() if each.name == "cigarette")
    folded = dataclasses.replace(
        UPRIGHT,
        centre_xy=(60.0, 60.0),
        side=43.0,
        angle=8.4,
        corner_shifts=(-0.062, -0.028, 0.048, 0.094, 0.038, -0.117, 0.016, -0.046),
    )
    plain = dataclasses.replace(folded, corner_shifts=(0.0,) * 8)
    scenes = [
        render_scene(
            ScenePlan(size=128, objects=(planned,), pixel_seed=(1,)), SpriteBank([cigarette])
        )
        for planned in (folded, plain)
    ]
    assert scenes[0].masks.sum() > 40
    assert (scenes[0].masks == scenes[1].masks).all()


def test_held_out_scenes_show_only_that_style():
    drawn = {each.style for index in range(20) for each in make_plan(index, held=True).objects}
    seen = {each.style for index in range(20) for each in make_plan(index).objects}
    assert drawn == {HELD_OUT_STYLE}
    assert HELD_OUT_STYLE not in seen
    assert len(seen) >= 8


def test_an_upright_object_fills_its_frame(bank):
    plan = ScenePlan(size=128, objects=(UPRIGHT,), pixel_seed=(3,))
    left, top, right, bottom = render_scene(plan, bank).boxes_xyxy[0]
    assert max(right - left, bottom - top) == pytest.approx(60, abs=4)
    assert (left + right) / 2 == pytest.approx(64, abs=2)
    assert (top + bottom) / 2 == pytest.approx(64, abs=2)
    mirrored = dataclasses.replace(plan, objects=(dataclasses.replace(UPRIGHT, flipped=True),))
    there, back = render_scene(plan, bank).masks[0], render_scene(mirrored, bank).masks[0]
    overlap = (there & back[:, ::-1]).sum() / (there | back[:, ::-1]).sum()
    assert overlap > 0.8  # mirrored about the frame's middle, which is the scene's


def test_a_hidden_object_comes_to_the_front(bank):
    large = PlannedObject(
        label=0, style="full", centre_xy=(64.0, 64.0), side=60.0, angle=0.0, flipped=False,
        corner_shifts=(0.0,) * 8, gains=(1.0, 1.0, 1.0),
    )  # fmt: skip
    small = dataclasses.replace(large, side=20.0)
    scene = render_scene(ScenePlan(size=128, objects=(small, large), pixel_seed=(0,)), bank)
    assert scene.masks[0].sum() > 0


def test_backgrounds_are_pictures_in_range():
    for seed in range(30):
        pixels = make_background(np.random.default_rng(seed), 48)
        assert pixels.shape == (48, 48, 3)
        assert pixels.min() >= 0
        assert pixels.max() <= 1
