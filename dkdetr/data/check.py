"""What a split holds, in numbers."""

from dataclasses import dataclass

import numpy as np

from dkdetr.data.splits import Split


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

    def lines(self) -> list[str]:
        """Returns the numbers as a person reads them."""
        use = "for training" if self.is_train else "for scoring"
        text = [
            f"{self.name}: {self.protocol} protocol, {use}, {self.num_images:,} images, "
            f"{self.num_trainable_images:,} with a base box, {self.num_crowds:,} crowd boxes"
        ]
        text += [
            f"{each.group:6s} {each.num_categories:,} categories, "
            f"{each.num_categories_with_boxes:,} of them with boxes, {each.num_boxes:,} boxes"
            for each in self.groups
        ]
        return text + [f"note: {note}" for note in self.notes]


def summarise_split(split: Split) -> SplitSummary:
    """Returns the counts of a split, after making sure that every image file is there.

    Raises:
        DataError: image files are missing.
    """
    split.require_images()
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
