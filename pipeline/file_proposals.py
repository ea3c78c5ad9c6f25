"""Proposals from a file: read once, checked, and packed by image for the workers.

file:PATH                       a COCO results json: [{image_id, bbox: [x, y, w, h], score}]
file:PATH?order=image_id        mmdet's pickled list: (n, 5) arrays of x1, y1, x2, y2, score, or
file:PATH?order=annotations     a list of them by class; an entry an image, without any image's id

A pickled list says nothing of whose boxes it holds: a list in the wrong order gives every picture
another one's boxes, and nothing fails. So the order is stated by the user, and checked: boxes that
lie outside of their picture are what a wrong order looks like.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import xxhash

from dkdetr.atomic_file import atomic_file
from dkdetr.data.annotation_file import parse_annotation_file
from dkdetr.data.splits import Split
from dkdetr.errors import CorruptArtefactError, DataError, UsageError
from pipeline.pickled_lists import Nested, read_pickled_lists
from pipeline.proposals import RawProposals, Seen, SourceImage

_SHOWN = 20
_SLACK = 2.0  # pixels that a detector's box may stick out of its picture
_PICKLES = {".pkl", ".pickle"}
_ORDERS = ("image_id", "annotations")
Alone = Callable[[], AbstractContextManager[Any]]
_IDS = range(-(1 << 63), 1 << 63)
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises for an archive that is cut, flipped or empty; RuntimeError: "encrypted"."""


@dataclass(frozen=True)
class FileOptions:
    """What a user states of a file: how its entries are ordered, what its maker has seen."""

    order: str = ""
    novel: str = ""


def parse_file_options(text: str) -> tuple[str, FileOptions]:
    """Returns path and options of PATH?order=...&novel=...; raises UsageError for other words."""
    path, mark, query = text.rpartition("?")
    if not mark or "=" not in query:
        return text, FileOptions()
    given: dict[str, str] = {}
    choices = {"order": _ORDERS, "novel": ("seen", "unseen")}
    for pair in query.split("&"):
        key, _, value = pair.partition("=")
        if value not in choices.get(key, ()):
            raise UsageError(
                f"proposals '{text}': '{pair}' is none of order=image_id, order=annotations, "
                "novel=seen, novel=unseen"
            )
        given[key] = value
    return path, FileOptions(**given)


class FileProposals:
    """Proposals read from what `pack_file` made of a user's file.

    Args:
        path: the packed file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as packed:
                self._image_ids = packed["image_ids"]
                self._offsets = packed["offsets"]
                self._boxes = torch.from_numpy(packed["boxes_xyxy"])
                self._scores = torch.from_numpy(packed["scores"])
                self._hash = str(packed["source_xxh3"])
                self._order = str(packed["order"])
                self._novel = str(packed["novel"])
                self._category_ids = packed["category_ids"]
                self._num_classes = int(packed["num_classes"])
        except _DAMAGED as error:
            raise CorruptArtefactError(
                f"the packed proposals '{path}' cannot be read ({error}); delete the file"
            ) from None

    @property
    def identity(self) -> Mapping[str, Any]:
        """Names the file by its content, and the order it was read in."""
        ordered = {"order": self._order} if self._order else {}
        return {"source": "file", "xxh3_128": self._hash, **ordered}

    @property
    def seen(self) -> Seen:
        """What the user says of it, and what its categories give away."""
        stated = {"seen": True, "unseen": False}.get(self._novel)
        return Seen(
            source="file",
            detector=f"unknown; its file xxh3:{self._hash}",
            uses_novel_names=stated,
            saw_novel_boxes=stated,
            category_ids=tuple(self._category_ids.tolist()),
            num_classes=self._num_classes,
            reason="it is stated to have seen them (novel=seen)" if stated else "",
        )

    @property
    def image_ids(self) -> frozenset[int]:
        """The images that the file has boxes of."""
        return frozenset(self._image_ids.tolist())

    def propose(self, images: Sequence[SourceImage]) -> list[RawProposals]:
        """Returns the file's boxes of each image; none where it has none."""
        found: list[RawProposals] = []
        for image in images:
            place = int(np.searchsorted(self._image_ids, image.image_id))
            known = place < len(self._image_ids) and self._image_ids[place] == image.image_id
            rows = slice(self._offsets[place], self._offsets[place + 1]) if known else slice(0, 0)
            found.append(RawProposals(self._boxes[rows], self._scores[rows]))
        return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """Boxes of many images, in any order."""

    image_ids: np.ndarray
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    category_ids: np.ndarray
    """The distinct ones, where the file names any."""
    num_classes: int = 0
    """Of a list by class; else 0."""


def pack_file(
    path: Path, options: FileOptions, split: Split, folder: Path, *, alone: Alone = nullcontext
) -> Path:
    """Returns a packed copy of a user's file; workers read it in no time.

    The copy lies in `folder` under a name made of the file's hash and all that decides its content.
    `alone` is entered while it is written, not where it is there already.

    Raises:
        UsageError: a pickled list whose order is not stated.
        DataError: missing, malformed or of another split; names the first 20 bad records.
        CorruptArtefactError: a pickle that holds more than lists of arrays.
    """
    data = _load(path, options)
    digest = xxhash.xxh3_128(data).hexdigest()
    ids = _ids_hash(split) if options.order else ""
    state = "/".join((digest, options.order, options.novel, ids))
    packed = folder / f"file-{xxhash.xxh3_64_hexdigest(state.encode())}.npz"
    if packed.is_file():
        return packed
    rows = _read(data, path, options, split)
    order = np.argsort(rows.image_ids, kind="stable")
    unique, first = np.unique(rows.image_ids[order], return_index=True)
    with alone(), atomic_file(packed) as file:
        np.savez(
            file,
            image_ids=unique,
            offsets=np.append(first, len(order)).astype(np.int64),
            boxes_xyxy=rows.boxes_xyxy[order].astype(np.float32),
            scores=rows.scores[order].astype(np.float32),
            source_xxh3=np.array(digest),
            order=np.array(options.order),
            novel=np.array(options.novel),
            category_ids=rows.category_ids,
            num_classes=np.array(rows.num_classes),
        )
    return packed


def read_boxes(
    path: Path, options: FileOptions, split: Split
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Returns boxes xyxy and scores of each image id, in the file's own order; as `pack_file`."""
    rows = _read(_load(path, options), path, options, split)
    order = np.argsort(rows.image_ids, kind="stable")
    unique, first = np.unique(rows.image_ids[order], return_index=True)
    boxes, scores = rows.boxes_xyxy.astype(np.float32), rows.scores.astype(np.float32)
    return {
        int(image_id): (boxes[places], scores[places])
        for image_id, places in zip(unique, np.split(order, first[1:]), strict=True)
    }


def _load(path: Path, options: FileOptions) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"proposals '{path}': {error.strerror or error}") from None
    pickled = path.suffix in _PICKLES
    if pickled and not options.order:
        raise UsageError(
            f"proposals '{path}': a pickled list does not say which picture an entry belongs to; "
            f"state the order behind its name: '{path}?order=image_id' (sorted ids) or "
            f"'{path}?order=annotations' (as the annotation file lists its pictures)"
        )
    if options.order and not pickled:
        raise UsageError(f"proposals '{path}': a results json names its images; drop '?order='")
    return data


def _read(data: bytes, path: Path, options: FileOptions, split: Split) -> _Rows:
    if options.order:
        return _read_lists(data, path, options.order, split)
    return _read_json(data, path)


def _ids_hash(split: Split) -> str:
    ids = np.array([image.image_id for image in split.images], dtype="<i8")
    return xxhash.xxh3_128_hexdigest(ids.tobytes())


def _read_json(data: bytes, path: Path) -> _Rows:
    try:
        records = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise DataError(f"proposals '{path}' are not JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise DataError(f"proposals '{path}': not a list of COCO results, or an empty one")
    _refuse([i for i, record in enumerate(records) if not _is_result(record)], path)
    xywh = np.array([record["bbox"] for record in records], dtype=np.float64)
    scores = np.array([record["score"] for record in records], dtype=np.float64)
    fine = np.isfinite(xywh).all(axis=1) & (xywh[:, 2:] >= 0).all(axis=1) & np.isfinite(scores)
    _refuse(np.flatnonzero(~fine).tolist(), path)
    named = {record.get("category_id") for record in records}
    return _Rows(
        image_ids=np.array([record["image_id"] for record in records], dtype=np.int64),
        boxes_xyxy=np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1),
        scores=scores,
        category_ids=np.array(sorted(i for i in named if type(i) is int), dtype=np.int64),
    )


def _refuse(bad: Sequence[int], path: Path) -> None:
    if bad:
        raise DataError(
            f"proposals '{path}': {len(bad)} records lack a whole image_id, a finite bbox "
            "[x, y, w, h] or a finite score, or have a category_id that is no id; first: "
            + ", ".join(f"/{index}" for index in bad[:_SHOWN])
        )


def _is_result(record: Any) -> bool:
    if not isinstance(record, dict) or not _is_id(record.get("image_id")):
        return False
    category = record.get("category_id")
    if isinstance(category, list | dict) or (type(category) is int and not _is_id(category)):
        return False
    box, score = record.get("bbox"), record.get("score")
    numbers = (int, float)
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in numbers for value in box)
        and type(score) in numbers
    )


def _is_id(value: Any) -> bool:
    return type(value) is int and value in _IDS


def _read_lists(data: bytes, path: Path, order: str, split: Split) -> _Rows:
    where = f"proposals '{path}'"
    entries = read_pickled_lists(data, where)
    in_file = _ids_in_annotation_order(split)
    tables = [_table(entry, f"{where}: entry {at}") for at, entry in enumerate(entries)]
    ids = _owners(len(entries), order, in_file, split, where)
    outside = _outside(ids, tables, split)
    if outside:
        other = _ORDERS[order == _ORDERS[0]]
        fits = not _outside(_owners(len(entries), other, in_file, split, where), tables, split)
        hint = (
            f"in the order '{other}' all boxes fit: '{path}?order={other}'"
            if fits
            else "they do not fit in the other order either: the list belongs to other pictures"
        )
        raise DataError(
            f"{where}: read in the order '{order}', {len(outside)} of {len(ids):,} pictures have "
            f"boxes outside of themselves (first: image {outside[0]}); {hint}"
        )
    counts = [len(table) for table in tables]
    rows = np.concatenate([np.zeros((0, 5)), *tables])
    by_class = {len(entry) for entry in entries if isinstance(entry, list)}
    return _Rows(
        image_ids=np.repeat(ids, counts),
        boxes_xyxy=rows[:, :4],
        scores=rows[:, 4],
        category_ids=np.zeros(0, dtype=np.int64),
        num_classes=max(by_class, default=0),
    )


def _table(entry: Nested, where: str) -> np.ndarray:
    """Returns one image's rows of x1, y1, x2, y2, score, all classes together."""
    parts = entry if isinstance(entry, list) else [entry]
    tables = [np.asarray(part, dtype=np.float64) for part in parts if np.size(part)]
    for table in tables:
        if table.ndim != 2 or table.shape[1] != 5:
            raise DataError(
                f"{where} has shape {list(table.shape)}; rows of x1, y1, x2, y2, score are wanted"
            )
        if not np.isfinite(table).all() or (table[:, 2:4] < table[:, :2]).any():
            raise DataError(f"{where} has a box that ends before it begins, or a number like NaN")
    return np.concatenate([np.zeros((0, 5)), *tables])


def _owners(count: int, order: str, in_file: np.ndarray, split: Split, where: str) -> np.ndarray:
    """Returns each entry's image id: of all of the annotation file's images, or the split's."""
    of_split = np.array([image.image_id for image in split.images])
    for ids in (in_file, in_file[np.isin(in_file, of_split)]):
        if len(ids) == count:
            return np.sort(ids) if order == _ORDERS[0] else ids
    raise DataError(
        f"{where}: {count:,} entries, and {split.name} has {len(of_split):,} images "
        f"({len(in_file):,} in its annotation file): it belongs to other annotations"
    )


def _ids_in_annotation_order(split: Split) -> np.ndarray:
    document = parse_annotation_file(split.annotations_path)
    return np.array([record["id"] for record in document["images"]], dtype=np.int64)


def _outside(ids: np.ndarray, tables: Sequence[np.ndarray], split: Split) -> list[int]:
    """Returns the images with a box that reaches out of them."""
    size_of = {image.image_id: (image.width, image.height) for image in split.images}
    found: list[int] = []
    for image_id, table in zip(ids.tolist(), tables, strict=True):
        limit = size_of.get(image_id)
        if limit is None or not len(table):
            continue
        if (table[:, :2] < -_SLACK).any() or (table[:, 2:4] > np.array(limit) + _SLACK).any():
            found.append(image_id)
    return found
