"""Many masks as one column of bytes: COCO's compressed run lengths (the home of pycocotools.mask).

A Python object a mask would cost gigabytes for the millions of masks of a results file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

# pycocotools 2.0.11 writes four times the number of masks into a byte, which NumPy 2 refuses.
_AT_ONCE = 63


@dataclass(frozen=True, eq=False)
class MaskColumn:
    """Mask i is text[offsets[rows[i]]:offsets[rows[i] + 1]], of size all_sizes_hw[rows[i]]."""

    text: bytes
    offsets: np.ndarray
    all_sizes_hw: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes_hw(self) -> np.ndarray:
        """i64[n, 2]: height and width of each mask's picture."""
        return self.all_sizes_hw[self.rows]

    def take(self, chosen: np.ndarray) -> "MaskColumn":
        """Returns the masks at `chosen` (indices or a mask), in that order; shares the text."""
        return MaskColumn(self.text, self.offsets, self.all_sizes_hw, self.rows[chosen])

    def objects(self, chosen: np.ndarray) -> list[dict[str, Any]]:
        """Returns masks as pycocotools takes them: {"size": [h, w], "counts": bytes}."""
        rows = self.rows[chosen]
        places = zip(
            self.offsets[rows].tolist(),
            self.offsets[rows + 1].tolist(),
            self.all_sizes_hw[rows].tolist(),
            strict=True,
        )
        return [{"size": size, "counts": self.text[start:stop]} for start, stop, size in places]


def join_masks(counts: Sequence[bytes], sizes_hw: np.ndarray) -> MaskColumn:
    """Returns a column of compressed run lengths, one `counts` a mask."""
    lengths = np.fromiter(map(len, counts), dtype=np.int64, count=len(counts))
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    sizes = np.asarray(sizes_hw, dtype=np.int64).reshape(-1, 2)
    return MaskColumn(b"".join(counts), offsets, sizes, np.arange(len(counts)))


def bad_masks(masks: MaskColumn) -> np.ndarray:
    """Returns bool[n]: masks of no size, or whose run lengths no encoder writes.

    pycocotools reads past the end of an empty text and of one that stops within a number.
    """
    bad = (masks.sizes_hw < 1).any(axis=1)
    bytes_ = np.frombuffer(masks.text, dtype=np.uint8).astype(np.int16) - 48
    empty = np.diff(masks.offsets) == 0
    strange = np.concatenate(([0], np.cumsum((bytes_ < 0) | (bytes_ > 63))))
    goes_on = np.append(bytes_ & 32, 0)[masks.offsets[1:] - 1] > 0
    own = empty | goes_on | (strange[masks.offsets[1:]] > strange[masks.offsets[:-1]])
    return bad | own[masks.rows]


def concatenate_masks(parts: Sequence[MaskColumn]) -> MaskColumn:
    """Returns one column of several whole ones."""
    starts = np.cumsum([0, *(len(part.text) for part in parts)])
    ends = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    sizes = np.concatenate([part.all_sizes_hw for part in parts])
    return MaskColumn(
        b"".join(part.text for part in parts),
        np.concatenate([np.zeros(1, dtype=np.int64), *ends]),
        sizes,
        np.arange(len(sizes)),
    )


def encode_segmentation(segmentation: Any, height: int, width: int) -> bytes:
    """Returns the compressed run lengths of polygons or of an RLE of either kind.

    Raises:
        ValueError, TypeError, KeyError: it is none of these.
    """
    library = _library()
    if isinstance(segmentation, list):
        if not segmentation or any(len(polygon) < 6 for polygon in segmentation):
            raise ValueError("a polygon of fewer than three points")
        found = library.merge(library.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        found = library.frPyObjects(segmentation, height, width)
    else:
        counts = segmentation["counts"]
        found = {"counts": counts.encode() if isinstance(counts, str) else counts}
    return bytes(found["counts"])


def mask_areas(masks: MaskColumn) -> np.ndarray:
    """Returns f64[n]: the pixels of each mask."""
    parts = [_library().area(chunk) for chunk in _chunks(masks)]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float64)


def mask_boxes(masks: MaskColumn) -> np.ndarray:
    """Returns f64[n, 4]: the frame of each mask as x, y, width, height."""
    parts = [_library().toBbox(chunk).reshape(-1, 4) for chunk in _chunks(masks)]
    return np.concatenate([np.zeros((0, 4)), *parts])


def mask_ious(
    first: MaskColumn, second: MaskColumn, first_rows: np.ndarray, second_rows: np.ndarray,
    is_crowd: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Returns f64[n], the IoU of each pair; pairs of one `first` mask stand together."""
    ious = np.zeros(len(first_rows))
    edges = np.flatnonzero(np.diff(first_rows, prepend=-1, append=-1))
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        mask = first.objects(first_rows[start : start + 1])
        others = second.objects(second_rows[start:stop])
        ious[start:stop] = _library().iou(mask, others, is_crowd[start:stop].astype(np.uint8))[0]
    return ious


def _chunks(masks: MaskColumn) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(masks), _AT_ONCE):
        yield masks.objects(np.arange(start, min(start + _AT_ONCE, len(masks))))


def _library() -> ModuleType:
    # Late: scoring boxes needs no pycocotools.
    from pycocotools import mask

    return mask
