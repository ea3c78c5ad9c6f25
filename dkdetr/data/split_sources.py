"""Where each named split lies under the data root, and what the names of one's own mean."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dkdetr.data.image_files import FolderLayout
from dkdetr.data.voc import voc_list_file, voc_root
from dkdetr.errors import DataError, UsageError

Protocol = Literal["lvis", "coco", "ovcoco", "voc"]

PICTOGRAMS: dict[str, tuple[str, str]] = {
    f"pictograms_{size}_{part}": (size, part)
    for size in ("tiny", "small", "full", "full70")
    for part in ("train", "val", "held")
    if (size, part) != ("tiny", "held")
}
"""Size and part of the embedded data set's splits; `held` shows drawings in a style of its own."""
KINDS: dict[str, Protocol] = {"coco": "coco", "ovcoco": "ovcoco", "lvis": "lvis"}
_HELD_OUT_WORDS = {"val", "valid", "validation", "minival", "test", "dev"}
_PART_WORDS = {"train", "training", *_HELD_OUT_WORDS} - {"dev"}
_PART_FOLDER = re.compile(rf"({'|'.join(sorted(_PART_WORDS))})[-_]?\d*")
"""A whole folder's name: `valid`, `val2017`; `test_of_mine` and `dev` may hold anything."""
_INNER_FOLDERS = {"annotations", "labels"}


@dataclass(frozen=True)
class Source:
    """Where a split lies under the data root, and what it keeps of it.

    `num_categories` is 0 where any number will do; `absent` are images that the annotations have
    and the published archives do not.
    """

    protocol: Protocol
    image_root: str
    annotations: tuple[str, ...]
    is_train: bool
    all_images: bool = False
    is_lvis_v1: bool = False
    layout: FolderLayout = "plain"
    num_categories: int = 0
    absent: tuple[str, ...] = ()


def _lvis(is_train: bool, *files: str) -> Source:
    places = tuple(f"{folder}{file}" for file in files for folder in ("lvis/", "lvis/annotations/"))
    return Source("lvis", "coco", places, is_train, is_lvis_v1=True, layout="coco")


def _coco(protocol: Protocol, folder: str, is_train: bool, all_images: bool = False) -> Source:
    places = (f"coco/annotations/instances_{folder}.json",)
    return Source(protocol, f"coco/{folder}", places, is_train, all_images)


SOURCES = {
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
    "objects365_val": Source(
        "coco",
        "objects365/val",
        ("objects365/annotations/zhiyuan_objv2_val.json", "objects365/zhiyuan_objv2_val.json"),
        is_train=False,
        layout="patches",
        num_categories=365,
        absent=(
            "patch16/objects365_v2_00908726.jpg",
            "patch6/objects365_v1_00320532.jpg",
            "patch6/objects365_v1_00320534.jpg",
        ),
    ),
    "voc2007_test": Source(
        "voc",
        "VOCdevkit/VOC2007/JPEGImages",
        ("VOCdevkit/VOC2007/ImageSets/Main/test.txt",),
        is_train=False,
    ),
}


@dataclass(frozen=True)
class OwnSplit:
    """What a name `KIND:FOLDER:FILE` says."""

    protocol: Protocol
    image_root: Path
    annotations: Path
    is_train: bool
    layout: FolderLayout


def known_splits() -> tuple[str, ...]:
    """Returns every split name, the forms for a user's own folders last."""
    own = [f"{kind}:IMAGES_DIR:ANNOTATIONS.json" for kind in KINDS]
    return (*SOURCES, *PICTOGRAMS, *own, "voc:VOCDEVKIT_DIR:LIST")


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
    if name in SOURCES:
        source = SOURCES[name]
        return [data_root / file for file in source.annotations], data_root / source.image_root
    size, part = PICTOGRAMS[name]
    root = data_root / "pictograms" / size
    return [root / "annotations" / f"{part}.json"], root / "images" / part


def source_annotations(name: str, data_root: Path) -> Path:
    """Returns the annotation file of a split of `SOURCES`; raises DataError if it is not there."""
    places = [data_root / file for file in SOURCES[name].annotations]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        listed = " or ".join(str(place) for place in places)
        raise DataError(
            f"{name}: no {listed}; name the folder that holds coco/, lvis/, objects365/ and "
            "VOCdevkit/ with --data-root or DKDETR_DATA"
        )
    return path


def own_split(name: str) -> OwnSplit:
    """Returns what the name of a user's own split says; raises UsageError if it says nothing.

    It is for training unless the file's name has the word val, test or dev in it and not `train`.
    Where the name has none of these words, its folder's says it (`valid/_annotations.coco.json`),
    or that of the one above `annotations` (`val/annotations/instances_default.json`); not for
    VOC's lists.
    """
    kind, _, rest = name.partition(":")
    folder, colon, file = rest.rpartition(":")
    protocol = KINDS.get(kind)
    if not colon or not folder or not file or (protocol is None and kind != "voc"):
        raise UsageError(
            f"'{name}' is no split; a folder of your own is KIND:IMAGES_DIR:ANNOTATIONS.json with "
            f"KIND one of {', '.join(KINDS)}, or voc:VOCDEVKIT_DIR:LIST; known splits: "
            f"{', '.join(known_splits())}"
        )
    if protocol is None:
        listed = voc_list_file(Path(folder), file)
        images = voc_root(listed) / "JPEGImages"
        return OwnSplit("voc", images, listed, _word_of(file) != "held out", "plain")
    layout: FolderLayout = "coco" if protocol == "lvis" else "plain"
    return OwnSplit(protocol, Path(folder), Path(file), _means_training(file), layout)


def _means_training(file: str) -> bool:
    """Returns what the nearest word says, the file's own or its folder's.

    A folder that is called for holding annotations leaves the word to the one above it.
    """
    # Absolute: the same split, named from another folder, is the same.
    folder = Path(file).absolute().parent
    if folder.name.lower() in _INNER_FOLDERS:
        folder = folder.parent
    named = _PART_FOLDER.fullmatch(folder.name.lower())
    return (_word_of(file) or _word_of(named[1] if named else "")) != "held out"


def _word_of(file: str) -> Literal["train", "held out"] | None:
    """Returns what a file's name says of its part; None: nothing."""
    stem = Path(file).stem.lower()
    if "train" in stem:
        return "train"
    return "held out" if _HELD_OUT_WORDS & set(re.findall("[a-z]+", stem)) else None
