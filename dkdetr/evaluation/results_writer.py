"""Detections to disk: one record a line, in one canonical order.

Image ids ascend; within an image scores descend and equal scores keep their order. Evaluators
break ties by file order, so a canonical file gives one AP whatever order images were seen in.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson

from dkdetr.atomic_file import atomic_file

_PIECE_BYTES = 1 << 24


class ResultsWriter:
    """Writes a results file image by image, in any order, holding none of it in memory.

    A context manager: the file takes its name, whole and in canonical order, when the block ends;
    after an error there is no file. Each image's records go to a temporary file beside the target
    as they come, and are copied in the order of image ids at the end.

    Args:
        path: of the file.
        commits: False for a rank that only hands its pieces to another.
    """

    piece_bytes = _PIECE_BYTES

    def __init__(self, path: Path, *, commits: bool = True) -> None:
        self._path = path
        self._commits = commits
        self._places: dict[int, tuple[int, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unnamed: nothing is left behind whatever happens to the process.
        self._spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115

    @property
    def num_images(self) -> int:
        """Images written so far, those without a detection included."""
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """The length of all pieces."""
        return self._spool.seek(0, os.SEEK_END)

    @property
    def places(self) -> Mapping[int, tuple[int, int]]:
        """By image id: where its records lie in the pieces, and how long they are."""
        return self._places

    def write(
        self,
        image_id: int,
        boxes_xyxy: np.ndarray,
        scores: np.ndarray,
        category_ids: np.ndarray,
    ) -> None:
        """Adds one image's detections: f32[n, 4] original pixels, f32[n], i64[n]; once an image."""
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        boxes_xywh = np.concatenate((boxes_xyxy[:, :2], sides), axis=1).astype(np.float32)
        shapes = [b'"bbox":[%b]' % box for box in _rows_as_text(boxes_xywh)]
        self._write(image_id, shapes, scores, category_ids)

    def write_masks(
        self,
        image_id: int,
        masks: Sequence[Mapping[str, Any]],
        scores: np.ndarray,
        category_ids: np.ndarray,
    ) -> None:
        """Adds one image's masks, RLEs as pycocotools makes them; once an image.

        No box is written: with one, the official tools would take its area for the mask's.
        """
        shapes = [b'"segmentation":%b' % _mask_as_text(mask) for mask in masks]
        self._write(image_id, shapes, scores, category_ids)

    def _write(
        self, image_id: int, shapes: list[bytes], scores: np.ndarray, category_ids: np.ndarray
    ) -> None:
        assert image_id not in self._places, f"image {image_id} is written twice"
        order = np.argsort(-scores, kind="stable").tolist()
        texts = orjson.dumps(
            np.ascontiguousarray(scores), option=orjson.OPT_SERIALIZE_NUMPY
        )[1:-1].split(b",")  # fmt: skip
        labels = category_ids.tolist()
        # Put together by hand: a dictionary a detection would cost as much as the student on a GPU.
        block = b",\n".join(
            b'{"image_id":%d,"category_id":%d,%b,"score":%b}'
            % (image_id, labels[index], shapes[index], texts[index])
            for index in order
        )
        self._append(image_id, block)

    def _append(self, image_id: int, block: bytes) -> None:
        self._places[image_id] = (self._spool.seek(0, os.SEEK_END), len(block))
        self._spool.write(block)

    def pieces(self) -> Iterator[bytes]:
        """Yields all that was written, in the order of writing, a piece at a time."""
        self._spool.seek(0)
        while piece := self._spool.read(_PIECE_BYTES):
            yield piece

    def absorb(self, places: Mapping[int, tuple[int, int]], pieces: Iterator[bytes]) -> None:
        """Adds what another writer holds: its `places` and its `pieces`."""
        start = self._spool.seek(0, os.SEEK_END)
        assert not self._places.keys() & places.keys(), "an image is written twice"
        for piece in pieces:
            self._spool.write(piece)
        self._places |= {i: (start + offset, size) for i, (offset, size) in places.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._spool:
            if kind is None and self._commits:
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


def _rows_as_text(rows: np.ndarray) -> list[bytes]:
    """Returns the numbers of each row, shortest form, without brackets."""
    text = orjson.dumps(np.ascontiguousarray(rows), option=orjson.OPT_SERIALIZE_NUMPY)
    return text[2:-2].split(b"],[")


def _mask_as_text(mask: Mapping[str, Any]) -> bytes:
    counts = mask["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return orjson.dumps({"size": [int(side) for side in mask["size"]], "counts": counts})
