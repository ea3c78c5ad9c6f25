"""How stage 1 decodes pictures: Pillow in threads, or torchvision a batch at a time on a device.

On a GPU torchvision's decoder is nvJPEG. Its pixels differ from Pillow's by a few grey levels
(another inverse transform), by more at edges of colour where chroma is halved (Pillow interpolates
it), so the decoder stands in the cache's fingerprint. Whatever is no plain, whole JPEG goes to
Pillow, whose verdict on bad files stands.
"""

import functools
import io
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

from dkdetr.data.image_files import (
    DECODER_ERRORS,
    MAX_IMAGE_PIXELS,
    UnreadableImageError,
    decode_image,
)
from dkdetr.device_failures import DEVICE_FAILURES
from dkdetr.errors import UsageError

Decoder = Literal["pillow", "torchvision"]
DecoderChoice = Literal["auto", "pillow", "torchvision"]
_END_OF_IMAGE = b"\xff\xd9"


def choose_decoder(choice: DecoderChoice, device: torch.device) -> Decoder:
    """Returns whose code decodes: `auto` is torchvision on a GPU that can.

    Raises:
        UsageError: torchvision's is asked for, and it does not decode a small JPEG here.
    """
    if choice == "pillow" or (choice == "auto" and device.type != "cuda"):
        return "pillow"
    if _decodes(device):
        return "torchvision"
    if choice == "auto":
        return "pillow"
    raise UsageError(f"--decoder torchvision: it decodes no JPEG on '{device}'; use auto or pillow")


@functools.cache
def _decodes(device: torch.device) -> bool:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    small = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return _decoded([small], device)[0] is not None


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
    """Returns True for a JPEG of grey or YCbCr, of the size it should have, and not cut off.

    One of more than MAX_IMAGE_PIXELS is Pillow's to refuse.
    """
    if not data.rstrip(b"\0").endswith(_END_OF_IMAGE):
        return False
    if expected_hw[0] * expected_hw[1] > MAX_IMAGE_PIXELS:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            is_rgb = image.mode == "RGB" and image.info.get("adobe_transform") == 0
            fits = (image.height, image.width) == expected_hw
            return fits and image.mode in {"L", "RGB"} and not is_rgb
    except DECODER_ERRORS:
        return False


def decode_on_device(
    images: Sequence[Pixels | EncodedImage], device: torch.device
) -> Iterator[Pixels | UnreadableImageError]:
    """Yields each picture's pixels; the encoded are decoded together on `device`, or by Pillow."""
    encoded = [image.data for image in images if isinstance(image, EncodedImage)]
    data = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in encoded]
    decoded = iter(_decoded(data, device))
    for image in images:
        if not isinstance(image, EncodedImage):
            yield image
            continue
        pixels = next(decoded)
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
        if device.type == "cuda":
            return _decoded_beside(data, device)
        return list(decode_jpeg(data, mode=ImageReadMode.RGB, device=device))
    except DEVICE_FAILURES:
        raise
    except RuntimeError:
        if len(data) == 1:
            return [None]
    # One of them was refused; it is not said which.
    return [pixels for each in data for pixels in _decoded([each], device)]


def _decoded_beside(data: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decodes while the device's default stream is at earlier pictures.

    nvJPEG writes from a stream of its own that waits for no other (pytorch/vision 9606). Memory
    that the default stream still reads must not be given to it: so it has a stream, and with it a
    pool of memory, that nothing else allocates from, and blocks come back to it only when the
    default stream is through with them.
    """
    queue = _own_queue(device)
    with torch.cuda.stream(queue):
        decoded = list(decode_jpeg(data, mode=ImageReadMode.RGB, device=device))
        queue.synchronize()
    for pixels in decoded:
        pixels.record_stream(torch.cuda.default_stream(device))
    return [*decoded]


@functools.cache
def _own_queue(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
