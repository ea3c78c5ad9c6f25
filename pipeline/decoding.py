"""How stage 1 decodes pictures: Pillow in threads, or torchvision a batch at a time on a device.

On a GPU torchvision's decoder is nvJPEG. Its pixels differ from Pillow's by a few grey levels
(another inverse transform, another chroma filter), so the decoder stands in the cache's
fingerprint. Whatever is no plain, whole JPEG goes to Pillow, whose verdict on bad files stands.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
import torch
import torchvision
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from dkdetr.data.image_files import UnreadableImageError, decode_image

Decoder = Literal["pillow", "torchvision"]
DecoderChoice = Literal["auto", "pillow", "torchvision"]
_END_OF_IMAGE = b"\xff\xd9"


def choose_decoder(choice: DecoderChoice, device: torch.device) -> Decoder:
    """Returns whose code decodes: `auto` is torchvision on a GPU that decodes a small JPEG."""
    if choice != "auto":
        return choice
    if device.type != "cuda":
        return "pillow"
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    (pixels,) = _decoded([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    return "pillow" if pixels is None else "torchvision"


def decoder_name(decoder: Decoder, device: torch.device) -> str:
    """Returns the decoder as the cache's fingerprint records it."""
    pillow = f"pillow {PIL.__version__}"
    if decoder == "pillow":
        return pillow
    where = "nvjpeg" if device.type == "cuda" else "cpu"
    return f"torchvision {torchvision.__version__.partition('+')[0]} {where}, else {pillow}"


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of a picture that a device is to decode; `path` is for messages."""

    data: bytes
    path: Path
    expected_hw: tuple[int, int]


Pixels = UInt8[np.ndarray | Tensor, "height width 3"]


def suits_a_device(data: bytes, expected_hw: tuple[int, int]) -> bool:
    """Returns True for a JPEG of grey or YCbCr, of the size it should have, and not cut off."""
    if not data.rstrip(b"\0").endswith(_END_OF_IMAGE):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return image.mode in {"L", "RGB"} and (image.height, image.width) == expected_hw
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def decode_on_device(
    images: Sequence[EncodedImage], device: torch.device
) -> Iterator[Pixels | UnreadableImageError]:
    """Yields each picture's pixels, decoded together on `device`; where that fails, by Pillow."""
    data = [torch.frombuffer(bytearray(image.data), dtype=torch.uint8) for image in images]
    for image, pixels in zip(images, _decoded(data, device), strict=True):
        if pixels is not None and tuple(pixels.shape[1:]) == image.expected_hw:
            yield pixels.permute(1, 2, 0)
            continue
        try:
            yield decode_image(image.data, image.path, expected_hw=image.expected_hw)
        except UnreadableImageError as error:
            yield error


def _decoded(data: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Returns pixels [3, height, width]; None for what the decoder refuses."""
    if not data:
        return []
    try:
        with warnings.catch_warnings():
            # Since 0.29 it points at TorchCodec, a further package with a decoder like this one.
            warnings.simplefilter("ignore", DeprecationWarning)
            return list(decode_jpeg(data, mode=ImageReadMode.RGB, device=device))
    except RuntimeError:
        if len(data) == 1:
            return [None]
    # One of them was refused; it is not said which.
    return [pixels for each in data for pixels in _decoded([each], device)]
