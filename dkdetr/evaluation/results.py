"""Detections on disk: COCO's results form, read in pieces and kept as columns.

A results file of LVIS's validation set holds six million records. As Python objects they would
fill gigabytes, so the text is cut between records and each piece becomes arrays at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from dkdetr.errors import CorruptArtefactError, DataError
from dkdetr.evaluation.mask_column import (
    MaskColumn,
    bad_masks,
    concatenate_masks,
    join_masks,
    mask_boxes,
)
from dkdetr.progress import progress

_NUM_NAMED = 20
_PIECE_BYTES = 1 << 24
_ENDS_TRIED = 8
_LONG_READ_BYTES = 1 << 27


@dataclass(frozen=True, eq=False)
class Results:
    """Detections of many images as columns, in file order. Boxes in original pixels.

    `image_ids` i64[n], `category_ids` i64[n], `boxes_xywh` f64[n, 4], `scores` f64[n]. `masks` is
    there if the records have segmentations; `has_boxes` is False if they have nothing else: the
    boxes are then the masks' frames.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    scores: np.ndarray
    masks: MaskColumn | None = None
    has_boxes: bool = True

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, chosen: np.ndarray) -> "Results":
        """Returns the detections at `chosen` (indices or a mask), in that order."""
        return Results(
            image_ids=self.image_ids[chosen],
            category_ids=self.category_ids[chosen],
            boxes_xywh=self.boxes_xywh[chosen],
            scores=self.scores[chosen],
            masks=None if self.masks is None else self.masks.take(chosen),
            has_boxes=self.has_boxes,
        )


def read_results(path: Path) -> Results:
    """Returns the detections of a COCO results file: a list of records, in the file's order.

    A record has image_id, category_id, score, and bbox or segmentation (compressed RLE) or both;
    what the first record has decides for all. Further keys are left alone.

    Raises:
        DataError: no such file, or records that are not detections; names the first of them.
        CorruptArtefactError: not JSON, as after an interrupted copy.
    """
    parts: list[Results] = []
    bad: list[int] = []
    num_records = 0
    kind = _Kind(has_boxes=True, has_masks=False)
    try:
        size = path.stat().st_size
        shown = progress("reading results, MB", size >> 20, quiet=size < _LONG_READ_BYTES)
        with path.open("rb") as file, shown as advance:
            for records in _pieces(file, path, lambda done: advance(done >> 20, "")):
                if not num_records and records:
                    kind = _kind_of(records[0])
                part = _columns(records, kind)
                if part is None:
                    bad += [
                        num_records + index
                        for index, record in enumerate(records)
                        if _columns([record], kind) is None
                    ]
                else:
                    parts.append(part)
                num_records += len(records)
    except OSError as error:
        raise DataError(f"cannot read results '{path}': {error.strerror}") from None
    if bad:
        raise DataError(_name_bad_records(path, bad, num_records, kind))
    return _concatenate(parts, kind)


@dataclass(frozen=True)
class _Kind:
    has_boxes: bool
    has_masks: bool


def _kind_of(record: Any) -> _Kind:
    if not isinstance(record, dict):
        return _Kind(has_boxes=True, has_masks=False)
    # An empty list stands for nothing, as some writers put it.
    has_masks = isinstance(record.get("segmentation"), dict)
    has_boxes = not has_masks or record.get("bbox", []) != []
    return _Kind(has_boxes, has_masks)


def _pieces(file: BinaryIO, path: Path, advance: Callable[[int], None]) -> Iterator[list[Any]]:
    """Yields the records of a JSON list, many at a time."""
    text = file.read(_PIECE_BYTES).lstrip()
    if not text.startswith(b"["):
        records = _parse(text + file.read(), path)
        raise DataError(
            f"results '{path}' hold a {type(records).__name__}, not a list of detections "
            '[{"image_id": ..., "category_id": ..., "bbox": [x, y, w, h], "score": ...}, ...]'
        )
    text, enough = text[1:], 0
    while more := file.read(_PIECE_BYTES):
        for end in _record_ends(text) if len(text) >= enough else ():
            try:
                records = orjson.loads(b"[%b]" % text[:end])
            except orjson.JSONDecodeError:
                continue  # not between records, or no JSON at all: the end of the file will tell
            yield records
            text, enough = text[end:].lstrip()[1:], 0
            break
        else:
            enough = max(enough, 2 * len(text) if len(text) >= enough else 0)
        text += more
        advance(file.tell())
    yield _parse(b"[" + text, path)


def _record_ends(text: bytes) -> Iterator[int]:
    """Yields places behind a `}` before `,` and `{`, the last ones of the text first."""
    stop = len(text)
    for _ in range(_ENDS_TRIED):
        stop = text.rfind(b"{", 0, stop)
        if stop < 0:
            return
        before = text[max(0, stop - 64) : stop].rstrip()
        if before.endswith(b",") and before[:-1].rstrip().endswith(b"}"):
            yield text.rfind(b"}", 0, stop) + 1


def _parse(text: bytes, path: Path) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise CorruptArtefactError(
            f"results '{path}' are not whole JSON ({error}): write or copy the file again"
        ) from None


def _columns(records: Sequence[Any], kind: _Kind) -> Results | None:
    """Returns the records as columns, or None if any of them is not a detection."""
    try:
        image_ids = _integers([record["image_id"] for record in records])
        category_ids = _integers([record["category_id"] for record in records])
        scores = _numbers([record["score"] for record in records])
        masks = _masks([record["segmentation"] for record in records]) if kind.has_masks else None
        if kind.has_boxes:
            boxes = _boxes([record["bbox"] for record in records])
        else:
            assert masks is not None
            boxes = mask_boxes(masks)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return Results(image_ids, category_ids, boxes, scores, masks, kind.has_boxes)


def _integers(values: list[Any]) -> np.ndarray:
    if set(map(type, values)) - {int}:
        raise TypeError
    return np.array(values, dtype=np.int64)


def _numbers(values: list[Any]) -> np.ndarray:
    if set(map(type, values)) - {int, float}:
        raise TypeError
    numbers = np.array(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError
    return numbers


def _boxes(values: list[Any]) -> np.ndarray:
    if set(map(type, values)) - {list} or set(map(len, values)) - {4}:
        raise TypeError
    boxes = _numbers(list(chain.from_iterable(values))).reshape(-1, 4)
    if (boxes[:, 2:] < 0).any():
        raise ValueError
    return boxes


def _masks(values: list[Any]) -> MaskColumn:
    sizes = [value["size"] for value in values]
    if set(map(type, sizes)) - {list} or set(map(len, sizes)) - {2}:
        raise TypeError
    sizes_hw = _integers(list(chain.from_iterable(sizes))).reshape(-1, 2)
    counts = [value["counts"] for value in values]
    if set(map(type, counts)) - {str}:
        raise TypeError
    column = join_masks([each.encode("ascii") for each in counts], sizes_hw)
    if bad_masks(column).any():
        raise ValueError
    return column


def _concatenate(parts: Sequence[Results], kind: _Kind) -> Results:
    none = np.zeros(0, dtype=np.int64)
    masks = [part.masks for part in parts if part.masks is not None]
    return Results(
        image_ids=np.concatenate([none, *(part.image_ids for part in parts)]),
        category_ids=np.concatenate([none, *(part.category_ids for part in parts)]),
        boxes_xywh=np.concatenate([np.zeros((0, 4)), *(part.boxes_xywh for part in parts)]),
        scores=np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
        masks=concatenate_masks(masks) if kind.has_masks else None,
        has_boxes=kind.has_boxes,
    )


def _name_bad_records(path: Path, bad: Sequence[int], num_records: int, kind: _Kind) -> str:
    first = ", ".join(str(index) for index in bad[:_NUM_NAMED])
    more = f" and {len(bad) - _NUM_NAMED} more" if len(bad) > _NUM_NAMED else ""
    shape = "bbox [x, y, width, height] in pixels with no negative side" if kind.has_boxes else ""
    mask = "segmentation {size: [h, w], counts: compressed RLE}" if kind.has_masks else ""
    return (
        f"results '{path}': {len(bad)} of {num_records} records are not detections, at index "
        f"{first}{more}. A detection has integers image_id and category_id, a finite score, and "
        f"{' and '.join(filter(None, (shape, mask)))}"
    )
