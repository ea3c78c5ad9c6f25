"""Which of OpenMoji's drawings get a name in the benchmark, and which name.

A name stays if a stranger would give it to the drawing and to no other drawing here. So faces,
people, hands, flags, arrows, buttons, abstract symbols and clock faces are left out, and of a
family of near-identical drawings (six books, five mailboxes) one or two stay. Code points and
English names are those of Unicode CLDR, read from the package `emoji`.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from dkdetr.errors import UsageError

INSTALL_HINT = "the pictograms need three small packages: pip install 'dkdetr[demo]'"
_VARIATION_SELECTOR = 0xFE0F
_FULLY_QUALIFIED = 2
_APOSTROPHE = "\u2019"
_NEWEST_EMOJI = 16.0
"""Names of later Unicode versions are not read: a newer package must not change any draw."""

# Code points (hexadecimal, first-last) of whole kinds that carry no object's name.
_LEFT_OUT_RANGES = """
00A9-21AA 23CF-23CF 23E9-23EF 23F8-25FE 2602-2602 260E-2611 261D-261D 2622-265E 2660-2668
267B-267F 2692-2692 2695-2695 269B-26AB 26A0-26A7 26CE-26CE 26D4-26D4 26F7-26F7 26F9-26F9
2705-2705 270A-270D 2714-2734 2747-2757 2763-27BF 2934-2B07 2B1B-2B1C 2B55-3299 1F170-1F251
1F310-1F314 1F316-1F318 1F31A-1F320 1F324-1F326 1F328-1F32C 1F385-1F387 1F38C-1F38C 1F3A6-1F3A6
1F3C1-1F3C4 1F3C7-1F3C7 1F3CA-1F3CC 1F3DA-1F3DA 1F3E1-1F3E1 1F3E3-1F3E3 1F3E7-1F3E7 1F3E9-1F3E9
1F3F3-1F3F4 1F3FB-1F3FF 1F425-1F425 1F446-1F450 1F464-1F47A 1F47C-1F47C 1F47F-1F47F 1F481-1F483
1F485-1F487 1F491-1F491 1F48F-1F48F 1F493-1F493 1F495-1F4A0 1F4A2-1F4A2 1F4A4-1F4A6 1F4A8-1F4A9
1F4AB-1F4AF 1F4B1-1F4B2 1F4B4-1F4B4 1F4B6-1F4B7 1F4B9-1F4B9 1F4C0-1F4C0 1F4C2-1F4C4 1F4C6-1F4C7
1F4C9-1F4C9 1F4CD-1F4CD 1F4D1-1F4D5 1F4D7-1F4D9 1F4DB-1F4DB 1F4E4-1F4E5 1F4E7-1F4EA 1F4EC-1F4ED
1F4F2-1F4F6 1F4F8-1F4F8 1F500-1F50A 1F50E-1F510 1F513-1F513 1F515-1F515 1F517-1F524 1F52F-1F53D
1F549-1F549 1F550-1F567 1F573-1F575 1F57A-1F587 1F590-1F5A4 1F5B2-1F5B2 1F5C2-1F5C2 1F5D2-1F5D3
1F5E3-1F5EF 1F5FE-1F5FE 1F600-1F64F 1F683-1F683 1F686-1F689 1F68B-1F68B 1F68D-1F68F 1F694-1F694
1F696-1F696 1F698-1F698 1F69E-1F69F 1F6A3-1F6A3 1F6A7-1F6A7 1F6A9-1F6A9 1F6AB-1F6AB 1F6AD-1F6B1
1F6B3-1F6BC 1F6BE-1F6BE 1F6C0-1F6C0 1F6C2-1F6C5 1F6CC-1F6CC 1F6D0-1F6D0 1F6D7-1F6D8 1F6DC-1F6DC
1F6EB-1F6EC 1F7E0-1F7F0 1F90C-1F915 1F917-1F93E 1F948-1F949 1F94E-1F94E 1F970-1F97A 1F9AE-1F9AE
1F9B0-1F9B3 1F9B8-1F9B9 1F9BB-1F9BB 1F9CC-1F9DF 1F9E1-1F9E1 1FA75-1FA77 1FAAA-1FAAB 1FAAF-1FAAF
1FAC2-1FAC8 1FADF-1FAF8
"""

# Single drawings: too like another that stays, or a scene rather than an object.
_LEFT_OUT_NAMES_TEXT = """
Japanese castle; bell with slash; blossom; bridge at night; bust in silhouette; busts in
silhouette; camera with flash; chart increasing with yen; cinema; cityscape at dusk; clinking
beer mugs; clinking glasses; clutch bag; computer disk; dim button; empty nest; flower playing
cards; foggy; globe showing Americas; globe showing Asia-Australia; glowing star; hole;
horizontal traffic light; hourglass done; kiss mark; leaf fluttering in wind; ledger; level
slider; light rail; linked paperclips; love hotel; low battery; magnifying glass tilted right;
manual wheelchair; medium skin tone; military medal; milky way; moon viewing ceremony; mountain;
musical notes; national park; night with stars; no littering; page with curl; passenger
ship; person standing; rugby football; snowman without snow; speech balloon; sports medal;
station; sunrise; sunrise over mountains; sunset; ticket; umbrella; umbrella on ground; wedding
"""

# CLDR's name says more or less than a person would.
_RENAMED = {
    "hourglass not done": "hourglass",
    "umbrella with rain drops": "umbrella",
    "hot beverage": "cup of coffee",
    "globe showing Europe-Africa": "globe",
    "magnifying glass tilted left": "magnifying glass",
    "snow-capped mountain": "mountain",
    "closed mailbox with raised flag": "mailbox",
    "vertical traffic light": "traffic light",
    "locked": "padlock",
    "fork and knife": "cutlery",
    "bottle with popping cork": "champagne bottle",
    "teacup without handle": "teacup",
    "roasted sweet potato": "sweet potato",
    "doughnut": "donut",
    "pool 8 ball": "billiard ball",
    "cloud with rain": "rain cloud",
    "framed picture": "picture frame",
    "flag in hole": "golf hole",
    "beach with umbrella": "beach umbrella",
    "classical building": "temple",
    "cooked rice": "bowl of rice",
    "Tokyo tower": "tower",
    "couch and lamp": "couch",
    "police car light": "siren",
    "ballot box with ballot": "ballot box",
    "cut of meat": "steak",
    "nest with eggs": "nest",
    "field hockey": "hockey stick",
    "badminton": "badminton racket",
    "tennis": "tennis racket",
    "ping pong": "table tennis bat",
    "cricket": "grasshopper",
    "cricket game": "cricket bat",
    "bowling": "bowling pins",
    "artist palette": "palette",
    "man's shoe": "leather shoe",
    "woman's hat": "sun hat",
    "woman's boot": "boot",
    "high-heeled shoe": "high heel",
    "rescue worker's helmet": "helmet",
}


def import_extra(module: str) -> Any:
    """Returns the module of an optional package; raises UsageError with the install command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"'{error.name}' is not installed; {INSTALL_HINT}") from None


def cldr_names() -> Mapping[str, str]:
    """Returns `{file stem: English name}` of every drawing that is one code point, by code point.

    Raises:
        UsageError: the package `emoji` is missing.
    """
    table: dict[str, str] = {}
    for character, entry in import_extra("emoji").EMOJI_DATA.items():
        points = [ord(c) for c in character if ord(c) != _VARIATION_SELECTOR]
        if len(points) == 1 and entry["status"] <= _FULLY_QUALIFIED and entry["E"] <= _NEWEST_EMOJI:
            table[f"{points[0]:04X}"] = (
                entry["en"].strip(":").replace("_", " ").replace(_APOSTROPHE, "'")
            )
    return dict(sorted(table.items(), key=lambda item: int(item[0], 16)))


def benchmark_name(stem: str, cldr_name: str) -> str | None:
    """Returns the name the benchmark uses for a drawing, or None if it is left out."""
    point = int(stem, 16)
    if cldr_name in _LEFT_OUT_NAMES or any(low <= point <= high for low, high in _RANGES):
        return None
    return _RENAMED.get(cldr_name, cldr_name)


def _parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
    pairs = (entry.split("-") for entry in text.split())
    return tuple((int(low, 16), int(high, 16)) for low, high in pairs)


_RANGES = _parse_ranges(_LEFT_OUT_RANGES)
_LEFT_OUT_NAMES = frozenset(" ".join(_LEFT_OUT_NAMES_TEXT.split()).split("; "))
