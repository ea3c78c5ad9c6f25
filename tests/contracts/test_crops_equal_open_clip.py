"""Our crops against Pillow's and open_clip's own preprocessing, on real photographs."""

import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from pipeline.crops import CropRule, crop_windows
from pipeline.resampling import cut_by_kernel, cut_by_matrices, cut_one_by_one
from pipeline.teacher import load_teacher
from pipeline.window_fit import Look

REAL_COCO = "DKDETR_TEST_COCO"
WAYS = {
    "uint8": cut_one_by_one,
    "matrices": lambda *given: cut_by_matrices(*given, dtype=torch.float32),
    "half matrices": lambda *given: cut_by_matrices(*given, dtype=torch.float16),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # slow, so it alone; test_pipeline_crop_kernel runs this file so
    WAYS = {"kernel": lambda image, windows, look: next(cut_by_kernel([image], [windows], look))}
RESIZE_MODES = {"squash": "squash", "clip_center": "shortest"}
BOXES = np.array(
    [[10, 20, 90, 60], [100, 30, 340, 310], [300, 100, 420, 130], [50, 50, 66, 66],
     [0, 0, 639, 400], [200, 10, 230, 300]], dtype=np.float32,
)  # fmt: skip


def _photographs(count: int) -> list[Path]:
    return sorted((Path(os.environ[REAL_COCO]) / "train2017").glob("*.jpg"))[:count]


@pytest.mark.skipif(REAL_COCO not in os.environ, reason=f"{REAL_COCO} is not set")
@pytest.mark.parametrize(("spec", "count"), [("ViT-B-32:random", 1), ("pictograms", 8)])
def test_crops_embed_as_those_of_pillow_and_open_clip(spec: str, count: int) -> None:
    teacher = load_teacher(spec)
    how = teacher.preprocessing
    crops: dict[tuple[str, str], list[torch.Tensor]] = {}
    expected: dict[str, list[torch.Tensor]] = {}
    for path in _photographs(1 if INTERPRETED else count):
        with Image.open(path) as file:
            picture = file.convert("RGB")
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        size = {"height": picture.height, "width": picture.width}
        windows = crop_windows(BOXES, CropRule(), **size).reshape(-1, 4)
        windows = windows[::5] if INTERPRETED else windows
        for placement, resize_mode in RESIZE_MODES.items():
            preprocess = image_transform(
                how.size_hw, is_train=False, mean=how.mean, std=how.std, resize_mode=resize_mode,
                interpolation=how.interpolation,
            )  # fmt: skip
            views = [preprocess(picture.crop(tuple(window))) for window in windows.tolist()]
            expected.setdefault(placement, []).append(torch.stack(views))
            look = Look(how.size_hw, placement, how.interpolation, how.fill)
            for way, cut in WAYS.items():
                crops.setdefault((placement, way), []).append(cut(pixels, windows, look))
    for placement, views in expected.items():
        wanted = _open_clip_rows(teacher, torch.cat(views))
        for way in WAYS:
            rows = teacher.encode_crops(torch.cat(crops[placement, way]))
            cosine = (rows * wanted).sum(1)
            print(spec, placement, way, cosine.min())
            assert cosine.min() >= 0.999, (placement, way, cosine.min())


def _open_clip_rows(teacher, pixels: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return teacher._model.encode_image(pixels, normalize=True).numpy()


@pytest.mark.parametrize("placement", ["squash", "clip_center", "pad_square"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_every_way_gives_torchvisions_pixels(placement: str, interpolation: str) -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (13, 17, 3), dtype=np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((130, 90), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    windows = np.array(
        [[0, 0, 130, 90], [5, 7, 12, 50], [40, 10, 120, 20], [60, 60, 62, 62], [0, 0, 1, 90]]
    )
    look = Look((32, 32), placement, interpolation, (120, 7, 250))  # type: ignore[arg-type]
    one_by_one = cut_one_by_one(pixels, windows, look).int()
    for way, cut in WAYS.items():
        limit = 3 if way == "half matrices" else 2
        together = cut(pixels, windows, look).int()
        assert (together - one_by_one).abs().max() <= limit, (way, placement)


@pytest.mark.parametrize("way", WAYS)
def test_padding_shows_the_fill_and_the_whole_window(way: str) -> None:
    pixels = torch.full((3, 20, 80), 200, dtype=torch.uint8)
    look = Look((20, 20), "pad_square", "bicubic", (1, 2, 3))
    (crop,) = WAYS[way](pixels, np.array([[0, 0, 80, 20]]), look)
    assert (crop[:, 7:12] == 200).all()  # 80 x 20 becomes 20 x 5, begun at row 7
    assert (crop[1, :7] == 2).all()
    assert (crop[2, 12:] == 3).all()


@pytest.mark.parametrize("way", WAYS)
def test_no_window_gives_no_crop(way: str) -> None:
    pixels = torch.zeros((3, 20, 80), dtype=torch.uint8)
    assert WAYS[way](pixels, np.zeros((0, 4), dtype=np.int64), Look((20, 20))).shape[0] == 0


def test_every_known_pretraining_has_a_placement_and_an_interpolation() -> None:
    from pipeline.teacher import _INTERPOLATIONS, _PLACEMENTS

    for model, tag in open_clip.list_pretrained():
        told = open_clip.get_pretrained_cfg(model, tag)
        assert told.get("interpolation", "bicubic") in _INTERPOLATIONS
        assert told.get("resize_mode", "shortest") in _PLACEMENTS
