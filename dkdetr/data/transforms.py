"""How an image becomes the student's view: large-scale jitter in training, else a plain resize.

The geometry is drawn first, as a value. The pixels, the ground truth and the cached regions are
then moved by that one value, so that they cannot part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dkdetr.boxes import clip_xyxy, xyxy_to_cxcywh
from dkdetr.structures import ImageBatch

PIXEL_MEAN = (123.675, 116.28, 103.53)
"""ImageNet's RGB means on the 0..255 scale (method A.1)."""
PIXEL_STD = (58.395, 57.12, 57.375)
MIN_BOX_SIDE = 1e-2
"""Pixels of the view: ground truth that is not wider and higher than this is left out."""
_MAX_DRAWS = 20

SizeHW = tuple[int, int]


@dataclass(frozen=True)
class ViewGeometry:
    """Resize to `resized_hw`, cut out `view_hw` at (crop_top, crop_left), then perhaps mirror.

    Lengths are whole pixels. The view lies in the top left corner of the padded input.
    """

    original_hw: SizeHW
    resized_hw: SizeHW
    crop_top: int
    crop_left: int
    view_hw: SizeHW
    flip: bool

    def move_boxes(self, boxes_xyxy: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Returns boxes of the original image in pixels of the view, not cut at its border."""
        scale_x = self.resized_hw[1] / self.original_hw[1]
        scale_y = self.resized_hw[0] / self.original_hw[0]
        left, top, right, bottom = boxes_xyxy.unbind(-1)
        left, right = left * scale_x - self.crop_left, right * scale_x - self.crop_left
        top, bottom = top * scale_y - self.crop_top, bottom * scale_y - self.crop_top
        if self.flip:
            left, right = self.view_hw[1] - right, self.view_hw[1] - left
        return torch.stack((left, top, right, bottom), dim=-1)

    def to_original(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Returns ((scale x, y), (offset x, y)): normalised places of the view -> original pixels.

        A mirrored view has a negative scale.
        """
        scale_x = self.original_hw[1] / self.resized_hw[1]
        scale_y = self.original_hw[0] / self.resized_hw[0]
        height, width = self.view_hw
        left = self.crop_left + (width if self.flip else 0)
        across = -width if self.flip else width
        return (across * scale_x, height * scale_y), (left * scale_x, self.crop_top * scale_y)

    def move_points(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Returns points (x, y) of the original image in pixels of the view, as boxes move."""
        x = points[:, 0] * (self.resized_hw[1] / self.original_hw[1]) - self.crop_left
        y = points[:, 1] * (self.resized_hw[0] / self.original_hw[0]) - self.crop_top
        if self.flip:
            x = self.view_hw[1] - x
        return np.stack((x, y), axis=1)

    def source_of(
        self, x: Float[np.ndarray, "columns"], y: Float[np.ndarray, "rows"]
    ) -> tuple[Float[np.ndarray, "columns"], Float[np.ndarray, "rows"]]:
        """Returns where columns and rows of the view lie in the original image."""
        if self.flip:
            x = self.view_hw[1] - x
        source_x = (x + self.crop_left) * (self.original_hw[1] / self.resized_hw[1])
        source_y = (y + self.crop_top) * (self.original_hw[0] / self.resized_hw[0])
        return source_x, source_y

    def normalise(self, boxes_xyxy: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Returns pixel boxes of the view as cxcywh, 1.0 being the un-padded view's edge."""
        height, width = self.view_hw
        return xyxy_to_cxcywh(boxes_xyxy) / boxes_xyxy.new_tensor((width, height, width, height))


def evaluation_geometry(original_hw: SizeHW, *, image_size: int) -> ViewGeometry:
    """Returns the whole image with its longest side at `image_size`."""
    resized = _resized(original_hw, longest_side=float(image_size))
    return ViewGeometry(original_hw, resized, 0, 0, resized, flip=False)


def draw_geometry(
    original_hw: SizeHW, boxes_xyxy: Float[Tensor, "n 4"],
    *, image_size: int, scale_range: tuple[float, float], flip_probability: float,
    generator: torch.Generator,
) -> ViewGeometry:  # fmt: skip
    """Returns a random view: large-scale jitter, a crop of at most image_size squared, a flip.

    The longest side becomes image_size times a uniform ratio of `scale_range`. Ratio and crop are
    drawn again, at most 20 times, until the view shows one of `boxes_xyxy` (pixels of the
    original); then the whole image is taken, its longest side at image_size. Without boxes the
    first draw stands. (Method A.1; mmdetection's Resize and RandomCrop take another image instead,
    which would break "each image once an epoch".)
    """
    flip = bool(torch.rand((), generator=generator) < flip_probability)
    low, high = scale_range
    for _ in range(_MAX_DRAWS):
        ratio, crop_y, crop_x = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        resized = _resized(original_hw, longest_side=image_size * (low + (high - low) * ratio))
        view = (min(resized[0], image_size), min(resized[1], image_size))
        # Each of the margin + 1 offsets is equally likely.
        top = int(crop_y * (resized[0] - view[0] + 1))
        left = int(crop_x * (resized[1] - view[1] + 1))
        geometry = ViewGeometry(original_hw, resized, top, left, view, flip)
        if len(boxes_xyxy) == 0 or bool(visible_boxes(geometry, boxes_xyxy)[1].any()):
            return geometry
    whole = _resized(original_hw, longest_side=float(image_size))
    return ViewGeometry(original_hw, whole, 0, 0, whole, flip)


def visible_boxes(
    geometry: ViewGeometry, boxes_xyxy: Float[Tensor, "n 4"]
) -> tuple[Float[Tensor, "n 4"], Bool[Tensor, "n"]]:
    """Returns the boxes moved into the view and cut at its border, and which are still to be seen.

    Seen is what is wider and higher than MIN_BOX_SIDE pixels of the view.
    """
    height, width = geometry.view_hw
    cut = clip_xyxy(geometry.move_boxes(boxes_xyxy), height=height, width=width)
    return cut, ((cut[:, 2:] - cut[:, :2]) > MIN_BOX_SIDE).all(dim=-1)


def render_view(
    image: UInt8[np.ndarray, "height width 3"], geometry: ViewGeometry, *, image_size: int
) -> tuple[Float[Tensor, "3 size size"], Bool[Tensor, "size size"]]:
    """Returns the normalised view, zero-padded to image_size squared, and its padding mask."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    resized = F.resize_image(
        pixels,
        list(geometry.resized_hw),
        interpolation=InterpolationMode.BILINEAR,
        antialias=True,
    )
    height, width = geometry.view_hw
    view = F.crop_image(resized, geometry.crop_top, geometry.crop_left, height, width)
    if geometry.flip:
        view = F.horizontal_flip_image(view)
    padded = torch.zeros((3, image_size, image_size), dtype=torch.float32)
    padded[:, :height, :width] = normalise_pixels(view)
    padding_mask = torch.ones((image_size, image_size), dtype=torch.bool)
    padding_mask[:height, :width] = False
    return padded, padding_mask


def rendered_images(
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    geometries: Sequence[ViewGeometry],
    image_ids: Sequence[int],
    *,
    image_size: int,
) -> ImageBatch:
    """Returns the views of images, each by its geometry; `decoded_images` leaves them to do."""
    pairs = zip(images, geometries, strict=True)
    rendered = [render_view(image, view, image_size=image_size) for image, view in pairs]
    return ImageBatch(
        pixels=torch.stack([pixels for pixels, _ in rendered]),
        padding_mask=torch.stack([mask for _, mask in rendered]),
        image_sizes_hw=torch.tensor([view.view_hw for view in geometries]),
        original_sizes_hw=torch.tensor([view.original_hw for view in geometries]),
        image_ids=tuple(image_ids),
    )


def normalise_pixels(pixels: Shaped[Tensor, "*batch 3 h w"]) -> Float[Tensor, "*batch 3 h w"]:
    """Returns grey levels (0..255) as the backbone expects them, in float32."""
    mean, std = _mean_and_std(pixels.device)
    return (pixels.to(torch.float32) - mean) / std


@cache  # a GPU would wait for the copies
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return mean, std


def _resized(original_hw: SizeHW, *, longest_side: float) -> SizeHW:
    scale = longest_side / max(original_hw)
    height, width = (max(1, int(side * scale + 0.5)) for side in original_hw)
    return height, width
