"""Crops of drawings in generated scenes, from which the small teacher and the backbone learn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dkdetr.progress import progress
from pipeline.pictograms.drawings import Drawing
from pipeline.pictograms.scenes import Scene, SpriteBank, plan_scene, render_scene

_REGION_SIZE = 80
_CONTEXT = 1.7
"""A region shows the box grown by this much, so that looser crops can be cut from it later."""

_SCENE_SIZES = (128, 144, 192)
_SIDE_RANGE = (16, 76)


@dataclass(frozen=True)
class CropPool:
    """Regions around drawn objects.

    Attributes:
        regions: [num, 3, side, side] uint8.
        boxes_xyxy: [num, 4] float32: each object's box in its region, as shares of the side.
        labels: [num] int64: index of the drawing.
    """

    regions: Tensor
    boxes_xyxy: Tensor
    labels: Tensor

    def cut(self, indices: Tensor, windows_xyxy: Tensor, size: int) -> Tensor:
        """Returns the windows (shares of the region's side) as [num, 3, size, size] in 0..1."""
        pixels = self.regions[indices].float() / 255
        centres = windows_xyxy[:, :2] + windows_xyxy[:, 2:] - 1
        spans = windows_xyxy[:, 2:] - windows_xyxy[:, :2]
        matrices = torch.zeros(len(indices), 2, 3)
        matrices[:, 0, 0], matrices[:, 1, 1] = spans[:, 0], spans[:, 1]
        matrices[:, :, 2] = centres
        grid = nn.functional.affine_grid(
            matrices, [len(indices), 3, size, size], align_corners=False
        )
        return nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def make_pool(
    drawings: Sequence[Drawing], num_crops: int, *, seed: int, held_out_style: bool, title: str
) -> CropPool:
    """Returns at least `num_crops` regions, every drawing as often as any other (give or take)."""
    bank = SpriteBank(drawings)
    labels = _rounds(len(drawings), seed)
    regions: list[np.ndarray] = []
    boxes: list[tuple[float, ...]] = []
    drawn: list[int] = []
    index = 0
    with progress(title, num_crops) as advance:
        while len(regions) < num_crops:
            plan = plan_scene(
                (seed, 11, index),
                size=_SCENE_SIZES[index % len(_SCENE_SIZES)],
                num_objects=3 + index % 6,
                side_range=_SIDE_RANGE,
                held_out_style=held_out_style,
                draw_label=lambda _generator: next(labels),
            )
            for region, box in _regions(render_scene(plan, bank)):
                regions.append(region)
                boxes.append(box)
            drawn += [planned.label for planned in plan.objects]
            index += 1
            advance(min(len(regions), num_crops), "")
    return CropPool(
        regions=torch.from_numpy(np.stack(regions)).permute(0, 3, 1, 2).contiguous(),
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor(drawn),
    )


def pool_of_scenes(scenes: Sequence[tuple[Scene, Sequence[int]]]) -> CropPool:
    """Returns the regions of rendered scenes, each with its objects' labels."""
    found = [pair for scene, _ in scenes for pair in _regions(scene)]
    return CropPool(
        regions=torch.from_numpy(np.stack([region for region, _ in found])).permute(0, 3, 1, 2),
        boxes_xyxy=torch.tensor([box for _, box in found], dtype=torch.float32),
        labels=torch.tensor([label for _, labels in scenes for label in labels]),
    )


def jittered_windows(boxes_xyxy: Tensor, generator: torch.Generator) -> Tensor:
    """Returns boxes [num, 4] moved, stretched and grown as proposals are, within 0..1."""
    num = len(boxes_xyxy)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=generator)

    grown = torch.where(torch.rand(num, generator=generator) < 0.5, uniform(0.88, 1.15),
                        uniform(1.15, 1.6))  # fmt: skip
    spans = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) * grown[:, None] * uniform(0.92, 1.08, 2)
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    centres = centres + uniform(-0.07, 0.07, 2) * spans
    return torch.cat([centres - spans / 2, centres + spans / 2], dim=1).clamp(0, 1)


def scaled_windows(boxes_xyxy: Tensor, scale: float) -> Tensor:
    """Returns boxes [num, 4] grown about their centres, within 0..1."""
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    half = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) / 2 * scale
    return torch.cat([centres - half, centres + half], dim=1).clamp(0, 1)


def soften(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a batch in 0..1 in other light, a quarter of it blurred."""
    num = len(pixels)
    light = 0.85 + 0.3 * torch.rand(num, 1, 1, 1, generator=generator)
    contrast = 0.8 + 0.4 * torch.rand(num, 1, 1, 1, generator=generator)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = ((pixels - mean) * contrast + mean) * light
    blurred = nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    chosen = torch.rand(num, 1, 1, 1, generator=generator) < 0.25
    return torch.where(chosen, blurred, pixels).clamp(0, 1)


def _rounds(count: int, seed: int) -> Iterator[int]:
    generator = np.random.default_rng((seed, 10))
    while True:
        yield from (int(label) for label in generator.permutation(count))


def _regions(scene: Scene) -> Iterator[tuple[np.ndarray, tuple[float, ...]]]:
    """Yields each object's surroundings, cut at the scene's border, and its box in them."""
    picture = Image.fromarray(scene.pixels)
    for left, top, right, bottom in scene.boxes_xyxy.tolist():
        half_w, half_h = (right - left) / 2 * _CONTEXT, (bottom - top) / 2 * _CONTEXT
        x, y = (left + right) / 2, (top + bottom) / 2
        low_x, low_y = max(0.0, x - half_w), max(0.0, y - half_h)
        high_x, high_y = min(picture.width, x + half_w), min(picture.height, y + half_h)
        region = picture.resize(
            (_REGION_SIZE, _REGION_SIZE),
            Image.Resampling.BICUBIC,
            box=(low_x, low_y, high_x, high_y),
        )
        width, height = high_x - low_x, high_y - low_y
        box = ((left - low_x) / width, (top - low_y) / height,
               (right - low_x) / width, (bottom - low_y) / height)  # fmt: skip
        yield np.asarray(region), box
