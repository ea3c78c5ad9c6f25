"""Names of data sets put right: misspelled, glued together or cut off in the published files.

The names as published are the default, since the papers' numbers were made with them; the clean
ones describe the same categories in words that a text encoder has read before.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from dkdetr.data.splits import Split

_OBJECTS365 = {
    "Bakset": "Basket",
    "Ballon": "Balloon",
    "Billards": "Billiards",
    "Buttefly": "Butterfly",
    "Campel": "Camel",
    "Canned": "Canned food",
    "Dinning Table": "Dining table",
    "Extention Cord": "Extension cord",
    "Formula 1": "Formula 1 car",
    "French": "French horn",
    "Hamimelon": "Hami melon",
    "Head Phone": "Headphone",
    "Hotair ballon": "Hot air balloon",
    "Meat ball": "Meatball",
    "Moniter/TV": "Monitor/TV",
    "Mushroon": "Mushroom",
    "Noddles": "Noodles",
    "Skiboard": "Ski board",
    "Soccer": "Soccer ball",
    "Table Teniis paddle": "Table tennis paddle",
    "Tape Measur/ Ruler": "Tape measure/Ruler",
    "Tea pot": "Teapot",
    "Tennis": "Tennis ball",
    "Trash bin Can": "Trash bin/can",
}
_LVIS = {
    "monitor_(computer_equipment) computer_monitor": "computer monitor",
    "speaker_(stero_equipment)": "speaker (stereo equipment)",
}
_VOC = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
CLEAN_NAMES: Mapping[str, str] = MappingProxyType({**_LVIS, **_OBJECTS365, **_VOC})
"""Published name, without spaces around it -> clean name."""


def clean_name(name: str) -> str:
    """Returns a category's name put right, or as it is."""
    stripped = " ".join(name.split())
    return CLEAN_NAMES.get(stripped, stripped)


def with_clean_names(split: Split) -> Split:
    """Returns the split with its categories' names put right."""
    return replace(
        split,
        categories=tuple(replace(each, name=clean_name(each.name)) for each in split.categories),
    )
