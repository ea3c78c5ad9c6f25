"""The outlines of objects, read only where masks are trained, and drawn into a view.

The annotation file is read again, and outlines are parsed one by one out of its text: LVIS's
polygons as Python objects would fill ten times its 1.1 GB. They are kept as flat tensors, of
which the loader processes of a rank share one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dkdetr.data.annotation_file import parse_outlined_file
from dkdetr.data.annotations import BoxTable, ImageInfo
from dkdetr.data.transforms import ViewGeometry
from dkdetr.errors import DataError
from dkdetr.run_lengths import decode_mask, rasterise, segmentation_rle

_SHOWN = 20
_MIN_CORNERS = 3

Polygons = tuple[Float[np.ndarray, "num_corners 2"], ...]
Outline = Polygons | str
"""Polygons in pixels of the original image, or the packed run lengths of a whole mask."""


@dataclass(frozen=True, eq=False)
class SegmentationTable:
    """The outlines of a BoxTable's rows, flat.

    Row i owns the rings rings[i] to rings[i + 1] and the bytes runs[i] to runs[i + 1]; one of the
    two is empty.
    """

    rings: Int[Tensor, "num_boxes_plus_one"]
    corners: Int[Tensor, "num_rings_plus_one"]
    points: Float[Tensor, "num_points 2"]
    runs: Int[Tensor, "num_boxes_plus_one"]
    packed: UInt8[Tensor, "num_bytes"]

    def of_row(self, row: int) -> Outline:
        """Returns the outline of the box in a row."""
        start, stop = self.runs[row : row + 2].tolist()
        if stop > start:
            return self.packed[start:stop].numpy().tobytes().decode("ascii")
        first, last = self.rings[row : row + 2].tolist()
        ends = self.corners[first : last + 1].tolist()
        return tuple(self.points[start:stop].numpy() for start, stop in pairwise(ends))


def read_segmentations(
    path: Path, boxes: BoxTable, images: Sequence[ImageInfo]
) -> SegmentationTable:
    """Returns the outlines of the boxes, which come from the same file, and looks at no others.

    A polygon with fewer than three corners is left out; an object without a proper one is outlined
    by its box.

    Raises:
        DataError: the file cannot be read; objects without an outline, or with a bad one.
    """
    file = parse_outlined_file(path, with_run_lengths=True)
    records = file.document["annotations"]
    outlines: list[Outline] = []
    bad: list[str] = []
    image_of_row = boxes.image_of_row()
    for row, file_row in enumerate(boxes.file_rows.tolist()):
        image = images[image_of_row[row]]
        text = file.outline_text(records[file_row])
        try:
            outline = _outline(None if text is None else orjson.loads(text), image)
        except (ValueError, TypeError) as error:
            bad.append(f"id {records[file_row].get('id')} ({error})")
            continue
        outlines.append(outline if len(outline) else (_corners_of(boxes.boxes_xyxy[row]),))
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(
            f"{path}: {len(bad)} of {len(boxes.file_rows)} objects have no mask in 'segmentation': "
            f"{', '.join(bad[:_SHOWN])}{more}; train without masks "
            "(--set student.mask_head=false), or mend the file"
        )
    return _flat(outlines)


def render_masks(
    outlines: Sequence[Outline], geometry: ViewGeometry, *, side: int, stride: float
) -> Bool[Tensor, "num_boxes side side"]:
    """Returns the objects' masks in the padded view, moved as its boxes are.

    A mask's pixel is `stride` pixels of the view wide, and belongs to an object that covers its
    middle.
    """
    masks = torch.zeros((len(outlines), side, side), dtype=torch.bool)
    height, width = (min(side, int(np.ceil(length / stride))) for length in geometry.view_hw)
    for mask, outline in zip(masks, outlines, strict=True):
        if isinstance(outline, str):
            drawn = _resampled(outline, geometry, (height, width), stride)
        else:
            rings = [geometry.move_points(ring) / stride for ring in outline]
            drawn = rasterise(rings, (height, width))
        mask[:height, :width] = torch.from_numpy(drawn)
    return masks


def _resampled(
    packed: str, geometry: ViewGeometry, size_hw: tuple[int, int], stride: float
) -> Bool[np.ndarray, "height width"]:
    original_hw = geometry.original_hw
    whole = decode_mask({"size": list(original_hw), "counts": packed})
    x, y = ((np.arange(length) + 0.5) * stride for length in size_hw[::-1])
    source_x, source_y = geometry.source_of(x, y)
    columns, rows = np.floor(source_x).astype(int), np.floor(source_y).astype(int)
    # The last pixel's middle may lie beyond a view that is no multiple of the stride.
    seen_x, seen_y = (x < geometry.view_hw[1]), (y < geometry.view_hw[0])
    sampled = whole[np.ix_(rows.clip(0, original_hw[0] - 1), columns.clip(0, original_hw[1] - 1))]
    return sampled & seen_y[:, None] & seen_x[None]


def _outline(segmentation: Any, image: ImageInfo) -> Outline:
    if isinstance(segmentation, dict):
        return segmentation_rle(segmentation, (image.height, image.width))["counts"]
    if not segmentation:
        raise ValueError("an empty outline")
    rings: list[np.ndarray] = []
    for ring in segmentation:
        numbers = np.array(ring, dtype=np.float32)
        if numbers.ndim != 1 or len(numbers) % 2:
            raise ValueError("a polygon is x, y, x, y, ...")
        if len(numbers) >= 2 * _MIN_CORNERS:
            rings.append(numbers.reshape(-1, 2))
    return tuple(rings)


def _corners_of(box_xyxy: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4 2"]:
    x0, y0, x1, y1 = box_xyxy.tolist()
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float32)


def _flat(outlines: Sequence[Outline]) -> SegmentationTable:
    polygons: list[Polygons] = [() if isinstance(each, str) else each for each in outlines]
    packed = [each.encode("ascii") if isinstance(each, str) else b"" for each in outlines]
    rings = [ring for each in polygons for ring in each]
    points = np.concatenate(rings) if rings else np.zeros((0, 2), np.float32)
    return SegmentationTable(
        rings=_offsets([len(each) for each in polygons]),
        corners=_offsets([len(ring) for ring in rings]),
        points=torch.from_numpy(points),
        runs=_offsets([len(each) for each in packed]),
        packed=torch.from_numpy(np.frombuffer(b"".join(packed), dtype=np.uint8).copy()),
    )


def _offsets(counts: Sequence[int]) -> Int[Tensor, "n"]:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts, dtype=np.int64))))
