"""Boxes and names drawn on a picture."""

import colorsys
from collections.abc import Sequence

import numpy as np
import xxhash
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from dkdetr.evaluation.labels import place_labels

_MASK_INK = 0.45


def draw_boxes(
    image: UInt8[np.ndarray, "height width 3"],
    boxes_xyxy: Float[np.ndarray, "n 4"],
    texts: Sequence[str],
    *,
    colour_keys: Sequence[str],
    masks: Bool[np.ndarray, "n height width"] | None = None,
) -> Image.Image:
    """Returns a copy of the picture with frames and labels, and masks under them.

    Boxes that come first lie on top; equal keys have equal colours, in every picture.
    """
    colours = [_colour(key) for key in colour_keys]
    canvas = Image.fromarray(image if masks is None else _tinted(image, masks, colours))
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(min(image.shape[:2]) / 200))
    boxes = [(b[0], b[1], b[2], b[3]) for b in boxes_xyxy.tolist()]
    labels = place_labels(boxes, texts, width=image.shape[1], height=image.shape[0])
    last_first = list(zip(boxes, labels, colours, strict=True))[::-1]
    for box, _, colour in last_first:
        draw.rectangle(box, outline=colour, width=line)
    for _, label, colour in last_first:
        font = ImageFont.load_default(size=max(9.0, label.font_size))
        left, top, right, bottom = draw.textbbox((0, 0), label.text, font=font)
        draw.rectangle(
            (label.left, label.top, label.left + right - left + 4, label.top + label.height),
            fill=colour,
        )
        middle = label.top + (label.height - (bottom - top)) / 2 - top
        draw.text((label.left + 2, middle), label.text, font=font, fill=_ink_on(colour))
    return canvas


def _tinted(
    image: UInt8[np.ndarray, "height width 3"],
    masks: Bool[np.ndarray, "n height width"],
    colours: Sequence[tuple[int, int, int]],
) -> UInt8[np.ndarray, "height width 3"]:
    tinted = image.copy()
    for mask, colour in list(zip(masks, colours, strict=True))[::-1]:
        mixed = (1 - _MASK_INK) * image[mask] + _MASK_INK * np.array(colour)
        tinted[mask] = mixed.round().astype(np.uint8)
    return tinted


def _colour(key: str) -> tuple[int, int, int]:
    hue = xxhash.xxh32_intdigest(key.encode()) / 2**32
    red, green, blue = colorsys.hls_to_rgb(hue, 0.5, 0.8)
    return (round(255 * red), round(255 * green), round(255 * blue))


def _ink_on(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
