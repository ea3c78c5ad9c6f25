"""Masks as run lengths, and polygons as masks: the home of pycocotools' mask routines.

A mask's pixel (column 3, row 5) covers x from 3 to 4 and y from 5 to 6, as boxes do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from pycocotools import mask as routines

Rle = Mapping[str, Any]
"""COCO's form: `size` [height, width] and `counts`, here always the packed string."""


def encode_masks(masks: Bool[np.ndarray, "num_masks height width"]) -> list[Rle]:
    """Returns the run lengths of masks, `counts` as str, ready for JSON."""
    columns = np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)
    return [_as_text(rle) for rle in routines.encode(columns)]


def decode_mask(rle: Rle) -> Bool[np.ndarray, "height width"]:
    """Returns the mask of packed run lengths."""
    return routines.decode(dict(rle)).astype(bool)


def rasterise(
    polygons: Sequence[Float[np.ndarray, "num_corners 2"]], size_hw: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """Returns the union of polygons (x, y) as a mask; what sticks out of it is cut off."""
    height, width = size_hw
    flat = [corners.astype(np.float64).ravel().tolist() for corners in polygons]
    return routines.decode(routines.merge(routines.frPyObjects(flat, height, width))).astype(bool)


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
        return _as_text(routines.merge(routines.frPyObjects(segmentation, height, width)))
    if not isinstance(segmentation, dict) or list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(f"neither polygons nor run lengths of size {[height, width]}")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        runs = unpack_counts(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = counts
    else:
        raise ValueError("run lengths are whole numbers or a packed string")
    # pycocotools would hand out whatever lay in memory where the runs end too early.
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError("run lengths that do not fill the image")
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts}
    return _as_text(routines.frPyObjects(segmentation, height, width))


def unpack_counts(packed: str) -> list[int]:
    """Returns the run lengths of COCO's packed string.

    Five bits a character, lowest first, on from 48; bit 32 says that more follow, bit 16 of the
    last one the sign. From the fourth on, runs are differences to the run two places before.

    Raises:
        ValueError: a character that cannot occur, or an end in the middle of a number.
    """
    runs: list[int] = []
    number, shift = 0, 0
    for character in packed:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError("run lengths with a character that packed ones do not have")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number, shift = 0, 0
    if shift:
        raise ValueError("run lengths that end in the middle of a number")
    return runs


def areas(rles: Sequence[Rle]) -> Float[np.ndarray, "num_masks"]:
    """Returns the pixels of each mask."""
    found = routines.area([dict(rle) for rle in rles]) if rles else []
    return np.asarray(found, dtype=np.float64)


def boxes_xywh(rles: Sequence[Rle]) -> Float[np.ndarray, "num_masks 4"]:
    """Returns the tight boxes of masks; zeros for an empty one."""
    boxes = routines.toBbox([dict(rle) for rle in rles]) if rles else []
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


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
