"""From masks of the student to run lengths in pixels of the original file, a chunk at a time."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from dkdetr.run_lengths import Rle, encode_masks
from dkdetr.structures import InstanceMasks

SizeHW = tuple[int, int]


def mask_rles(
    masks: InstanceMasks,
    image: int,
    queries: Int[Tensor, "num_detections"],
    *,
    image_hw: SizeHW,
    original_hw: SizeHW,
) -> tuple[Rle, ...]:
    """Returns the masks of one image's detections, by the last decoder layer.

    A query that is detected under several classes is drawn once. As many masks stand in memory
    at a time as `masks.masks_at_once` inputs have pixels, and at least one.

    Args:
        masks: the student's.
        image: its place in the batch.
        queries: of the detections, in their order.
        image_hw: the un-padded size in the network's input.
        original_hw: the size of the file.
    """
    distinct, places = queries.unique(return_inverse=True)
    height, width = (int(side * masks.stride) for side in masks.padding_mask.shape[1:])
    room = masks.masks_at_once * height * width
    at_once = max(1, room // max(height * width, original_hw[0] * original_hw[1]))
    drawn: list[Rle] = []
    for chunk in _chunks(distinct, at_once):
        logits = masks.logits(-1, torch.full_like(chunk, image), chunk)
        whole = original_masks(
            logits, input_hw=(height, width), image_hw=image_hw, original_hw=original_hw
        )
        drawn += encode_masks(whole.cpu().numpy())
    return tuple(drawn[place] for place in places.tolist())


def original_masks(
    logits: Float[Tensor, "n mask_height mask_width"],
    *,
    input_hw: SizeHW,
    image_hw: SizeHW,
    original_hw: SizeHW,
) -> Bool[Tensor, "n height width"]:
    """Returns masks of the original file.

    A sigmoid, then resized to the input, cut at the picture, resized to the file, above 0.5. A
    pixel is an area in every step (its middle half a pixel in), as it is for boxes.
    """
    shares = functional.interpolate(logits.sigmoid()[:, None], input_hw, mode="bilinear")
    shares = shares[..., : image_hw[0], : image_hw[1]]
    return functional.interpolate(shares, original_hw, mode="bilinear")[:, 0] > 0.5


def _chunks(queries: Tensor, size: int) -> Iterator[Tensor]:
    return iter(queries.split(size)) if len(queries) else iter(())
