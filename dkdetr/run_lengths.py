"""Masks as run lengths, and polygons as masks: the home of pycocotools' mask routines.

A mask's pixel (column 3, row 5) covers x from 3 to 4 and y from 5 to 6, as boxes do.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

_MAX_CHARACTERS = 11
_MASKS_AT_ONCE = 50

Rle = Mapping[str, Any]
"""COCO's form: `size` [height, width] and `counts`, here always the packed string."""


def encode_masks(masks: Bool[np.ndarray, "num_masks height width"]) -> list[Rle]:
    """Returns the run lengths of masks, `counts` as str, ready for JSON."""
    columns = np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)
    return [_as_text(rle) for rle in _routines().encode(columns)]


def decode_mask(rle: Rle) -> Bool[np.ndarray, "height width"]:
    """Returns the mask of packed run lengths; raises ValueError as `whole_runs` does."""
    height, width = rle["size"]
    runs = whole_runs(rle)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def whole_runs(rle: Rle) -> Int[np.ndarray, "num_runs"]:
    """Returns the run lengths of a packed mask, after making sure that they fill its image.

    Raises:
        ValueError: they do not, where pycocotools would hand out what lay in memory, or are none.
    """
    height, width = rle["size"]
    runs = unpack_counts(rle["counts"])
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError("run lengths that do not fill the image")
    return runs


def rasterise(
    polygons: Sequence[Float[np.ndarray, "num_corners 2"]], size_hw: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """Returns the union of polygons (x, y) as a mask; what sticks out of it is cut off."""
    height, width = size_hw
    flat = [corners.astype(np.float64).ravel().tolist() for corners in polygons]
    mask = _routines()
    return decode_mask(_as_text(mask.merge(mask.frPyObjects(flat, height, width))))


def segmentation_rle(segmentation: Any, size_hw: tuple[int, int]) -> Rle:
    """Returns the packed run lengths of a segmentation as annotation files hold it.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], or run lengths, packed or as a list.
        size_hw: of the image.

    Raises:
        ValueError: it is none of these, or its run lengths are of another size.
    """
    height, width = size_hw
    if isinstance(segmentation, list):
        if not segmentation or not all(map(_is_ring, segmentation)):
            raise ValueError("polygons are lists of at least three corners x, y, x, y, ...")
        return _as_text(_routines().merge(_routines().frPyObjects(segmentation, height, width)))
    if not isinstance(segmentation, dict) or list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(f"neither polygons nor run lengths of size {[height, width]}")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        rle: Rle = {"size": [height, width], "counts": counts}
    elif isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts):
        rle = _as_text(_routines().frPyObjects(segmentation, height, width))
    else:
        raise ValueError("run lengths are whole numbers or a packed string")
    whole_runs(rle)
    return rle


def unpack_counts(packed: str) -> Int[np.ndarray, "num_runs"]:
    """Returns the run lengths of COCO's packed string: nothing, something, nothing, ...

    Five bits a character, lowest first, counted from 48; bit 32 says that more follow, bit 16 of
    the last one is the sign. From the fourth on, runs are differences to the run two places before.

    Raises:
        ValueError: a character that cannot occur, or an end in the middle of a number.
    """
    bits = np.frombuffer(packed.encode("utf-8"), dtype=np.uint8).astype(np.int64) - 48
    if bits.size == 0 or bits.min() < 0 or bits.max() > 63:
        raise ValueError("run lengths with characters that packed ones do not have")
    last = bits & 32 == 0
    if not last[-1]:
        raise ValueError("run lengths that end in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    if (ends - starts).max() > _MAX_CHARACTERS:
        raise ValueError("run lengths with a number beyond 64 bits")
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((bits & 31) << shifts, starts)
    numbers -= np.where(bits[ends] & 16, np.int64(1) << (shifts[ends] + 5), 0)
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return runs


def areas(rles: Sequence[Rle]) -> Float[np.ndarray, "num_masks"]:
    """Returns the pixels of each mask; raises ValueError for what is no packed run lengths."""
    return np.concatenate([np.zeros(0), *(_routines().area(part) for part in _parts(rles))])


def boxes_xywh(rles: Sequence[Rle]) -> Float[np.ndarray, "num_masks 4"]:
    """Returns the tight boxes of masks; zeros for an empty one."""
    return np.concatenate([np.zeros((0, 4)), *(_routines().toBbox(part) for part in _parts(rles))])


def _parts(rles: Sequence[Rle]) -> Iterator[list[dict[str, Any]]]:
    # pycocotools 2.0.11 keeps the number of masks in eight bits on its way.
    for start in range(0, len(rles), _MASKS_AT_ONCE):
        yield [dict(rle) for rle in rles[start : start + _MASKS_AT_ONCE]]


def _routines() -> Any:
    # Imported where a mask is at hand: detectors of boxes do without.
    from pycocotools import mask

    return mask


def _is_ring(ring: Any) -> bool:
    return (
        isinstance(ring, list)
        and len(ring) >= 6
        and len(ring) % 2 == 0
        and all(type(number) in (int, float) for number in ring)
    )


def _as_text(rle: Any) -> Rle:
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}
