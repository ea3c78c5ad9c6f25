"""Where the names of boxes go on a picture, so that they hide each other as little as possible."""

from collections.abc import Sequence
from dataclasses import dataclass

_SHARE_OF_WIDTH = 0.036
"""Of the picture's width: a panel of 330 pixels then has letters of 12."""
_LETTER_WIDTH = 0.56
_LINE_HEIGHT = 1.25


@dataclass(frozen=True)
class Label:
    """A line of text in a filled rectangle; all in the picture's own pixels."""

    text: str
    left: float
    top: float
    width: float
    height: float
    font_size: float


def place_labels(
    boxes_xyxy: Sequence[tuple[float, float, float, float]],
    texts: Sequence[str],
    *,
    width: float,
    height: float,
) -> list[Label]:
    """Returns a label for each box: above it, else inside, else below, where there is room.

    A place that meets no earlier label and lies in the picture is taken; if none does, the first.
    """
    font_size = _SHARE_OF_WIDTH * width
    placed: list[Label] = []
    for (left, top, _, bottom), text in zip(boxes_xyxy, texts, strict=True):
        wide = (len(text) * _LETTER_WIDTH + 0.5) * font_size
        high = _LINE_HEIGHT * font_size
        x = max(0.0, min(left, width - wide))
        places = [
            Label(text, x, max(0.0, min(y, height - high)), wide, high, font_size)
            for y in (top - high, top, bottom - high, bottom)
        ]
        free = (place for place in places if not any(_overlap(place, other) for other in placed))
        placed.append(next(free, places[0]))
    return placed


def _overlap(a: Label, b: Label) -> bool:
    return (
        a.left < b.left + b.width
        and b.left < a.left + a.width
        and a.top < b.top + b.height
        and b.top < a.top + a.height
    )
