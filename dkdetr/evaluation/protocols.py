"""What the benchmarks average: their groups, their keys and their limits (method D)."""

from collections.abc import Iterable, Mapping
from typing import Literal

from dkdetr.data.annotations import Category
from dkdetr.data.split_sources import Protocol

IouType = Literal["bbox", "segm"]
"""What overlaps: boxes or masks."""
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")

MAX_DETECTIONS_PER_IMAGE = 300
"""LVIS: over all categories of an image."""
MAX_DETECTIONS_PER_CLASS = 100
"""COCO: of one category in one image."""

MASK_PREFIX = "segm."
"""Before the keys of masks."""
VOC_KEYS: tuple[str, ...] = ("AP50", "AP75")
OVERALL_KEYS: tuple[str, ...] = ("AP", "AP50", "AP75", "APs", "APm", "APl")

_GROUP_ORDER = ("rare", "novel", "common", "base", "frequent")
_FREQUENCY_NAMES = {"r": "rare", "c": "common", "f": "frequent"}


def group_of(protocol: Protocol, category: Category) -> str:
    """Returns the group a category is reported in: a frequency, novel or base, else ''."""
    if protocol == "lvis":
        return _FREQUENCY_NAMES.get(category.frequency, "")
    if protocol == "ovcoco":
        return "base" if category.is_base else "novel"
    return ""


def in_group_order(groups: Iterable[str]) -> list[str]:
    """Returns the different groups, those of interest first; unknown ones last, by name."""
    places = {group: place for place, group in enumerate(_GROUP_ORDER)}
    return sorted(set(groups), key=lambda group: (places.get(group, len(places)), group))


GROUP_KEYS: Mapping[Protocol, Mapping[str, str]] = {
    "lvis": {"APr": "rare", "APc": "common", "APf": "frequent"},
    "coco": {},
    "ovcoco": {"AP50_novel": "novel", "AP50_base": "base", "AP50_all": "all"},
    "voc": {},
}
"""By protocol: the key of each group's number; AP50 where the key says so, else AP."""


_MEANINGS = {
    "AP": "all categories, IoU .50 to .95",
    "AP50": "IoU .50",
    "AP75": "IoU .75",
    "APs": "small objects",
    "APm": "medium objects",
    "APl": "large objects",
    "APr": "rare = novel, never annotated in training",
    "APc": "common",
    "APf": "frequent",
    "AP50_novel": "novel, never annotated in training",
    "AP50_base": "base",
    "AP50_all": "novel and base together",
}


def metric_meaning(key: str) -> str:
    """Returns a metric in words."""
    is_mask = key.startswith(MASK_PREFIX)
    meaning = _MEANINGS[key.removeprefix(MASK_PREFIX)]
    return f"masks: {meaning}" if is_mask else meaning
