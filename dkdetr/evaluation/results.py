"""Detections on disk: COCO's results form, one record a line, in one canonical order.

A file holds boxes, or masks without boxes: the official tools decide by the first record's `bbox`
which of the two they score, and take areas from it.

Image ids ascend; within an image scores descend and equal scores keep their order. Evaluators
break ties by file order, so a canonical file gives one AP whatever order images were seen in.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import orjson

from dkdetr.atomic_file import atomic_file
from dkdetr.errors import CorruptArtefactError, DataError
from dkdetr.run_lengths import Rle, areas, boxes_xywh, whole_runs

_NUM_NAMED = 20


@dataclass(frozen=True, eq=False)
class Results:
    """Detections of many images as columns, in file order. Boxes in original pixels.

    `image_ids` i64[n], `category_ids` i64[n], `boxes_xywh` f64[n, 4], `scores` f64[n]. Where the
    file holds masks, `masks` are their run lengths, object[n], and boxes are the masks' own.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None = None

    @property
    def areas(self) -> np.ndarray:
        """Areas f64[n] in pixels, of masks where there are any."""
        if self.masks is not None:
            return areas(self.masks.tolist())
        return self.boxes_xywh[:, 2] * self.boxes_xywh[:, 3]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, chosen: np.ndarray) -> "Results":
        """Returns the detections at `chosen` (indices or a mask), in that order."""
        return Results(
            image_ids=self.image_ids[chosen],
            category_ids=self.category_ids[chosen],
            boxes_xywh=self.boxes_xywh[chosen],
            scores=self.scores[chosen],
            masks=None if self.masks is None else self.masks[chosen],
        )


class ResultsWriter:
    """Writes a results file image by image, in any order, holding none of it in memory.

    A context manager: the file takes its name, whole and in canonical order, when the block ends;
    after an error there is no file. Each image's records go to a temporary file beside the target
    as they come, and are copied in the order of image ids at the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[int, tuple[int, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unnamed: nothing is left behind whatever happens to the process.
        self._spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115

    @property
    def num_images(self) -> int:
        """Images written so far, those without a detection included."""
        return len(self._places)

    def write(
        self,
        image_id: int,
        boxes_xyxy: np.ndarray,
        scores: np.ndarray,
        category_ids: np.ndarray,
    ) -> None:
        """Adds one image's detections: f32[n, 4] original pixels, f32[n], i64[n]; once an image."""
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        boxes = np.concatenate((boxes_xyxy[:, :2], sides), axis=1).astype(np.float32)
        self._write(image_id, "bbox", boxes, scores, category_ids)

    def write_masks(
        self, image_id: int, masks: Sequence[Rle], scores: np.ndarray, category_ids: np.ndarray
    ) -> None:
        """Adds one image's masks, as `write` does boxes; a file holds one of the two."""
        self._write(image_id, "segmentation", masks, scores, category_ids)

    def _write(
        self,
        image_id: int,
        key: str,
        shapes: np.ndarray | Sequence[Rle],
        scores: np.ndarray,
        category_ids: np.ndarray,
    ) -> None:
        assert image_id not in self._places, f"image {image_id} is written twice"
        order = np.argsort(-scores, kind="stable")
        lines = [
            orjson.dumps(
                {
                    "image_id": image_id,
                    "category_id": int(category_ids[index]),
                    key: shapes[index],
                    "score": scores[index],
                },
                option=orjson.OPT_SERIALIZE_NUMPY,
            )
            for index in order
        ]
        block = b",\n".join(lines)
        self._places[image_id] = (self._spool.seek(0, os.SEEK_END), len(block))
        self._spool.write(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._spool:
            if kind is None:
                self._commit()

    def _commit(self) -> None:
        with atomic_file(self._path) as file:
            separator = b"[\n"
            for _, (offset, length) in sorted(self._places.items()):
                if length:
                    self._spool.seek(offset)
                    file.write(separator)
                    file.write(self._spool.read(length))
                    separator = b",\n"
            file.write(b"\n]\n" if separator == b",\n" else b"[]\n")


def read_results(path: Path) -> Results:
    """Returns the detections of a COCO results file (a list of image_id, category_id, bbox, score).

    Records with `segmentation` (packed run lengths) and no `bbox` are masks. Further keys of a
    record are left alone; the order of the file is kept.

    Raises:
        DataError: no such file, or records that are not detections; names the first of them.
        CorruptArtefactError: not JSON, as after an interrupted copy.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read results '{path}': {error.strerror}") from None
    try:
        records = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise CorruptArtefactError(
            f"results '{path}' are not whole JSON ({error}): write or copy the file again"
        ) from None
    if not isinstance(records, list):
        raise DataError(
            f"results '{path}' hold a {type(records).__name__}, not a list of detections "
            '[{"image_id": ..., "category_id": ..., "bbox": [x, y, w, h], "score": ...}, ...]'
        )
    results = _columns(records)
    if results is None:
        raise DataError(_name_bad_records(path, records))
    return results


def _columns(records: Sequence[Any]) -> Results | None:
    """Returns the records as columns, or None if any of them is not a detection."""
    if not records:
        none = np.zeros(0, dtype=np.int64)
        return Results(none, none, np.zeros((0, 4)), np.zeros(0))
    try:
        image_ids = np.array([record["image_id"] for record in records])
        category_ids = np.array([record["category_id"] for record in records])
        scores = np.array([record["score"] for record in records])
        masks = _masks(records) if "bbox" not in records[0] else None
        boxes = (
            np.array([record["bbox"] for record in records])
            if masks is None
            else boxes_xywh(masks.tolist())
        )
    except (KeyError, TypeError, ValueError):
        return None
    right = (
        image_ids.dtype.kind == "i"
        and category_ids.dtype.kind == "i"
        and scores.dtype.kind in "if"
        and boxes.dtype.kind in "if"
        and boxes.shape == (len(records), 4)
        and bool(np.isfinite(scores).all())
        and bool(np.isfinite(boxes).all())
        and bool((boxes[:, 2:] >= 0).all())
    )
    if not right:
        return None
    return Results(
        image_ids, category_ids, boxes.astype(np.float64), scores.astype(np.float64), masks
    )


def _masks(records: Sequence[Any]) -> np.ndarray:
    """Returns the run lengths of mask records; raises as reading other columns does."""
    if any("bbox" in record for record in records):
        raise ValueError("boxes among masks")
    masks = np.empty(len(records), dtype=object)
    for index, record in enumerate(records):
        mask = cast("Any", record["segmentation"])
        size = mask["size"]
        if not (isinstance(size, list) and list(map(type, size)) == [int, int]):
            raise ValueError("a mask's size is [height, width]")
        if not isinstance(mask["counts"], str):
            raise TypeError("a mask's counts are packed in a string")
        whole_runs(mask)
        masks[index] = mask
    return masks


def _name_bad_records(path: Path, records: Sequence[Any]) -> str:
    bad = [index for index, record in enumerate(records) if _columns([record]) is None]
    if not bad:  # each is fine alone: kinds of numbers differ among the records
        return f"results '{path}' mix kinds of ids: image_id and category_id must be integers"
    first = ", ".join(str(index) for index in bad[:_NUM_NAMED])
    more = f" and {len(bad) - _NUM_NAMED} more" if len(bad) > _NUM_NAMED else ""
    return (
        f"results '{path}': {len(bad)} of {len(records)} records are not detections, at index "
        f"{first}{more}. A detection has integers image_id and category_id, a finite score, and "
        f"bbox [x, y, width, height] in pixels with no negative side, or, all over the file, "
        "segmentation with size [height, width] and counts, a packed string"
    )
