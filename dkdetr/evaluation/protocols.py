"""What the benchmarks average: their groups, their keys and their limits (method D)."""

from collections.abc import Mapping

from dkdetr.evaluation.ground_truth import Protocol, ScoredCategory

MAX_DETECTIONS_PER_IMAGE = 300
"""LVIS: over all categories of an image."""
MAX_DETECTIONS_PER_CLASS = 100
"""COCO: of one category in one image."""

OVERALL_KEYS: tuple[str, ...] = ("AP", "AP50", "AP75", "APs", "APm", "APl")

_FREQUENCY_NAMES = {"r": "rare", "c": "common", "f": "frequent"}


def group_of(protocol: Protocol, category: ScoredCategory) -> str:
    """Returns the group a category is reported in: a frequency, novel or base, or '' for COCO."""
    if protocol == "lvis":
        return _FREQUENCY_NAMES.get(category.frequency, "")
    if protocol == "ovcoco":
        return "base" if category.is_base else "novel"
    return ""


GROUP_KEYS: Mapping[Protocol, Mapping[str, str]] = {
    "lvis": {"APr": "rare", "APc": "common", "APf": "frequent"},
    "coco": {},
    "ovcoco": {"AP50_novel": "novel", "AP50_base": "base", "AP50_all": "all"},
}
"""By protocol: the key of each group's number; AP50 where the key says so, else AP."""


def metric_keys(protocol: Protocol) -> tuple[str, ...]:
    """Returns the keys of a protocol's numbers, in the order tables show them."""
    return (*OVERALL_KEYS, *GROUP_KEYS[protocol])
