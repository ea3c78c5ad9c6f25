"""Derived annotation files that other projects' tools ask for; ours derive them while reading.

They are written below the data root under names of their own. No file that is there is ever
changed: a derived one that already exists must have been made by the same rule, or is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from dkdetr.atomic_file import atomic_file
from dkdetr.data.annotation_file import OutlinedFile, parse_outlined_file
from dkdetr.data.split_sources import source_annotations
from dkdetr.data.splits import Split, load_split
from dkdetr.errors import DataError, UsageError

_RECORDS_AT_ONCE = 10_000


@dataclass(frozen=True)
class _Derived:
    split: str
    """Whose images are kept."""
    suffix: str
    """Of the file's name, behind that of the file it is made from."""
    only_base: bool
    all_categories: bool


_DERIVED: dict[str, tuple[_Derived, ...]] = {
    "lvis": (_Derived("lvis_train", "_norare", only_base=True, all_categories=True),),
    "ovcoco": (
        _Derived("ovcoco_train", "_seen_2", only_base=True, all_categories=False),
        _Derived("ovcoco_val", "_all_2", only_base=False, all_categories=False),
    ),
}
PREPARED = tuple(_DERIVED)


@dataclass(frozen=True)
class PreparedFile:
    """A derived file and what it holds."""

    path: Path
    num_images: int
    num_annotations: int
    was_there: bool

    def __str__(self) -> str:
        """The file in a line."""
        how = "was there already" if self.was_there else "written"
        return (
            f"{self.path}: {how}, {self.num_images:,} images, {self.num_annotations:,} annotations"
        )


def prepare_derived(
    name: str, data_root: Path, say: Callable[[str], None]
) -> tuple[PreparedFile, ...]:
    """Returns the derived files of `lvis` or `ovcoco`, made where they are not there yet.

    `lvis`: lvis_v1_train_norare.json, all images and categories, no rare boxes. `ovcoco`:
    instances_train2017_seen_2.json (base boxes, images that have one) and
    instances_val2017_all_2.json (the 65 names, the images that show one), as the field names them.

    Raises:
        UsageError: no such name.
        DataError: the data set is missing or bad, or another file has the derived one's name.
    """
    if name not in _DERIVED:
        raise UsageError(f"data prepare {name}: choose one of {', '.join(PREPARED)}")
    made: list[PreparedFile] = []
    for each in _DERIVED[name]:
        source = source_annotations(each.split, data_root)
        say(f"reading {source}")
        split = load_split(each.split, data_root)
        file = _derive(parse_outlined_file(source), split, each)
        target = source.with_name(f"{source.stem}{each.suffix}.json")
        was_there = _write(target, file)
        counts = len(file.document["images"]), len(file.document["annotations"])
        made.append(PreparedFile(target, *counts, was_there))
    return tuple(made)


def _derive(file: OutlinedFile, split: Split, rule: _Derived) -> OutlinedFile:
    document = file.document
    images = {image.image_id for image in split.images}
    known = {each.category_id for each in split.categories}
    kept = split.base_category_ids if rule.only_base else known
    own = known if not rule.all_categories else {each["id"] for each in document["categories"]}
    derived = document | {
        "images": [each for each in document["images"] if each["id"] in images],
        "categories": [each for each in document["categories"] if each["id"] in own],
        "annotations": [
            each
            for each in document["annotations"]
            if each["image_id"] in images and each["category_id"] in kept
        ],
    }
    return replace(file, document=derived)


def _content(file: OutlinedFile) -> Iterator[bytes]:
    head = {key: value for key, value in file.document.items() if key != "annotations"}
    yield orjson.dumps(head)[:-1] + b',"annotations":['
    records = file.document["annotations"]
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        chunk = records[start : start + _RECORDS_AT_ONCE]
        yield (b"," if start else b"") + b",".join(map(file.record_text, chunk))
    yield b"]}"


def _write(target: Path, file: OutlinedFile) -> bool:
    """Returns whether the very same file was there; writes it if there is none."""
    if not target.exists():
        with atomic_file(target, large=True) as out:
            for piece in _content(file):
                out.write(piece)
        return False
    try:
        with target.open("rb") as there:
            is_same = all(there.read(len(piece)) == piece for piece in _content(file))
            is_same = is_same and not there.read(1)
    except OSError as error:
        raise DataError(f"cannot read {target}: {error.strerror}") from None
    if not is_same:
        raise DataError(
            f"{target} is there and holds something else; it stays as it is: move it away to have "
            "it made anew"
        )
    return True
