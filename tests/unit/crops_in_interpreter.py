"""The crop kernels on a CPU, through Triton's interpreter.

`test_pipeline_crop_kernel` runs this file in a process of its own: TRITON_INTERPRET=1 must stand in
the environment before Triton is imported for the first time.
"""

import numpy as np
import pytest
import torch

from pipeline import crop_backend, crop_kernels, crop_launch
from pipeline.resampling import cut_by_kernel, cut_together
from pipeline.window_fit import Look
from tests.crop_cases import FILL, SIZES, by_pillow, check_crops, noise, some_windows


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("placement", ["squash", "clip_center", "pad_square"])
@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_crops_are_pillow_s(size: tuple[int, int], placement: str, interpolation: str):
    look = Look(size, placement, interpolation, FILL)  # type: ignore[arg-type]
    check_crops(look, "cpu", count=2, layouts=("pixels", "channels", "neither"))


@pytest.mark.parametrize("window", [[0, 0, 80, 2], [0, 0, 2, 80], [3, 1, 79, 80]])
def test_great_windows_are_pillow_s(window: list[int]):
    picture = np.random.default_rng(1).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    for placement in ("squash", "clip_center"):
        look = Look((2, 2), placement)
        (crops,) = cut_by_kernel([pixels], [np.array([window])], look)
        np.testing.assert_array_equal(crops[0].numpy(), by_pillow(picture, window, look))


@pytest.mark.parametrize("blocks", [crop_launch._ON_GPU, crop_launch._Blocks(16, 16, 32)])
def test_blocks_of_any_size_cut_the_same(
    blocks: crop_launch._Blocks, monkeypatch: pytest.MonkeyPatch
):
    """Those of a GPU too, which the sides of a crop do not divide by."""
    monkeypatch.setattr(crop_launch, "_INTERPRETED", blocks)
    look, picture, window = (
        Look((20, 42), "pad_square", "bicubic", FILL),
        noise()[0],
        [3, 9, 70, 88],
    )
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    (crops,) = cut_by_kernel([pixels], [np.array([window, [0, 0, 9, 9]])], look)
    np.testing.assert_array_equal(crops[0].numpy(), by_pillow(picture, window, look))


def test_matrices_give_nearly_the_same():
    look = Look((24, 32), "clip_center", "bicubic", FILL)
    images = [torch.from_numpy(picture).permute(2, 0, 1).contiguous() for picture in noise()]
    windows = [some_windows(*size, 2, seed) for seed, size in enumerate(SIZES)]
    wanted = cut_together(images, windows, look, dtype=torch.float32)
    for one, other in zip(cut_by_kernel(images, windows, look), wanted, strict=True):
        apart = (one.int() - other.int()).abs()
        assert apart.max() <= 2
        assert (apart > 0).float().mean() < 0.01


def test_parts_bound_what_is_held_and_change_no_pixel(monkeypatch: pytest.MonkeyPatch):
    look = Look((8, 8))
    images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in noise()]
    windows = [
        some_windows(*size, 1, seed)[-count:]
        for seed, (size, count) in enumerate(zip(SIZES, (3, 0, 2, 5), strict=True))
    ]
    whole = list(cut_by_kernel(images, windows, look))
    launched: list[tuple[int, ...]] = []
    launch = crop_launch._launch
    monkeypatch.setattr(
        crop_launch, "_launch",
        lambda kernel, grid, *given, **options: (
            launched.append(grid), launch(kernel, grid, *given, **options)
        ),
    )  # fmt: skip
    for most, at_least in ((1 << 13, 6), (1, 3 * sum(map(len, windows)))):
        launched.clear()
        monkeypatch.setattr(crop_launch, "_PART_BYTES", most)
        for one, other in zip(cut_by_kernel(images, windows, look), whole, strict=True):
            assert torch.equal(one, other)
        assert len(launched) >= at_least
        assert sum(grid[0] for grid in launched) == 3 * sum(map(len, windows))
    launched.clear()
    next(cut_by_kernel(images, windows, look))  # later parts wait until they are asked for
    assert len(launched) == 3 * len(windows[0])


def test_the_trial_accepts_pillow_s_pixels_alone(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    assert crop_backend._try_out(cpu) is None
    monkeypatch.setattr(crop_kernels, "_HALF", crop_kernels.tl.constexpr(0))
    problem = crop_backend._try_out(cpu)
    assert problem is not None
    assert "other pixels than Pillow" in problem
