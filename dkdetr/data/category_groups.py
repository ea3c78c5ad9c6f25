"""Which categories of an annotation file are base, by each protocol's rule."""

from collections import Counter
from pathlib import Path
from typing import Any

from dkdetr.data.annotations import Category
from dkdetr.data.coco_names import OVCOCO_BASE, OVCOCO_NOVEL
from dkdetr.errors import DataError

LVIS_V1_GROUPS = {"f": 405, "c": 461, "r": 337}
"""Categories of LVIS v1 by frequency: 866 base, 337 novel."""
_SHOWN = 20

Records = tuple[dict[str, Any], ...]


def lvis_categories(records: Records, path: Path) -> tuple[Category, ...]:
    """Returns LVIS's categories: the rare ones are novel.

    Raises:
        DataError: a category has no frequency.
    """
    bad = [record["id"] for record in records if record.get("frequency") not in ("r", "c", "f")]
    if bad:
        raise DataError(
            f"{path}: {len(bad)} categories have no LVIS frequency r, c or f; first ids: "
            f"{', '.join(map(str, bad[:_SHOWN]))}. A file without them is a coco: split"
        )
    return tuple(
        Category(record["id"], record["name"], record["frequency"], record["frequency"] != "r")
        for record in records
    )


def coco_categories(records: Records, _path: Path) -> tuple[Category, ...]:
    """Returns all categories as base: plain COCO hides nothing."""
    return tuple(Category(record["id"], record["name"], "", is_base=True) for record in records)


def ovcoco_categories(records: Records, path: Path) -> tuple[Category, ...]:
    """Returns the base and novel categories; of COCO's own file the 48 and 17 of OV-COCO.

    Where categories have the key `split` ("base" or "novel"), that decides for all of them.

    Raises:
        DataError: the key has another value, or without it a name of OV-COCO is missing.
    """
    if any("split" in record for record in records):
        bad = [record["id"] for record in records if record.get("split") not in ("base", "novel")]
        if bad:
            raise DataError(
                f'{path}: {len(bad)} categories lack "split": "base" or "novel"; first ids: '
                f"{', '.join(map(str, bad[:_SHOWN]))}"
            )
        groups = {record["name"]: record["split"] == "base" for record in records}
    else:
        groups = {**dict.fromkeys(OVCOCO_BASE, True), **dict.fromkeys(OVCOCO_NOVEL, False)}
        missing = sorted(groups.keys() - {record["name"] for record in records})
        if missing:
            raise DataError(
                f"{path} lacks {len(missing)} of the 65 names of OV-COCO: "
                f"{', '.join(missing[:_SHOWN])}; for names of your own give each category "
                'the key "split": "base" or "novel"'
            )
    return tuple(
        Category(record["id"], record["name"], "", groups[record["name"]])
        for record in records
        if record["name"] in groups
    )


def check_groups(
    name: str, categories: tuple[Category, ...], path: Path, *, is_lvis_v1: bool
) -> None:
    """Raises DataError if names repeat, none is base, or a file of LVIS v1's name is another."""
    twice = [name for name, n in Counter(each.name for each in categories).items() if n > 1]
    if twice:
        raise DataError(f"{path}: categories share a name: {', '.join(twice[:_SHOWN])}")
    if not any(each.is_base for each in categories):
        raise DataError(f"{path}: not one of the {len(categories)} categories is a base category")
    groups = {key: sum(each.frequency == key for each in categories) for key in LVIS_V1_GROUPS}
    if is_lvis_v1 and groups != LVIS_V1_GROUPS:
        raise DataError(
            f"{name}: {path} has {groups} categories by frequency, LVIS v1 has {LVIS_V1_GROUPS} "
            "(866 base, 337 novel): another version, or rare categories were removed from its "
            "table; for files of your own use lvis:IMAGES_DIR:ANNOTATIONS.json"
        )
