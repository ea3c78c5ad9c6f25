"""COCO and LVIS annotation files, read whole, checked, and kept as a few NumPy arrays.

Only boxes are read: polygons are cut out of the text before it is parsed, which spares the
1.1 GB LVIS file most of its memory. `segmentations` reads them where masks are wanted.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from jaxtyping import Bool, Float, Int

from dkdetr.errors import DataError

_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[\[\]0-9eE+\-.,\s]*\]')
_SHOWN = 20

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Category:
    """A name of a data set; `frequency` is LVIS's r, c or f, and '' elsewhere."""

    category_id: int
    name: str
    frequency: str
    is_base: bool


@dataclass(frozen=True)
class ImageInfo:
    """An image's facts; `file_name` is relative to the split's image root.

    The two lists are LVIS's federated annotation: categories known to be absent, and categories
    of which not every instance is marked. They are empty in COCO, where all is exhaustive.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    neg_category_ids: tuple[int, ...] = ()
    not_exhaustive_category_ids: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of one image, in pixels of the original image."""

    boxes_xyxy: Float[np.ndarray, "n 4"]
    category_ids: Int[np.ndarray, "n"]
    is_crowd: Bool[np.ndarray, "n"]


@dataclass(frozen=True, eq=False)
class BoxTable:
    """All boxes of many images: image i owns the rows offsets[i] to offsets[i + 1].

    `file_rows` are their places in the file's list of annotations, by which masks are found.
    """

    offsets: Int[np.ndarray, "num_images_plus_one"]
    boxes_xyxy: Float[np.ndarray, "num_boxes 4"]
    category_ids: Int[np.ndarray, "num_boxes"]
    is_crowd: Bool[np.ndarray, "num_boxes"]
    file_rows: Int[np.ndarray, "num_boxes"]

    def of_image(self, index: int) -> Boxes:
        """Returns the boxes of the image at `index`, in the file's order."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Boxes(self.boxes_xyxy[rows], self.category_ids[rows], self.is_crowd[rows])

    def image_of_row(self) -> Int[np.ndarray, "num_boxes"]:
        """Returns the image index of each row."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def keep_rows(self, keep: Bool[np.ndarray, "num_boxes"]) -> "BoxTable":
        """Returns the table with only the marked rows; images keep their places."""
        running = np.concatenate(([0], np.cumsum(keep)))
        return BoxTable(
            offsets=running[self.offsets].astype(np.int64),
            boxes_xyxy=self.boxes_xyxy[keep],
            category_ids=self.category_ids[keep],
            is_crowd=self.is_crowd[keep],
            file_rows=self.file_rows[keep],
        )

    def keep_images(self, keep: Bool[np.ndarray, "num_images"]) -> "BoxTable":
        """Returns the table of only the marked images, in the same order."""
        rows = np.repeat(keep, np.diff(self.offsets))
        counts = np.diff(self.offsets)[keep]
        return BoxTable(
            offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            boxes_xyxy=self.boxes_xyxy[rows],
            category_ids=self.category_ids[rows],
            is_crowd=self.is_crowd[rows],
            file_rows=self.file_rows[rows],
        )


@dataclass(frozen=True, eq=False)
class Annotations:
    """What an annotation file says, before any split's rules: `boxes` is aligned with `images`.

    `category_records` are the file's own category tables, from which a split derives its groups.
    `notes` says what was put right in reading: boxes cut at the border, empty ones left out.
    """

    images: tuple[ImageInfo, ...]
    category_records: tuple[dict[str, Any], ...]
    boxes: BoxTable
    notes: tuple[str, ...]


def read_annotations(path: Path, *, style: Literal["coco", "lvis"]) -> Annotations:
    """Returns the checked content of a COCO or LVIS annotation file.

    Images are sorted by id and each image's boxes keep the file's order. Boxes that stick out of
    the image are cut at its border; those without width or height (COCO train2017 has two) are
    left out; both are counted in `notes`. In the `lvis` style an image's path comes from the last
    two components of its `coco_url` if it has one, and the federated lists are required.

    Raises:
        DataError: the file is missing, no JSON, or holds records that cannot be meant: duplicate
            ids, unknown image or category, negative or non-finite box, box outside its image. The
            message names the first 20 of them and their number.
    """
    document = _parse(path)
    tables = {key: _records(document, key, path) for key in ("images", "categories", "annotations")}
    where = str(path)
    image_records, category_records = tables["images"], tables["categories"]
    image_ids = _ids(image_records, "images", where)
    category_ids = _ids(category_records, "categories", where)
    for record in category_records:
        if not isinstance(record.get("name"), str) or not record["name"].strip():
            raise DataError(f"{where}: category {record['id']} has no name")
    order = np.argsort(image_ids, kind="stable")
    images = _images([image_records[i] for i in order], style, where)
    boxes, notes = _boxes(tables["annotations"], images, image_ids[order], category_ids, where)
    by_id = sorted(category_records, key=lambda record: record["id"])
    return Annotations(images, tuple(by_id), boxes, notes)


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no annotation file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read the annotation file {path}: {error.strerror}") from None
    text = _POLYGONS.sub(b'"segmentation":null', text)
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        document = _parse_not_a_number(text, path, error)
    if not isinstance(document, dict):
        raise DataError(f"{path}: an annotation file is a JSON object, this is none")
    return document


def _parse_not_a_number(text: bytes, path: Path, error: orjson.JSONDecodeError) -> Any:
    # Python writes NaN and Infinity, which are no JSON. Read them, so that their boxes get named.
    try:
        if b"NaN" in text or b"Infinity" in text:
            return json.loads(text)
    except (ValueError, RecursionError):
        pass
    raise DataError(f"{path} is not JSON: {error}") from None


def _records(document: dict[str, Any], key: str, path: Path) -> Records:
    records = document.get(key)
    if not isinstance(records, list):
        raise DataError(f"{path}: no list '{key}'; is this a COCO or LVIS annotation file?")
    bad = [i for i, record in enumerate(records) if not isinstance(record, dict)]
    _refuse(bad, records, str(path), f"/{key}", "not an object")
    if not records and key != "annotations":
        raise DataError(f"{path}: the list '{key}' is empty")
    return records


def _refuse(bad: Sequence[int], records: Sequence[Any], where: str, list_at: str, why: str) -> None:
    """Raises DataError if there are bad records, naming the first 20 and how many there are."""
    if not len(bad):
        return
    names: list[str] = []
    for index in bad[:_SHOWN]:
        record = records[index]
        known = record.get("id") if isinstance(record, dict) else None
        names.append(f"id {known}" if type(known) is int else f"{list_at}/{index}")
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    plural = "records" if len(bad) > 1 else "record"
    raise DataError(
        f"{where}: {len(bad)} {plural} of {list_at}: {why}: {', '.join(names)}{more}; "
        "training or scoring on them would be wrong, so mend the file"
    )


def _integers(records: Records, key: str, list_at: str, where: str) -> Int[np.ndarray, "n"]:
    values = [record.get(key) for record in records]
    if set(map(type, values)) - {int}:
        bad = [i for i, value in enumerate(values) if type(value) is not int]
        _refuse(bad, records, where, list_at, f"'{key}' is missing or not a whole number")
    limit = 2**63
    bad = [i for i, value in enumerate(values) if not -limit <= value < limit]  # type: ignore[operator]
    _refuse(bad, records, where, list_at, f"'{key}' is beyond 64 bits")
    return np.array(values, dtype=np.int64)


def _ids(records: Records, key: str, where: str) -> Int[np.ndarray, "n"]:
    ids = _integers(records, "id", f"/{key}", where)
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    _refuse(first[counts > 1].tolist(), records, where, f"/{key}", "the id occurs more than once")
    return ids


def _images(records: Records, style: str, where: str) -> tuple[ImageInfo, ...]:
    for key in ("height", "width"):
        sizes = _integers(records, key, "/images", where)
        _refuse(np.flatnonzero(sizes < 1).tolist(), records, where, "/images", f"'{key}' below 1")
    names = [_file_name(record, style) for record in records]
    bad = [i for i, name in enumerate(names) if not name]
    wanted = "'coco_url' or 'file_name'" if style == "lvis" else "'file_name'"
    _refuse(bad, records, where, "/images", f"no {wanted}")
    lists = [((), ())] * len(records)
    if style == "lvis":
        keys = ("neg_category_ids", "not_exhaustive_category_ids")
        lists = list(zip(*(_id_lists(records, key, where) for key in keys), strict=True))
    return tuple(
        ImageInfo(record["id"], name, record["height"], record["width"], *federated)
        for record, name, federated in zip(records, names, lists, strict=True)
    )


def _file_name(record: dict[str, Any], style: str) -> str:
    url = record.get("coco_url")
    if style == "lvis" and isinstance(url, str) and url:
        return "/".join(url.split("/")[-2:])
    name = record.get("file_name")
    return name if isinstance(name, str) else ""


def _id_lists(records: Records, key: str, where: str) -> list[tuple[int, ...]]:
    lists = [record.get(key) for record in records]
    bad = [
        i
        for i, ids in enumerate(lists)
        if not isinstance(ids, list) or any(type(category) is not int for category in ids)
    ]
    why = f"LVIS's list '{key}' is missing or holds something else than category ids"
    _refuse(bad, records, where, "/images", why)
    return [tuple(ids) for ids in lists if ids is not None]


def _boxes(
    records: Records, images: Sequence[ImageInfo], image_ids: Int[np.ndarray, "num_images"],
    category_ids: Int[np.ndarray, "num_categories"], where: str,
) -> tuple[BoxTable, tuple[str, ...]]:  # fmt: skip
    at = "/annotations"
    if "id" in (records[0] if records else {}):
        _ids(records, "annotations", where)
    image_of = _integers(records, "image_id", at, where)
    category_of = _integers(records, "category_id", at, where)
    unknown = ~np.isin(category_of, category_ids)
    _refuse(np.flatnonzero(unknown).tolist(), records, where, at, "unknown category_id")
    place = np.searchsorted(image_ids, image_of).clip(max=len(image_ids) - 1)
    unknown = image_ids[place] != image_of
    _refuse(np.flatnonzero(unknown).tolist(), records, where, at, "unknown image_id")
    xywh = _xywh(records, where)
    _refuse(
        np.flatnonzero(~np.isfinite(xywh).all(axis=1)).tolist(),
        records, where, at, "'bbox' is not finite",
    )  # fmt: skip
    negative = (xywh[:, 2:] < 0).any(axis=1)
    _refuse(np.flatnonzero(negative).tolist(), records, where, at, "negative width or height")

    sizes = np.array([(image.width, image.height) for image in images], dtype=np.float64)
    limits = np.concatenate((sizes, sizes), axis=1)[place].reshape(-1, 4)
    xyxy = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    cut = np.clip(xyxy, 0, limits)
    empty = (xywh[:, 2:] == 0).any(axis=1)
    outside = ~empty & (cut[:, 2:] <= cut[:, :2]).any(axis=1)
    _refuse(np.flatnonzero(outside).tolist(), records, where, at, "box outside its image")
    num_cut = int((np.abs(cut - xyxy).max(axis=1, initial=0) > 1).sum())
    crowd = [record.get("iscrowd", 0) for record in records]
    bad = [i for i, value in enumerate(crowd) if value not in (0, 1)]
    _refuse(bad, records, where, at, "'iscrowd' is neither 0 nor 1")

    # Rounding to float32 may empty a sliver of a box; it goes the way of the empty ones.
    small = cut.astype(np.float32)
    empty |= (small[:, 2:] <= small[:, :2]).any(axis=1)
    order = np.argsort(place, kind="stable")
    order = order[~empty[order]]
    counts = np.bincount(place[order], minlength=len(images))
    table = BoxTable(
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes_xyxy=small[order],
        category_ids=category_of[order],
        is_crowd=np.array(crowd, dtype=bool)[order],
        file_rows=order,
    )
    notes = (
        (int(empty.sum()), "boxes without width or height left out"),
        (num_cut, "boxes stood out of their image by more than a pixel and were cut at its border"),
    )
    return table, tuple(f"{count} {what}" for count, what in notes if count)


def _xywh(records: Records, where: str) -> Float[np.ndarray, "n 4"]:
    boxes = [record.get("bbox") for record in records]
    bad = [i for i, box in enumerate(boxes) if type(box) is not list or len(box) != 4]
    if not bad and set(map(type, chain.from_iterable(boxes))) - {int, float}:  # type: ignore[arg-type]
        numbers = {int, float}
        bad = [i for i, box in enumerate(boxes) if set(map(type, box)) - numbers]  # type: ignore[arg-type]
    _refuse(bad, records, where, "/annotations", "'bbox' is not a list of four numbers")
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
