"""Large-scale jitter where the student computes: many views in one pass of two matrix products.

The loader's path (`transforms.render_view`) is the reference: the same antialiased bilinear kernel,
rounded to whole grey levels after each direction as it does. That has weights of 16 bits: on small
pictures one value in 140 differs by a grey level, two in a million by two (float32), in float16 one
in twelve and one in ten thousand (on a CPU; it has not been measured on a GPU).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from dkdetr.config import ExperimentConfig
from dkdetr.data.transforms import ViewGeometry, normalise_pixels
from dkdetr.resampling import axis_weights
from dkdetr.structures import DecodedBatch, DecodedImages, ImageBatch, LoadedBatch, TrainingBatch

_PIXELS_AT_ONCE = 1 << 25
"""Of padded images (33.5 million: 200 MB of float16); a larger image is rendered by itself."""


def decoded_images(
    images: Sequence[UInt8[np.ndarray | Tensor, "_h _w 3"]],
    geometries: Sequence[ViewGeometry],
    image_ids: Sequence[int],
    *,
    image_size: int,
) -> DecodedImages:
    """Returns images as they are, to be rendered elsewhere with these geometries."""
    views = list(geometries)
    return DecodedImages(
        pixels=torch.cat([torch.as_tensor(image).reshape(-1) for image in images]),
        resized_sizes_hw=torch.tensor([view.resized_hw for view in views]),
        corners_yx=torch.tensor([(view.crop_top, view.crop_left) for view in views]),
        flipped=torch.tensor([view.flip for view in views]),
        image_sizes_hw=torch.tensor([view.view_hw for view in views]),
        original_sizes_hw=torch.tensor([view.original_hw for view in views]),
        decoded_hw=tuple(view.original_hw for view in views),
        image_ids=tuple(image_ids),
        view_side=image_size,
    )


def settle_views(config: ExperimentConfig, device: torch.device) -> ExperimentConfig:
    """Returns the settings with `data.augment` decided for a student on `device`."""
    if config.data.augment != "auto":
        return config
    where = "device" if device.type == "cuda" else "loader"
    return replace(config, data=replace(config.data, augment=where))


def on_device(batch: LoadedBatch, device: torch.device) -> TrainingBatch:
    """Returns the batch on a device; views that the loader has left open are made there."""
    moved = batch.to(device)
    if isinstance(moved, TrainingBatch):
        return moved
    assert isinstance(moved, DecodedBatch)
    return TrainingBatch(render_images(moved.images), moved.targets, moved.regions, moved.originals)


def render_images(images: DecodedImages) -> ImageBatch:
    """Returns the normalised views and their padding masks, on the images' device.

    Nothing is read back from the device. A GPU multiplies in float16, which holds a grey level
    exactly and a weight to 1/2048, a CPU in float32.
    """
    device, side = images.pixels.device, images.view_side
    sizes = images.image_sizes_hw
    place = torch.arange(side, device=device)
    seen_y, seen_x = place < sizes[:, :1], place < sizes[:, 1:]
    pixels = torch.empty((len(sizes), 3, side, side), device=device)
    for part, padded in _padded_parts(images):
        across = _weights(images, part, seen_x[part], axis=1, length=padded.shape[3])
        down = _weights(images, part, seen_y[part], axis=0, length=padded.shape[2])
        rows = padded @ across.to(padded.dtype).mT.unsqueeze(1)
        views = _whole_levels(down.to(padded.dtype).unsqueeze(1) @ _whole_levels(rows))
        seen = seen_y[part, None, :, None] & seen_x[part, None, None, :]
        pixels[part] = torch.where(seen, normalise_pixels(views), 0)
    return ImageBatch(
        pixels=pixels,
        padding_mask=~(seen_y[:, :, None] & seen_x[:, None, :]),
        image_sizes_hw=sizes,
        original_sizes_hw=images.original_sizes_hw,
        image_ids=images.image_ids,
    )


def _whole_levels(levels: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns grey levels rounded as integers round, a half up.

    A product in float16 is rounded to eighths before; of the halves that come of that as many go
    down, or pictures would be brighter by a twelfth of a level.
    """
    return levels.round() if levels.dtype == torch.float16 else (levels + 0.5).floor()


def _padded_parts(images: DecodedImages) -> Iterator[tuple[slice, Float[Tensor, "n 3 h w"]]]:
    """Yields neighbours in the batch that fit into memory together, padded to one size."""
    dtype = torch.float16 if images.pixels.is_cuda else torch.float32
    sizes = images.decoded_hw
    stack = list(images.pixels.split([3 * height * width for height, width in sizes]))
    start = 0
    while start < len(sizes):
        stop, height, width = start, 0, 0
        while stop < len(sizes):
            higher, wider = max(height, sizes[stop][0]), max(width, sizes[stop][1])
            if stop > start and (stop + 1 - start) * higher * wider > _PIXELS_AT_ONCE:
                break
            stop, height, width = stop + 1, higher, wider
        padded = images.pixels.new_zeros((stop - start, 3, height, width), dtype=dtype)
        for place, index in enumerate(range(start, stop)):
            h, w = sizes[index]
            padded[place, :, :h, :w] = stack[index].view(h, w, 3).permute(2, 0, 1)
        yield slice(start, stop), padded
        start = stop


def _weights(
    images: DecodedImages, part: slice, seen: Bool[Tensor, "n side"], *, axis: int, length: int
) -> Float[Tensor, "n side length"]:
    """Returns the weights of a part's views along one axis (0: down, 1: across)."""
    end = images.original_sizes_hw[part, axis]
    place = torch.arange(images.view_side, device=seen.device).unsqueeze(0)
    if axis == 1:  # a mirrored view counts its columns from the right
        mirrored = images.image_sizes_hw[part, 1:] - 1 - place
        place = torch.where(images.flipped[part, None], mirrored, place)
    return axis_weights(
        torch.zeros_like(end),
        end,
        images.resized_sizes_hw[part, axis],
        place + images.corners_yx[part, axis, None],
        seen,
        length=length,
        interpolation="bilinear",
    )
