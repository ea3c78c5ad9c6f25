import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkdetr.boxes import pairwise_iou
from dkdetr.data.transforms import (
    PIXEL_MEAN,
    PIXEL_STD,
    ViewGeometry,
    draw_geometry,
    evaluation_geometry,
    render_view,
    visible_boxes,
)

SETTINGS = {"image_size": 128, "scale_range": (0.1, 2.0), "flip_probability": 0.5}


def drawn(seed, boxes, original_hw=(90, 120), **changes) -> ViewGeometry:
    generator = torch.Generator().manual_seed(seed)
    return draw_geometry(original_hw, boxes, **(SETTINGS | changes), generator=generator)


def test_red_comes_first_and_is_normalised_as_imagenets():
    """Pretrained weights want RGB and these numbers; no other test would see them turned round."""
    assert PIXEL_MEAN == (123.675, 116.28, 103.53)
    assert PIXEL_STD == (58.395, 57.12, 57.375)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    pixels, _ = render_view(red, evaluation_geometry((8, 8), image_size=8), image_size=8)
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


def test_boxes_move_as_computed_by_hand():
    geometry = ViewGeometry((100, 200), (50, 100), 10, 20, (40, 60), flip=False)
    box = torch.tensor([[60.0, 30.0, 100.0, 80.0]])
    assert geometry.move_boxes(box).tolist() == [[10, 5, 30, 30]]
    flipped = ViewGeometry((100, 200), (50, 100), 10, 20, (40, 60), flip=True)
    assert flipped.move_boxes(box).tolist() == [[30, 5, 50, 30]]
    expected = torch.tensor([[40 / 60, 17.5 / 40, 20 / 60, 25 / 40]])
    torch.testing.assert_close(flipped.normalise(flipped.move_boxes(box)), expected)


@pytest.mark.parametrize("seed", range(40))
def test_a_box_follows_the_rectangle_painted_in_it(seed):
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(60, 200, 2))
    left, top = int(random.integers(0, width - 30)), int(random.integers(0, height - 30))
    right, bottom = left + int(random.integers(12, 30)), top + int(random.integers(12, 30))
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[top:bottom, left:right] = 255
    box = torch.tensor([[left, top, right, bottom]], dtype=torch.float32)
    geometry = drawn(seed, box, (height, width), scale_range=(0.4, 2.0))
    pixels, padding_mask = render_view(image, geometry, image_size=128)
    white = (pixels[0] * PIXEL_STD[0] + PIXEL_MEAN[0] > 127.5) & ~padding_mask
    rows, columns = white.any(dim=1).nonzero(), white.any(dim=0).nonzero()
    painted = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    cut, seen = visible_boxes(geometry, box)
    assert bool(seen)
    np.testing.assert_allclose(cut[0].numpy(), [int(side) for side in painted], atol=1.0)


@pytest.mark.parametrize("seed", range(30))
def test_a_view_is_a_legal_large_scale_jitter(seed):
    boxes = torch.tensor([[30.0, 20.0, 60.0, 70.0]])
    geometry = drawn(seed, boxes)
    longest = max(geometry.resized_hw)
    assert 0.1 * 128 - 1 <= longest <= 2 * 128 + 1
    assert geometry.resized_hw[0] / geometry.resized_hw[1] == pytest.approx(90 / 120, rel=0.1)
    for resized, view, start in zip(
        geometry.resized_hw, geometry.view_hw, (geometry.crop_top, geometry.crop_left), strict=True
    ):
        assert view == min(resized, 128)
        assert 0 <= start <= resized - view
    assert visible_boxes(geometry, boxes)[1].any()


def test_scales_crops_and_flips_have_the_stated_frequencies():
    none = torch.zeros(0, 4)
    views = [drawn(seed, none) for seed in range(2000)]
    ratios = np.array([max(view.resized_hw) / 128 for view in views])
    assert ratios.mean() == pytest.approx(1.05, abs=0.03)
    assert np.quantile(ratios, 0.25) == pytest.approx(0.1 + 1.9 / 4, abs=0.05)
    assert np.mean([view.flip for view in views]) == pytest.approx(0.5, abs=0.04)
    large = [view for view in views if view.resized_hw[1] > 160]
    places = np.array([view.crop_left / (view.resized_hw[1] - 128) for view in large])
    assert places.mean() == pytest.approx(0.5, abs=0.05)
    assert places.min() < 0.05
    assert places.max() > 0.95


def test_a_crop_is_drawn_again_until_an_object_is_seen_and_the_whole_image_is_the_last_resort():
    corner = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    for seed in range(60):
        geometry = drawn(seed, corner, (400, 400), scale_range=(1.9, 2.0))
        assert visible_boxes(geometry, corner)[1].any()
    invisible = torch.tensor([[5.0, 5.0, 5.001, 5.001]])
    assert drawn(0, invisible).view_hw == (96, 128)


def test_slivers_are_not_seen():
    geometry = evaluation_geometry((100, 100), image_size=100)
    boxes = torch.tensor([[5, 5, 5.005, 50], [5, 5, 5.1, 50], [-9, 5, 0, 50]])
    assert visible_boxes(geometry, boxes)[1].tolist() == [False, True, False]


def test_evaluation_takes_the_whole_image_with_its_longest_side_at_the_size():
    geometry = evaluation_geometry((480, 640), image_size=128)
    assert geometry == ViewGeometry((480, 640), (96, 128), 0, 0, (96, 128), flip=False)
    assert evaluation_geometry((1000, 1), image_size=128).view_hw == (128, 1)
    image = np.full((480, 640, 3), 200, dtype=np.uint8)
    pixels, padding_mask = render_view(image, geometry, image_size=128)
    assert pixels.shape == (3, 128, 128)
    expected = (200 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    torch.testing.assert_close(pixels[:, 50, 50], expected)
    assert padding_mask.sum() == 32 * 128
    assert padding_mask[96:].all()
    assert (pixels[:, 96:] == 0).all()


def test_a_mirrored_view_is_the_mirror_image():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    plain = ViewGeometry((90, 120), (90, 120), 0, 0, (90, 120), flip=False)
    mirrored = ViewGeometry((90, 120), (90, 120), 0, 0, (90, 120), flip=True)
    left, _ = render_view(image, plain, image_size=128)
    right, _ = render_view(image, mirrored, image_size=128)
    torch.testing.assert_close(left[:, :90, :120].flip(-1), right[:, :90, :120], rtol=0, atol=0)


@given(seed=st.integers(0, 10**6), height=st.integers(20, 300), width=st.integers(20, 300))
@settings(max_examples=60, deadline=None)
def test_overlaps_survive_the_move(seed, height, width):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(6, 2, generator=generator, dtype=torch.float64)
    sizes = torch.rand(6, 2, generator=generator, dtype=torch.float64) + 0.05
    boxes = torch.cat((corners, corners + sizes), dim=1) * 50
    geometry = drawn(seed, boxes, (height, width))
    moved = geometry.move_boxes(boxes)
    torch.testing.assert_close(pairwise_iou(moved, moved), pairwise_iou(boxes, boxes))
