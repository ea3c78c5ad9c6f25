"""Many masks as one column of bytes: COCO's compressed run lengths.

A Python object a mask would cost gigabytes for the millions of masks of a results file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dkdetr.run_lengths import boxes_xywh, segmentation_rle

_AT_ONCE = 20_000
_MOST_CHARACTERS = 10
"""Of a number behind its first: 64 bits hold no more."""


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
    """Returns bool[n]: masks of no size, or whose run lengths do not fill it; of a fresh column.

    As `run_lengths.whole_runs`, for all masks at once: pycocotools reads past the end of others.
    """
    lengths = np.diff(masks.offsets)
    bits = np.frombuffer(masks.text, dtype=np.uint8).astype(np.int64) - 48
    bad = (masks.sizes_hw < 1).any(axis=1) | (lengths == 0)
    owner = np.repeat(np.arange(len(masks)), lengths)
    bad[owner[(bits < 0) | (bits > 63)]] = True
    goes_on = (bits & 32) > 0
    bad[~bad] |= goes_on[masks.offsets[1:][~bad] - 1]
    # A mask that is bad already would only confuse the count of the others.
    kept = ~bad[owner]
    bits, owner, ends = bits[kept], owner[kept], np.flatnonzero(~goes_on[kept])
    starts = np.append(0, ends[:-1] + 1)[: len(ends)]
    bad[owner[ends[ends - starts > _MOST_CHARACTERS]]] = True
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, ends - starts + 1)).clip(max=55)
    numbers = np.add.reduceat((bits & 31) << shifts, starts) if len(ends) else bits
    numbers = numbers - np.where(bits[ends] & 16, np.int64(1) << (shifts[ends] + 5), 0)
    # From the fourth on, a number is the difference to the run two places before it: so it counts
    # once in its own run and once in every second one behind it.
    own = owner[ends]
    first = np.searchsorted(own, own, side="left")
    last = np.searchsorted(own, own, side="right") - 1
    places = np.arange(len(own))
    times = np.where(places == first, 1, (last - places) // 2 + 1)
    filled = np.zeros(len(masks), dtype=np.int64)
    np.add.at(filled, own, numbers * times)
    return bad | (filled != masks.sizes_hw.prod(axis=1))


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
        ValueError: it is none of these, or of another size.
    """
    return segmentation_rle(segmentation, (height, width))["counts"].encode("ascii")


def mask_boxes(masks: MaskColumn) -> np.ndarray:
    """Returns f64[n, 4]: the frame of each mask as x, y, width, height."""
    return np.concatenate([np.zeros((0, 4)), *(boxes_xywh(chunk) for chunk in _chunks(masks))])


def _chunks(masks: MaskColumn) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(masks), _AT_ONCE):
        yield masks.objects(np.arange(start, min(start + _AT_ONCE, len(masks))))
