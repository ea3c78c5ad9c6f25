import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.crops import CropRule, combine_crops, crop_windows
from pipeline.resampling import cut_windows
from pipeline.window_fit import Look


def test_windows_round_outward_and_grow_about_the_centre() -> None:
    windows = crop_windows(
        np.array([[10.2, 20.5, 30.9, 40.0]], dtype=np.float32), CropRule(), height=100, width=100
    )
    assert windows.shape == (1, 2, 4)
    assert windows[0, 0].tolist() == [10, 20, 31, 40]
    # centre (20.55, 30.25), half sides 10.35 and 9.75, times 1.5: 5.025..36.075, 15.625..44.875
    assert windows[0, 1].tolist() == [5, 15, 37, 45]


def test_windows_on_whole_pixels_do_not_grow_by_float_noise() -> None:
    box = np.array([[10.0, 20.0, 30.000001, 40.0]], dtype=np.float32)
    windows = crop_windows(box, CropRule(scales=(1.0,)), height=100, width=100)
    assert windows[0, 0].tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 0, 0],
        [50, 40, 50, 40],
        [49.9, 39.9, 60, 60],
        [-30, -30, -20, -20],
        [70, 70, 90, 90],
        [-5, -5, 99, 99],
        [30, 30, 20, 20],
    ],
)
def test_windows_stay_in_the_picture_and_keep_two_pixels(box: list[float]) -> None:
    windows = crop_windows(np.array([box], dtype=np.float32), CropRule(), height=40, width=50)
    low, high = windows[..., :2], windows[..., 2:]
    assert (low >= 0).all()
    assert (high <= [50, 40]).all()
    assert (high - low >= 2).all()


def test_windows_of_a_picture_one_pixel_wide() -> None:
    windows = crop_windows(np.array([[0, 3, 1, 4.0]]), CropRule(scales=(1.0,)), height=9, width=1)
    assert windows[0, 0].tolist() == [0, 3, 1, 5]


def test_squash_agrees_with_pillow() -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (8, 12, 3), dtype=np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC))
    windows = np.array([[0, 0, 90, 60], [5, 7, 12, 50], [40, 10, 80, 20]])
    # On noise the two differ where values between the two passes leave 0..255.
    pixels = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    crops = cut_windows(pixels, windows, Look((32, 32)))
    for crop, window in zip(crops, windows.tolist(), strict=True):
        expected = (
            Image.fromarray(picture).crop(tuple(window)).resize((32, 32), Image.Resampling.BICUBIC)
        )
        difference = crop.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
        assert difference.abs().max() <= 3


def test_clip_center_shows_the_central_square() -> None:
    picture = torch.zeros(3, 20, 80, dtype=torch.uint8)
    picture[:, :, 30:50] = 200
    window = np.array([[0, 0, 80, 20]])
    centre = cut_windows(picture, window, Look((20, 20), "clip_center"))
    squashed = cut_windows(picture, window, Look((20, 20)))
    assert (centre == 200).all()
    assert not (squashed == 200).all()


def test_combined_scales_are_unit_and_between() -> None:
    pair = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]], dtype=np.float32)
    combined = combine_crops(pair)
    np.testing.assert_allclose(combined, [[0.5**0.5, 0.5**0.5], [0, 1]], atol=1e-6)


def test_a_context_square_has_eight_times_the_area_and_lies_in_the_picture() -> None:
    rule = CropRule("context_square", (1.0, 0.5))
    boxes = np.array([[40, 40, 50, 60], [0, 0, 10, 20], [10, 10, 90, 90]], dtype=np.float32)
    windows = crop_windows(boxes, rule, height=100, width=120)
    # sqrt(8 x 10 x 20) = 40 about (45, 50); half of it at scale 0.5.
    assert windows[0].tolist() == [[25, 30, 65, 70], [35, 40, 55, 60]]
    assert windows[1, 0].tolist() == [0, 0, 40, 40]  # moved into the picture
    assert windows[2, 0].tolist() == [0, 0, 120, 100]  # no greater than the picture


def test_sum_weighs_a_crop_by_its_length_and_mean_does_not() -> None:
    features = np.array([[[3.0, 0.0], [0.0, 4.0]]], dtype=np.float32)
    np.testing.assert_allclose(combine_crops(features, "sum"), [[0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(combine_crops(features, "mean"), [[0.5**0.5] * 2], atol=1e-6)
