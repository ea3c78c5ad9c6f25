"""What the Triton kernels cut, held against Pillow's own two passes."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.resampling import cut_by_kernel
from pipeline.window_fit import Look

MODES = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIZES = ((90, 130), (40, 31), (3, 200), (64, 64))
FILL = (120, 7, 250)


def noise(seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def some_windows(height: int, width: int, count: int, seed: int) -> np.ndarray:
    """The whole picture, its edges, single pixels, and windows of any kind."""
    random = np.random.default_rng(seed)
    low = np.stack([random.integers(0, width, count), random.integers(0, height, count)], axis=1)
    high = np.stack([random.integers(low[:, 0], width), random.integers(low[:, 1], height)], axis=1)
    edges = [[0, 0, width, height], [0, 0, 1, height], [0, 0, width, 1], [0, 0, 1, 1],
             [width - 1, height - 1, width, height]]  # fmt: skip
    return np.concatenate((edges, np.concatenate((low, high + 1), axis=1)))


def fitted(window_wh: tuple[int, int], look: Look) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of a fitted window, and left and top of the crop in it, one by one."""
    (w, h), (height, width) = window_wh, look.size_hw
    if look.placement == "squash":
        return (width, height), (0, 0)
    if look.placement == "clip_center":
        size = (w * height // h, height) if height * w >= width * h else (width, h * width // w)
        return size, (round((size[0] - width) / 2), round((size[1] - height) / 2))
    if height * w >= width * h:
        size = (width, max(1, round(h * width / w)))
    else:
        size = (max(1, round(w * height / h)), height)
    return size, (-((width - size[0]) // 2), -((height - size[1]) // 2))


def by_pillow(picture: np.ndarray, window: list[int], look: Look) -> np.ndarray:
    """A crop [3, height, width]: across, then down, which Pillow 12.3 and later turn about."""
    cut, how = Image.fromarray(picture).crop(tuple(window)), MODES[look.interpolation]
    size, (left, top) = fitted(cut.size, look)
    resized = cut.resize((size[0], cut.height), how).resize(size, how)
    height, width = look.size_hw
    crop = Image.new("RGB", (width, height), look.fill)
    crop.paste(resized, (-left, -top))
    return np.array(crop).transpose(2, 0, 1)


def laid_out(picture: np.ndarray, how: str, device: str) -> Tensor:
    """[3, height, width] of the strides that a decoder leaves: pixels, channels or neither."""
    pixels = torch.from_numpy(picture).to(device).permute(2, 0, 1)
    if how == "pixels":
        return pixels
    return pixels.contiguous() if how == "channels" else pixels.mT.contiguous().mT


def check_crops(look: Look, device: str, *, count: int, layouts: tuple[str, ...]) -> None:
    """Crops of several pictures, of which one has no window, are Pillow's bit for bit."""
    pictures = noise()
    windows = [some_windows(*size, count, seed) for seed, size in enumerate(SIZES)]
    windows[1] = windows[1][:0]
    images = [laid_out(picture, layouts[index % len(layouts)], device)
              for index, picture in enumerate(pictures)]  # fmt: skip
    found = list(cut_by_kernel(images, windows, look))
    assert [len(crops) for crops in found] == [len(each) for each in windows]
    for picture, mine, crops in zip(pictures, windows, found, strict=True):
        for window, crop in zip(mine.tolist(), crops.cpu().numpy(), strict=True):
            np.testing.assert_array_equal(crop, by_pillow(picture, window, look), str(window))
