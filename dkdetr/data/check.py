"""What a split holds, in numbers, and everything that is wrong with it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dkdetr.data.annotations import ImageInfo
from dkdetr.data.image_files import ALLOW_LINKS, check_file_name, links_allowed
from dkdetr.data.picture_faults import check_pictures
from dkdetr.data.problems import Problem, Problems
from dkdetr.data.prompts import same_reading
from dkdetr.data.splits import Split, load_split
from dkdetr.errors import DataError


@dataclass(frozen=True)
class GroupCount:
    """A group of categories: how many of them there are, how many have boxes, and the boxes.

    `group` is base or novel, or in LVIS f, c or r. Crowds are not counted.
    """

    group: str
    num_categories: int
    num_categories_with_boxes: int
    num_boxes: int


@dataclass(frozen=True)
class SplitSummary:
    """The numbers of a split; `num_trainable_images` have a base box."""

    name: str
    protocol: str
    is_train: bool
    num_images: int
    num_trainable_images: int
    num_crowds: int
    groups: tuple[GroupCount, ...]
    notes: tuple[str, ...]

    @property
    def num_base_categories(self) -> int:
        """Categories that one may train on: 866 in LVIS v1."""
        return sum(each.num_categories for each in self.groups if each.group not in ("r", "novel"))

    def lines(self) -> list[str]:
        """Returns the numbers as a person reads them."""
        use = "for training" if self.is_train else "for scoring"
        total = sum(each.num_categories for each in self.groups)
        base = self.num_base_categories
        text = [
            f"{self.name}: {self.protocol} protocol, {use}, {self.num_images:,} images, "
            f"{self.num_trainable_images:,} with a base box, {self.num_crowds:,} crowd boxes",
            f"{base:,} base and {total - base:,} novel categories, {total:,} in all",
        ]
        text += [
            f"{each.group:6s} {each.num_categories:,} categories, "
            f"{each.num_categories_with_boxes:,} of them with boxes, {each.num_boxes:,} boxes"
            for each in self.groups
        ]
        return text + [f"note: {note}" for note in self.notes]


@dataclass(frozen=True)
class SplitReport:
    """What `data check` found: numbers of what could be read, errors, and mere oddities.

    `summary` is None where too little could be read. `pictures` says in words how closely they
    were looked at; nothing where they were not.
    """

    name: str
    summary: SplitSummary | None
    errors: tuple[Problem, ...]
    oddities: tuple[Problem, ...]
    pictures: str = ""

    def lines(self) -> list[str]:
        """Returns the report as a person reads it."""
        text = [] if self.summary is None else self.summary.lines()
        text += [f"pictures: {self.pictures}"] if self.pictures else []
        text += [f"odd: {each}" for each in self.oddities]
        return text + [f"error: {each}" for each in self.errors]

    def as_json(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        table = {} if self.summary is None else asdict(self.summary)
        return table | {
            "name": self.name,
            "pictures": self.pictures,
            "errors": [each.as_json() for each in self.errors],
            "oddities": [each.as_json() for each in self.oddities],
        }

    def raise_problems(self) -> None:
        """Raises DataError if the split cannot be used as it is."""
        if self.errors:
            total = sum(each.total for each in self.errors)
            more = any(each.total > len(each.first) for each in self.errors)
            rest = " (all of them by --json FILE)" if more else ""
            raise DataError(
                f"{self.name}: {total:,} faults of {len(self.errors)} kinds, named above{rest}: "
                "neither training nor scoring will read it"
            )


def check_split(name: str, data_root: Path, *, decode: bool = False) -> SplitReport:
    """Returns everything that is wrong with a split, and the numbers of what is not.

    Args:
        name: the split.
        data_root: where the named ones lie.
        decode: decodes every picture, too (`check_pictures`).

    Raises:
        UsageError: there is no such split.
        DataError: there is no such file.
    """
    problems = Problems(name)
    try:
        split = load_split(name, data_root, problems)
    except DataError as error:
        if not problems.found:
            raise
        problems.add("the split", str(error), [name])
        return SplitReport(name, None, tuple(problems.found), ())
    odd = Problems(name)
    pictures = _check_files(split, problems, odd, decode=decode)
    _note_oddities(split, odd)
    found, oddities = tuple(problems.found), tuple(odd.found)
    return SplitReport(name, count_split(split), found, oddities, pictures)


def count_split(split: Split) -> SplitSummary:
    """Returns the counts of a split."""
    crowd = split.box_table.is_crowd
    group_of = {
        each.category_id: each.frequency or ("base" if each.is_base else "novel")
        for each in split.categories
    }
    ids, counts = np.unique(split.box_table.category_ids[~crowd], return_counts=True)
    boxes_of = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    groups: list[GroupCount] = []
    for group in ("f", "c", "r", "base", "novel"):
        mine = [category_id for category_id, its in group_of.items() if its == group]
        if mine:
            boxes = [boxes_of.get(category_id, 0) for category_id in mine]
            groups.append(GroupCount(group, len(mine), sum(map(bool, boxes)), sum(boxes)))
    return SplitSummary(
        name=split.name,
        protocol=split.protocol,
        is_train=split.is_train,
        num_images=len(split.images),
        num_trainable_images=int((np.diff(split.base_table.offsets) > 0).sum()),
        num_crowds=int(crowd.sum()),
        groups=tuple(groups),
        notes=split.notes,
    )


def _check_files(split: Split, problems: Problems, odd: Problems, *, decode: bool) -> str:
    """Returns what of the pictures was looked at, in words."""
    refused: list[str] = []
    for image in split.images:
        try:
            check_file_name(image.file_name)
        except DataError:
            refused.append(f"{image.file_name[:100]!r} (id {image.image_id})")
    problems.add("/images", "file_name leads out of the image folder", refused)
    if refused:
        return ""
    missing = split.missing_images()
    if missing:
        roots = dict.fromkeys(str(root) for root, _ in split.folder.places(missing[0].file_name))
        problems.add(
            "image files", f"missing (looked for under {', '.join(roots)})", _named(missing)
        )
    gone = {image.image_id for image in missing}
    there = [image for image in split.images if image.image_id not in gone]
    outside = [image for image in there if split.folder.leads_out(image.file_name)]
    why = "reached through a link that leaves the folder"
    if links_allowed():
        odd.add("image files", f"{why}, which is followed", _named(outside))
    else:
        left_out = {image.image_id for image in outside}
        there = [image for image in there if image.image_id not in left_out]
        problems.add("image files", f"{why}: {ALLOW_LINKS}=1 follows it", _named(outside))
    return check_pictures(split, there, problems, decode=decode)


def _note_oddities(split: Split, odd: Problems) -> None:
    """Notes what can be meant but rarely is; nothing of it stops anyone."""
    files = Counter(image.file_name for image in split.images)
    odd.add("/images", "file_name shared by images", [f for f, n in files.items() if n > 1])
    groups = same_reading(each.name for each in split.categories)
    clashes = [" = ".join(map(repr, names)) for names in groups]
    odd.add("/categories", "names that read the same", clashes)
    table = split.box_table
    image_of = table.image_of_row()
    columns = np.column_stack((image_of, table.category_ids, table.boxes_xyxy))
    _, first, counts = np.unique(columns, axis=0, return_index=True, return_counts=True)
    twice = Counter(split.images[image_of[row]].image_id for row in np.sort(first[counts > 1]))
    odd.add("/annotations", "the same box of the same category twice; image ids", _ids(twice))
    known = {each.category_id for each in split.categories}
    both: list[int] = []
    strange: list[int] = []
    for index, image in enumerate(split.images):
        negative = set(image.neg_category_ids)
        if negative & set(table.of_image(index).category_ids.tolist()):
            both.append(image.image_id)
        if (negative | set(image.not_exhaustive_category_ids)) - known:
            strange.append(image.image_id)
    odd.add("/images", "a category is in neg_category_ids and has a box; image ids", _ids(both))
    odd.add("/images", "federated lists name categories that do not exist; ids", _ids(strange))


def _named(images: Iterable[ImageInfo]) -> list[str]:
    return [f"{image.file_name} (id {image.image_id})" for image in images]


def _ids(ids: Iterable[int]) -> list[str]:
    return [str(each) for each in ids]
