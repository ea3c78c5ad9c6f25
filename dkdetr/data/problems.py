"""Everything that is wrong with a data set, collected before anything is said.

A person who mends a file wants the whole list, not one entry of it at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dkdetr.errors import DataError

_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One kind of fault: where, why, and the names of all that have it.

    `table` is the JSON pointer of a list of records (`/annotations`), or a word for a set of files.
    """

    table: str
    why: str
    names: tuple[str, ...]

    @property
    def total(self) -> int:
        """How often it was found."""
        return len(self.names)

    @property
    def first(self) -> tuple[str, ...]:
        """The first 20, which a line shows."""
        return self.names[:_SHOWN]

    def as_json(self) -> dict[str, Any]:
        """Returns the fault as plain values, with every name."""
        return {
            "table": self.table,
            "why": self.why,
            "total": self.total,
            "first": self.first,
            "names": self.names,
        }

    def __str__(self) -> str:
        """The fault in a line."""
        more = f" and {self.total - len(self.first)} more" if self.total > len(self.first) else ""
        plural = "records" if self.total > 1 else "record"
        shown = ", ".join(self.first)
        return f"{self.total} {plural} of {self.table}: {self.why}: {shown}{more}"


class Problems:
    """Takes up faults; `raise_if_any` makes one error of all of them.

    Args:
        where: the file, as messages name it.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: list[Problem] = []
        self._named: set[tuple[str, int]] = set()

    def add(self, table: str, why: str, names: Sequence[str]) -> None:
        """Notes that the records of these names have a fault; nothing if there are none."""
        if names:
            self.found.append(Problem(table, why, tuple(names)))

    def refuse(self, bad: Sequence[int], records: Sequence[Any], table: str, why: str) -> None:
        """Notes that the records at these indices have a fault; pointer and id name them.

        A record is named once, by the first fault that is found in it.
        """
        fresh = [index for index in bad if (table, index) not in self._named]
        self._named.update((table, index) for index in fresh)
        self.add(table, why, [_name(index, records[index], table) for index in fresh])

    def raise_if_any(self) -> None:
        """Raises DataError that names every fault."""
        if self.found:
            raise DataError(
                f"{self.where}: {'; '.join(map(str, self.found))}; training or scoring on them "
                "would be wrong, so mend the file"
            )


def _name(index: int, record: Any, table: str) -> str:
    known = record.get("id") if isinstance(record, dict) else None
    pointer = f"{table}/{index}"
    return f"{pointer} (id {known})" if type(known) is int else pointer
