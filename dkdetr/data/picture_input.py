"""Pictures from anywhere (files, PIL, arrays, tensors) as the student's evaluation input.

`image_batch` makes the views on the CPU; `decoded_batch` leaves them to the student's device.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dkdetr.data.device_views import decoded_images
from dkdetr.data.image_files import MODES, decode_upright
from dkdetr.data.transforms import evaluation_geometry, rendered_images
from dkdetr.data.upright import orientation_of, turned_upright
from dkdetr.errors import DataError, UsageError
from dkdetr.structures import DecodedImages, ImageBatch

Picture = Path | str | Image.Image | np.ndarray | Tensor
"""A file, or pixels: PIL, uint8 [height, width, 3], or a tensor [3, height, width].

A tensor holds uint8, or floats in 0..1. Colours are RGB.
"""


def rgb_pixels(picture: Picture) -> UInt8[np.ndarray, "height width 3"]:
    """Returns a picture's RGB pixels; of a file and of PIL upright, as its EXIF orientation says.

    For what people bring, never for a data set's pictures, whose boxes lie on the stored pixels.

    Raises:
        DataError: a file that cannot be read (see `decode_image`).
        UsageError: pixels of another shape, type, range or depth.
    """
    if isinstance(picture, str | Path):
        path = Path(picture)
        try:
            return decode_upright(path.read_bytes(), path)[0]
        except OSError as error:
            raise DataError(f"image {path}: {error.strerror or error}") from None
    if isinstance(picture, Image.Image):
        if picture.mode not in MODES:
            raise UsageError(f"a picture of kind '{picture.mode}' has more than 8 bits a channel")
        return turned_upright(np.array(picture.convert("RGB")), orientation_of(picture))
    if isinstance(picture, Tensor):
        return _from_tensor(picture)
    if picture.ndim == 2:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise UsageError(
            f"an image array is uint8 [height, width, 3] in RGB, not {picture.dtype} "
            f"{list(picture.shape)}"
        )
    return np.ascontiguousarray(picture)


def image_batch(
    pixels: Sequence[UInt8[np.ndarray, "_h _w 3"]], image_ids: Sequence[int], *, image_size: int
) -> ImageBatch:
    """Returns whole pictures, longest side at `image_size`, padded to its square."""
    views = [evaluation_geometry(image.shape[:2], image_size=image_size) for image in pixels]
    return rendered_images(pixels, views, image_ids, image_size=image_size)


def decoded_batch(
    pixels: Sequence[UInt8[np.ndarray, "_h _w 3"]], image_ids: Sequence[int], *, image_size: int
) -> DecodedImages:
    """Returns the pictures as they are; `render_images` makes the views of `image_batch` of them.

    Boxes, sizes and masks are the same, pixels but for their rounding to grey levels.
    """
    views = [evaluation_geometry(image.shape[:2], image_size=image_size) for image in pixels]
    return decoded_images(pixels, views, image_ids, image_size=image_size)


def _from_tensor(tensor: Tensor) -> np.ndarray:
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise UsageError(f"an image tensor is [3, height, width] in RGB, not {list(tensor.shape)}")
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.uint8:
        if (
            not tensor.is_floating_point()
            or not 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
        ):
            raise UsageError("an image tensor holds uint8, or floats in 0..1 (not normalised)")
        tensor = (tensor * 255).round().to(torch.uint8)
    return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())
