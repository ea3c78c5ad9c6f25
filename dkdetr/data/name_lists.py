"""Lists of names: those of LVIS, COCO, Objects365 and VOC, which are shipped, and one's own files.

The shipped lists are data (`names/*.tsv`: category id, tab, name), verbatim, with their sources on
top. NAME-clean is the same list with names put right (`clean_names`) and without underscores.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dkdetr.data.clean_names import clean_name
from dkdetr.errors import DataError

SHIPPED = ("lvis", "coco", "objects365", "voc")
_CLEAN = "-clean"


@dataclass(frozen=True)
class NameEntry:
    """A category's number, its name, and further words that mean the same."""

    category_id: int
    name: str
    synonyms: tuple[str, ...] = ()


def read_entries(place: str | Path) -> tuple[NameEntry, ...]:
    """Returns the entries of a shipped list (`lvis`, `coco-clean`, ...) or of a file.

    A file that is there goes before a shipped list of its name.

    Raises:
        DataError: see `read_name_file`.
    """
    if str(place).removesuffix(_CLEAN) in SHIPPED and not Path(place).is_file():
        return shipped_entries(str(place))
    return read_name_file(Path(place))


def shipped_entries(name: str) -> tuple[NameEntry, ...]:
    """Returns a shipped list with its data set's category ids; NAME-clean: put right."""
    own = name.removesuffix(_CLEAN)
    text = (files("dkdetr.data") / "names" / f"{own}.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    if own == name:
        return tuple(NameEntry(int(number), verbatim) for number, verbatim in rows)
    return tuple(
        NameEntry(int(number), clean_name(verbatim).replace("_", " ")) for number, verbatim in rows
    )


def read_name_file(path: Path) -> tuple[NameEntry, ...]:
    """Returns the entries of a file, ids from 1: a line is a name, or a name and its synonyms.

    They are parted by commas. Empty lines and lines that begin with # are left out.

    Raises:
        DataError: no such file, no UTF-8, no name in it, or a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        lists = ", ".join((*SHIPPED, *(f"{name}{_CLEAN}" for name in SHIPPED)))
        raise DataError(f"no list of names '{path}'; shipped ones: {lists}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise DataError(f"the list of names '{path}': {error.strerror}") from None
    entries: list[NameEntry] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = tuple(word.strip() for word in line.split(",") if word.strip())
        if not words or line.lstrip().startswith("#"):
            continue
        if words[0] in seen:
            raise DataError(f"'{path}' names '{words[0]}' twice: lines {seen[words[0]]}, {number}")
        seen[words[0]] = number
        entries.append(NameEntry(len(entries) + 1, words[0], words[1:]))
    if not entries:
        raise DataError(f"'{path}' holds no name")
    return tuple(entries)
