"""Splits: which images, which categories are base, and who may see which boxes.

A novel box reaches nobody who trains: `Split.base_boxes` is all that training and the cache read.
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson
from jaxtyping import UInt8

from dkdetr.data.annotations import (
    Annotations,
    Boxes,
    BoxTable,
    Category,
    ImageInfo,
    read_annotations,
)
from dkdetr.data.category_groups import (
    check_groups,
    coco_categories,
    lvis_categories,
    ovcoco_categories,
)
from dkdetr.data.image_files import (
    FolderLayout,
    ImageFolder,
    check_file_name,
    links_allowed,
    read_image,
    say_links_are_followed,
)
from dkdetr.data.problems import Problems
from dkdetr.data.split_sources import (
    KINDS,
    PICTOGRAMS,
    SOURCES,
    OwnSplit,
    Protocol,
    Source,
    known_splits,
    own_split,
    source_annotations,
)
from dkdetr.data.voc import read_voc
from dkdetr.errors import DataError, UsageError

_GROUPERS = {
    "lvis": lvis_categories,
    "coco": coco_categories,
    "ovcoco": ovcoco_categories,
    "voc": coco_categories,
}
_SHOWN = 20


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
    layout: FolderLayout = "plain"

    @property
    def folder(self) -> ImageFolder:
        """Finds the files of the images."""
        return ImageFolder(self.image_root, self.layout)

    def image_path(self, image: ImageInfo) -> Path:
        """Returns the path of an image's file; raises DataError if its name leaves the root."""
        return self.folder.path(image.file_name)

    def image_of(self, image_id: int) -> ImageInfo:
        """Returns what the annotations say of an image; raises KeyError."""
        return self.images[self._index_of[image_id]]

    def read(self, image: ImageInfo) -> UInt8[np.ndarray, "height width 3"]:
        """Returns an image's pixels; raises as `read_image`."""
        return read_image(self.image_path(image), expected_hw=(image.height, image.width))

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

    def missing_images(self) -> list[ImageInfo]:
        """Returns the images whose files are not there; reads each folder once.

        Raises:
            DataError: a name leaves the image root.
        """
        listings: dict[Path, set[str]] = {}
        missing: list[ImageInfo] = []
        for image in self.images:
            check_file_name(image.file_name)
            paths = [root / name for root, name in self.folder.places(image.file_name)]
            if not any(path.name in _listing(path.parent, listings) for path in paths):
                missing.append(image)
        return missing

    def require_images(self) -> None:
        """Raises DataError if image files are missing: number, first 20, where they belong."""
        missing = [image.file_name for image in self.missing_images()]
        if missing:
            places = [str(root / name) for root, name in self.folder.places(missing[0])]
            raise DataError(
                f"{self.name}: {len(missing):,} of {len(self.images):,} images are not under "
                f"{self.image_root}{self._hint(missing)}; first: {', '.join(missing[:_SHOWN])}; "
                f"the first was looked for as {' and '.join(places)}"
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


def load_split(name: str, data_root: Path, problems: Problems | None = None) -> Split:
    """Returns a split by its name.

    A user's own folder is `KIND:IMAGES_DIR:ANNOTATIONS.json` or `voc:VOCDEVKIT_DIR:LIST`. It is for
    training unless the file's name has the word val, test or dev in it and not `train`, or a folder
    above says so of a file whose name does not (`split_sources.own_split`). OV-COCO files are
    grouped by the key `split` ("base" or "novel") of their categories, if they have it, else by
    COCO's names.

    Args:
        name: the split.
        data_root: where the named ones lie.
        problems: takes up bad records, which are left out; without it they are an error.

    Raises:
        UsageError: unknown name; lists the known ones.
        DataError: a folder or file is missing, or the annotations are malformed.
    """
    if ":" in name:
        own: OwnSplit = own_split(name)
        return _build(
            name, own.protocol, own.image_root, own.annotations, problems,
            is_train=own.is_train, layout=own.layout,
        )  # fmt: skip
    if name in SOURCES:
        return _load_source(name, SOURCES[name], data_root, problems)
    if name in PICTOGRAMS:
        return _load_pictograms(name, *PICTOGRAMS[name], data_root, problems)
    raise UsageError(f"unknown split '{name}'; known: {', '.join(known_splits())}")


def _load_source(name: str, source: Source, data_root: Path, problems: Problems | None) -> Split:
    path = source_annotations(name, data_root)
    split = _build(
        name, source.protocol, data_root / source.image_root, path, problems,
        is_train=source.is_train, all_images=source.all_images, is_lvis_v1=source.is_lvis_v1,
        layout=source.layout,
    )  # fmt: skip
    if source.num_categories not in (0, len(split.categories)):
        raise DataError(
            f"{name}: {path} has {len(split.categories)} categories, not {source.num_categories}: "
            "another version; for files of your own use coco:IMAGES_DIR:ANNOTATIONS.json"
        )
    return _without_absent(split, source.absent)


def _without_absent(split: Split, absent: tuple[str, ...]) -> Split:
    """Returns the split without the images that its published archives lack."""
    there = [not image.file_name.endswith(absent) for image in split.images] if absent else []
    if not absent or all(there):
        return split
    gone = there.count(False)
    return replace(
        split,
        images=tuple(i for i, is_there in zip(split.images, there, strict=True) if is_there),
        box_table=split.box_table.keep_images(np.array(there)),
        notes=(*split.notes, f"{gone} images left out that the published archives do not have"),
    )


def _load_pictograms(
    name: str, size: str, part: str, data_root: Path, problems: Problems | None
) -> Split:
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
    protocol = KINDS.get(str(stated))
    if protocol is None or protocol == "coco":
        raise DataError(f"{described}: protocol {stated!r} is neither 'lvis' nor 'ovcoco'")
    return _build(
        name, protocol, root / "images" / part, root / "annotations" / f"{part}.json", problems,
        is_train=part == "train", layout="coco" if protocol == "lvis" else "plain",
    )  # fmt: skip


def _build(
    name: str, protocol: Protocol, image_root: Path, path: Path, problems: Problems | None,
    *, is_train: bool, all_images: bool = False, is_lvis_v1: bool = False,
    layout: FolderLayout = "plain",
) -> Split:  # fmt: skip
    if not image_root.is_dir():
        raise DataError(f"{name}: no image folder {image_root}")
    if links_allowed():
        say_links_are_followed()
    if protocol == "voc":
        annotations = read_voc(path, problems)
    else:
        style = "lvis" if protocol == "lvis" else "coco"
        annotations = read_annotations(path, style=style, problems=problems)
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
        layout=layout,
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
