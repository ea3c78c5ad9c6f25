"""COCO and LVIS annotation files, read whole, checked, and kept as a few NumPy arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from dkdetr.data.annotation_file import Records, parse_annotation_file, records_of
from dkdetr.data.problems import Problems
from dkdetr.errors import DataError

_SHOWN = 20
_LONGEST_ID = 2**63


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


def read_annotations(
    path: Path, *, style: Literal["coco", "lvis"], problems: Problems | None = None
) -> Annotations:
    """Returns the checked content of a COCO or LVIS annotation file.

    Images are sorted by id and each image's boxes keep the file's order. Boxes that stick out of
    the image are cut at its border; those without width or height (COCO train2017 has two) are
    left out; both are counted in `notes`. In the `lvis` style an image's path comes from the last
    two components of its `coco_url` if it has one, and the federated lists are required.

    Args:
        path: the file.
        style: whose form it has.
        problems: takes up bad records, which are then left out; without it they are an error.

    Raises:
        DataError: the file is missing, no JSON, or holds records that cannot be meant: duplicate
            ids, unknown image or category, negative or non-finite box, box outside its image. The
            message names the first 20 of each kind and their number.
    """
    found = Problems(str(path)) if problems is None else problems
    document = parse_annotation_file(path)
    categories = _categories(records_of(document, "categories", found), found)
    images, bad_image_ids = _images(records_of(document, "images", found), style, found)
    annotations = records_of(document, "annotations", found)
    if problems is None and found.found and not (images and categories):
        found.raise_if_any()
    if not images or not categories:
        raise DataError(f"{path}: {'; '.join(map(str, found.found))}: nothing is left to read")
    category_ids = np.array([record["id"] for record in categories], dtype=np.int64)
    boxes, notes = _boxes(annotations, images, bad_image_ids, category_ids, found)
    if problems is None:
        found.raise_if_any()
    return Annotations(images, tuple(categories), boxes, notes)


def _categories(records: Records, problems: Problems) -> Records:
    good = _good_ids(records, "/categories", problems)
    names = [record.get("name") for record in records]
    bad = [i for i in good if not isinstance(names[i], str) or not str(names[i]).strip()]
    problems.refuse(bad, records, "/categories", "no name")
    return sorted((records[i] for i in sorted({*good} - {*bad})), key=lambda record: record["id"])


def _good_ids(records: Records, table: str, problems: Problems) -> list[int]:
    """Returns the places of records with an id that no earlier one has."""
    good = _whole_numbers(records, "id", table, problems)
    ids = np.array([records[i]["id"] for i in good], dtype=np.int64)
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if len(first) == len(good):
        return good
    twice = [good[i] for i in first[counts > 1].tolist()]
    problems.refuse(twice, records, table, "the id occurs more than once")
    return [good[i] for i in np.sort(first).tolist()]


def _whole_numbers(
    records: Records, key: str, table: str, problems: Problems, least: int = -_LONGEST_ID
) -> list[int]:
    """Returns the places of records whose value is a whole number from `least` to 64 bits."""
    values = [record.get(key) for record in records]
    bad: list[int] = []
    if set(map(type, values)) - {int}:
        bad = [i for i, value in enumerate(values) if type(value) is not int]
        why = f"'{key}' is missing or not a whole number"
        problems.refuse(bad, records, table, why)
    strange = set(bad)
    within = [value for value in values if type(value) is int]
    if within and not (min(within) >= least and max(within) < _LONGEST_ID):
        outside = [
            i
            for i, value in enumerate(values)
            if i not in strange and not least <= value < _LONGEST_ID  # type: ignore[operator]
        ]
        why = f"'{key}' is beyond 64 bits" if least < 0 else f"'{key}' below {least} or too large"
        problems.refuse(outside, records, table, why)
        strange |= set(outside)
    return [i for i in range(len(records)) if i not in strange]


def _images(
    records: Records, style: str, problems: Problems
) -> tuple[tuple[ImageInfo, ...], frozenset[int]]:
    """Returns the images in the order of their ids, and the ids of those left out."""
    table = "/images"
    with_id = _good_ids(records, table, problems)
    good = set(with_id)
    for key in ("height", "width"):
        good &= set(_whole_numbers(records, key, table, problems, least=1))
    names = [_file_name(record, style) for record in records]
    bad = [i for i, name in enumerate(names) if not name]
    wanted = "'coco_url' or 'file_name'" if style == "lvis" else "'file_name'"
    problems.refuse(bad, records, table, f"no {wanted}")
    good -= set(bad)
    lists = [((), ())] * len(records)
    if style == "lvis":
        keys = ("neg_category_ids", "not_exhaustive_category_ids")
        for key in keys:
            good -= set(_bad_id_lists(records, key, problems))
        lists = [
            tuple(tuple(record[key]) for key in keys) if i in good else ((), ())
            for i, record in enumerate(records)
        ]
    images = [
        ImageInfo(records[i]["id"], names[i], records[i]["height"], records[i]["width"], *lists[i])
        for i in good
    ]
    left_out = frozenset(records[i]["id"] for i in set(with_id) - good)
    return tuple(sorted(images, key=lambda image: image.image_id)), left_out


def _file_name(record: dict[str, Any], style: str) -> str:
    url = record.get("coco_url")
    if style == "lvis" and isinstance(url, str) and url:
        return "/".join(url.split("/")[-2:])
    name = record.get("file_name")
    return name if isinstance(name, str) else ""


def _bad_id_lists(records: Records, key: str, problems: Problems) -> list[int]:
    lists = [record.get(key) for record in records]
    bad = [
        i
        for i, ids in enumerate(lists)
        if not isinstance(ids, list) or any(type(category) is not int for category in ids)
    ]
    why = f"LVIS's list '{key}' is missing or holds something else than category ids"
    problems.refuse(bad, records, "/images", why)
    return bad


def _boxes(
    all_records: Records, images: Sequence[ImageInfo], bad_image_ids: frozenset[int],
    category_ids: Int[np.ndarray, "num_categories"], problems: Problems,
) -> tuple[BoxTable, tuple[str, ...]]:  # fmt: skip
    at = "/annotations"
    has_ids = "id" in (all_records[0] if all_records else {})
    rows = _readable(all_records, has_ids, problems)
    records = all_records if len(rows) == len(all_records) else [all_records[i] for i in rows]
    image_of = np.array([record["image_id"] for record in records], dtype=np.int64)
    category_of = np.array([record["category_id"] for record in records], dtype=np.int64)
    xywh = _xywh(records, problems.where)
    crowd = np.array([record.get("iscrowd", 0) for record in records], dtype=bool)
    # Boxes of images that are left out themselves go with them, unsaid.
    good = ~np.isin(image_of, sorted(bad_image_ids))

    def refuse(bad: Any, why: str) -> None:
        nonlocal good
        problems.refuse([rows[i] for i in np.flatnonzero(bad & good)], all_records, at, why)
        good = good & ~bad

    image_ids = np.array([image.image_id for image in images], dtype=np.int64)
    place = np.searchsorted(image_ids, image_of).clip(max=len(image_ids) - 1)
    refuse(~np.isin(category_of, category_ids), "unknown category_id")
    refuse(image_ids[place] != image_of, "unknown image_id")
    refuse(~np.isfinite(xywh).all(axis=1), "'bbox' is not finite")
    xywh = np.where(good[:, None], xywh, 1.0)
    refuse((xywh[:, 2:] < 0).any(axis=1), "negative width or height")
    sizes = np.array([(image.width, image.height) for image in images], dtype=np.float64)
    limits = np.concatenate((sizes, sizes), axis=1)[place].reshape(-1, 4)
    xyxy = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    cut = np.clip(xyxy, 0, limits)
    empty = (xywh[:, 2:] == 0).any(axis=1)
    refuse(~empty & (cut[:, 2:] <= cut[:, :2]).any(axis=1), "box outside its image")
    is_cut = good & (np.abs(cut - xyxy).max(axis=1, initial=0) > 1)

    # Rounding to float32 may empty a sliver of a box; it goes the way of the empty ones.
    small = cut.astype(np.float32)
    empty = good & (empty | (small[:, 2:] <= small[:, :2]).any(axis=1))
    order = np.argsort(place, kind="stable")
    order = order[(good & ~empty)[order]]
    counts = np.bincount(place[order], minlength=len(images))
    table = BoxTable(
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes_xyxy=small[order],
        category_ids=category_of[order],
        is_crowd=crowd[order],
        file_rows=np.array(rows, dtype=np.int64)[order],
    )
    notes = (
        (empty, "boxes without width or height left out"),
        (is_cut, "boxes stood out of their image by more than a pixel and were cut at its border"),
    )
    return table, tuple(_note(mask, what, records, has_ids) for mask, what in notes if mask.any())


def _xywh(records: Records, where: str) -> Float[np.ndarray, "n 4"]:
    numbers = chain.from_iterable(record["bbox"] for record in records)
    try:
        return np.fromiter(numbers, np.float64, 4 * len(records)).reshape(-1, 4)
    except OverflowError:
        raise DataError(f"{where}: a 'bbox' holds a number of more than 300 digits") from None


def _note(mask: Bool[np.ndarray, "n"], what: str, records: Records, has_ids: bool) -> str:
    places = np.flatnonzero(mask).tolist()
    if not has_ids:
        return f"{len(places)} {what}"
    shown = ", ".join(str(records[i]["id"]) for i in places[:_SHOWN])
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return f"{len(places)} {what} (annotation ids {shown}{more})"


def _readable(records: Records, has_ids: bool, problems: Problems) -> list[int]:
    """Returns the places of annotations whose values are of the right kinds."""
    table = "/annotations"
    good = [_good_ids(records, table, problems)] if has_ids else []
    good += [_whole_numbers(records, key, table, problems) for key in ("image_id", "category_id")]
    bad = _bad_boxes(records)
    problems.refuse(bad, records, table, "'bbox' is not a list of four numbers")
    crowd = [record.get("iscrowd", 0) for record in records]
    strange = [i for i, value in enumerate(crowd) if value not in (0, 1)]
    problems.refuse(strange, records, table, "'iscrowd' is neither 0 nor 1")
    if all(len(each) == len(records) for each in good) and not bad and not strange:
        return [*range(len(records))]
    return sorted(set(good[0]).intersection(*good[1:]) - {*bad, *strange})


def _bad_boxes(records: Records) -> list[int]:
    boxes = [record.get("bbox") for record in records]
    bad = [i for i, box in enumerate(boxes) if type(box) is not list or len(box) != 4]
    numbers = {int, float}
    if not bad and not set(map(type, chain.from_iterable(boxes))) - numbers:  # type: ignore[arg-type]
        return []
    return [
        i
        for i, box in enumerate(boxes)
        if type(box) is not list or len(box) != 4 or set(map(type, box)) - numbers
    ]
