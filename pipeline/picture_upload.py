"""Decoded pictures on the teacher's device: all of a chunk in one copy that nobody waits for."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pipeline.proposals import SourceImage


def on_device(pictures: Sequence[SourceImage], device: torch.device) -> list[SourceImage]:
    """Returns the pictures as tensors on a device; those that are there already are left.

    To a GPU they go side by side through pinned memory, which the allocator keeps until the copy
    is done.
    """
    pixels = [torch.as_tensor(picture.pixels) for picture in pictures]
    if device.type == "cuda":
        away = [index for index, each in enumerate(pixels) if each.device.type == "cpu"]
        for index, copied in zip(away, _uploaded([pixels[i] for i in away], device), strict=True):
            pixels[index] = copied
    return [
        SourceImage(picture.image_id, each.to(device))
        for picture, each in zip(pictures, pixels, strict=True)
    ]


def _uploaded(
    pictures: Sequence[UInt8[Tensor, "_h _w 3"]], device: torch.device
) -> list[UInt8[Tensor, "_h _w 3"]]:
    if not pictures:
        return []
    ends = np.cumsum([each.numel() for each in pictures]).tolist()
    pinned = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    torch.cat([each.reshape(-1) for each in pictures], out=pinned)
    copied = pinned.to(device, non_blocking=True)
    return [
        copied[end - each.numel() : end].view(each.shape)
        for each, end in zip(pictures, ends, strict=True)
    ]
