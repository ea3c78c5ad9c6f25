"""Splits: which images, which categories are base, and who may see which boxes.

A novel box reaches nobody who trains: `Split.base_boxes` is all that training and the cache read.
"""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from dkdetr.data.annotations import Annotations, Boxes, BoxTable, Category, ImageInfo
from dkdetr.data.annotations import read_annotations as read_annotation_file
from dkdetr.data.category_groups import check_groups, coco_categories, lvis_categories, ovcoco_categories
from dkdetr.data.image_files import ImageFolder, check_file_name
from dkdetr.errors import DataError, UsageError

Protocol = Literal["lvis", "coco", "ovcoco"]

PICTOGRAM_SIZES = ("tiny", "small", "full")
_KINDS: dict[str, Protocol] = {"coco": "coco", "ovcoco": "ovcoco", "lvis": "lvis"}
_GROUPERS = {"lvis": lvis_categories, "coco": coco_categories, "ovcoco": ovcoco_categories}
_HELD_OUT_WORDS = {"val", "valid", "validation", "minival", "test", "dev"}
_SHOWN = 20


@dataclass(frozen=True)
class _Source:
    """Where a split lies under the data root, and what it keeps of it."""

    protocol: Protocol
    image_root: str
    annotations: tuple[str, ...]
    is_train: bool
    all_images: bool = False
    is_lvis_v1: bool = False


def _lvis(is_train: bool, *files: str) -> _Source:
    places = tuple(f"{folder}{file}" for file in files for folder in ("lvis/", "lvis/annotations/"))
    return _Source("lvis", "coco", places, is_train, is_lvis_v1=True)


def _coco(protocol: Protocol, folder: str, is_train: bool, all_images: bool = False) -> _Source:
    places = (f"coco/annotations/instances_{folder}.json",)
    return _Source(protocol, f"coco/{folder}", places, is_train, all_images)


_SOURCES = {
    "lvis_train": _lvis(True, "lvis_v1_train.json"),
    "lvis_val": _lvis(False, "lvis_v1_val.json"),
    "lvis_minival": _lvis(
        False, "lvis_v1_minival.json", "lvis_v1_minival_inserted_image_name.json"
    ),
    "ovcoco_train": _coco("ovcoco", "train2017", True),
    "ovcoco_val": _coco("ovcoco", "val2017", False),
    "ovcoco_val5k": _coco("ovcoco", "val2017", False, all_images=True),
    "coco_train": _coco("coco", "train2017", True),
    "coco_val": _coco("coco", "val2017", False),
}


@dataclass(frozen=True, eq=False)
class Split:
    """A part of a data set under one protocol.

    `images` are sorted by id, `categories` by category id. `is_train` says that one may train on
    it. `notes` are remarks for the user on what reading the annotations had to put right.
    """

    name: str
    protocol: Protocol
    image_root: Path
    annotations_path: Path
    categories: tuple[Category, ...]
    images: tuple[ImageInfo, ...]
    is_train: bool
    notes: tuple[str, ...]
    box_table: BoxTable

    @property
    def folder(self) -> ImageFolder:
        """Finds the files of the images."""
        return ImageFolder(self.image_root, coco_layout=self.protocol == "lvis")

    def image_path(self, image: ImageInfo) -> Path:
        """Returns the path of an image's file; raises DataError if its name leaves the root."""
        return self.folder.path(image.file_name)

    @cached_property
    def _index_of(self) -> dict[int, int]:
        return {image.image_id: index for index, image in enumerate(self.images)}

    @cached_property
    def base_category_ids(self) -> frozenset[int]:
        """The ids of the categories whose boxes may be trained on."""
        return frozenset(each.category_id for each in self.categories if each.is_base)

    @cached_property
    def base_table(self) -> BoxTable:
        """The boxes of base categories that are no crowds, aligned with `images`."""
        is_base = np.isin(self.box_table.category_ids, sorted(self.base_category_ids))
        return self.box_table.keep_rows(is_base & ~self.box_table.is_crowd)

    def base_boxes(self, image_id: int) -> Boxes:
        """Returns the image's boxes of base categories, without crowds: what training may read."""
        return self.base_table.of_image(self._index_of[image_id])

    def all_boxes(self, image_id: int) -> Boxes:
        """Returns all boxes of the image, novel ones and crowds too: for scoring and reports."""
        return self.box_table.of_image(self._index_of[image_id])

    def require_images(self) -> None:
        """Raises DataError if image files are missing: their number and the first 20 names.

        Reads each folder once rather than asking for every file.
        """
        listings: dict[Path, set[str]] = {}
        missing: list[str] = []
        for image in self.images:
            check_file_name(image.file_name)
            paths = [root / name for root, name in self.folder.places(image.file_name)]
            if not any(path.name in _listing(path.parent, listings) for path in paths):
                missing.append(image.file_name)
        if missing:
            raise DataError(
                f"{self.name}: {len(missing):,} of {len(self.images):,} images are not under "
                f"{self.image_root}{self._hint(missing)}; first: {', '.join(missing[:_SHOWN])}"
            )

    def _hint(self, missing: list[str]) -> str:
        if self.protocol != "lvis" or self.is_train:
            return ""
        in_train = sum(name.startswith("train2017/") for name in missing)
        if not in_train:
            return ""
        return f" (about 15,000 of LVIS's val images are COCO train2017 files: {in_train:,} here)"


def _listing(folder: Path, known: dict[Path, set[str]]) -> set[str]:
    if folder not in known:
        try:
            with os.scandir(folder) as entries:
                known[folder] = {entry.name for entry in entries}
        except OSError:
            known[folder] = set()
    return known[folder]


def known_splits() -> tuple[str, ...]:
    """Returns every split name, the forms for a user's own folders last."""
    pictograms = [f"pictograms_{s}_{part}" for s in PICTOGRAM_SIZES for part in ("train", "val")]
    return (*_SOURCES, *pictograms, *(f"{kind}:IMAGES_DIR:ANNOTATIONS.json" for kind in _KINDS))


def list_splits(data_root: Path) -> dict[str, str]:
    """Returns every split that has a name of its own, with what is missing; '' if it is there.

    Looks for files and folders only; `load_split` reads and checks them.
    """
    found: dict[str, str] = {}
    for name in known_splits():
        if ":" in name:
            continue
        places, image_root = _places(name, data_root)
        missing: list[str] = []
        if not any(place.is_file() for place in places):
            missing.append(str(places[0]))
        if not image_root.is_dir():
            missing.append(f"{image_root}/")
        found[name] = f"no {' and no '.join(missing)}" if missing else ""
    return found


def _places(name: str, data_root: Path) -> tuple[list[Path], Path]:
    if name in _SOURCES:
        source = _SOURCES[name]
        return [data_root / file for file in source.annotations], data_root / source.image_root
    _, size, part = name.split("_")
    root = data_root / "pictograms" / size
    return [root / "annotations" / f"{part}.json"], root / "images" / part


def load_split(name: str, data_root: Path) -> Split:
    """Returns a split by its name.

    A user's own folder is `KIND:IMAGES_DIR:ANNOTATIONS.json`. It is for training unless the json
    file's name has the word val, test or dev in it and not `train`. OV-COCO files are grouped by the
    key `split` ("base" or "novel") of their categories, if they have it, else by COCO's names.

    Raises:
        UsageError: unknown name; lists the known ones.
        DataError: a folder or file is missing, or the annotations are malformed.
    """
    kind, colon, rest = name.partition(":")
    if colon:
        return _load_own(name, kind, rest)
    if name in _SOURCES:
        return _load_source(name, _SOURCES[name], data_root)
    size, _, part = name.removeprefix("pictograms_").rpartition("_")
    if name.startswith("pictograms_") and size in PICTOGRAM_SIZES and part in {"train", "val"}:
        return _load_pictograms(name, size, part, data_root)
    raise UsageError(f"unknown split '{name}'; known: {', '.join(known_splits())}")


def _load_source(name: str, source: _Source, data_root: Path) -> Split:
    places = [data_root / file for file in source.annotations]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        listed = " or ".join(str(place) for place in places)
        raise DataError(
            f"{name}: no {listed}; name the folder that holds coco/ and lvis/ with --data-root or "
            "DKDETR_DATA"
        )
    return _build(
        name, source.protocol, data_root / source.image_root, path,
        is_train=source.is_train, all_images=source.all_images, is_lvis_v1=source.is_lvis_v1,
    )  # fmt: skip


def _load_own(name: str, kind: str, rest: str) -> Split:
    folder, colon, file = rest.rpartition(":")
    protocol = _KINDS.get(kind)
    if protocol is None or not colon or not folder or not file:
        raise UsageError(
            f"'{name}' is no split; a folder of your own is KIND:IMAGES_DIR:ANNOTATIONS.json with "
            f"KIND one of {', '.join(_KINDS)}; known splits: {', '.join(known_splits())}"
        )
    return _build(name, protocol, Path(folder), Path(file), is_train=_means_training(file))


def _means_training(file: str) -> bool:
    stem = Path(file).stem.lower()
    return "train" in stem or not _HELD_OUT_WORDS & set(re.findall("[a-z]+", stem))


def _load_pictograms(name: str, size: str, part: str, data_root: Path) -> Split:
    root = data_root / "pictograms" / size
    described = root / "dataset.json"
    remedy = f"run `dkdetr data prepare pictograms --size {size}`"
    try:
        table = orjson.loads(described.read_bytes())
    except OSError:
        raise DataError(f"{name}: no {described}; {remedy}") from None
    except orjson.JSONDecodeError as error:
        raise DataError(f"{described} is not JSON ({error}); {remedy} again") from None
    stated = table.get("protocol") if isinstance(table, dict) else None
    protocol = _KINDS.get(str(stated))
    if protocol is None or protocol == "coco":
        raise DataError(f"{described}: protocol {stated!r} is neither 'lvis' nor 'ovcoco'")
    return _build(
        name, protocol, root / "images" / part, root / "annotations" / f"{part}.json",
        is_train=part == "train",
    )  # fmt: skip


def _build(
    name: str, protocol: Protocol, image_root: Path, path: Path,
    *, is_train: bool, all_images: bool = False, is_lvis_v1: bool = False,
) -> Split:  # fmt: skip
    if not image_root.is_dir():
        raise DataError(f"{name}: no image folder {image_root}")
    style = "lvis" if protocol == "lvis" else "coco"
    annotations = read_annotation_file(path, style=style)
    grouped = _GROUPERS[protocol](annotations.category_records, path)
    check_groups(name, grouped, path, is_lvis_v1=is_lvis_v1)
    images, boxes = _keep_images(annotations, grouped, protocol, is_train, all_images)
    if not images:
        raise DataError(f"{name}: no image of {path} holds an object of the split's categories")
    return Split(
        name=name,
        protocol=protocol,
        image_root=image_root,
        annotations_path=path,
        categories=grouped,
        images=images,
        is_train=is_train,
        notes=annotations.notes,
        box_table=boxes,
    )


def _keep_images(
    annotations: Annotations, categories: tuple[Category, ...], protocol: Protocol,
    is_train: bool, all_images: bool,
) -> tuple[tuple[ImageInfo, ...], BoxTable]:  # fmt: skip
    """Returns the split's images and boxes: OV-COCO leaves out images without its objects.

    It trains on images with a base object and scores on those with a base or novel one (crowds
    count), as its published files do; `val5k` keeps all.
    """
    known = [each.category_id for each in categories]
    table = annotations.boxes.keep_rows(np.isin(annotations.boxes.category_ids, known))
    if protocol != "ovcoco" or all_images:
        return annotations.images, table
    wanted = [each.category_id for each in categories if each.is_base or not is_train]
    counts = np.diff(table.keep_rows(np.isin(table.category_ids, wanted)).offsets)
    images = tuple(i for i, count in zip(annotations.images, counts, strict=True) if count)
    return images, table.keep_images(counts > 0)
