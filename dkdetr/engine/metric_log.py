"""The run's diary: one JSON object a line, in step with the checkpoints."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dkdetr.atomic_file import write_text

Values = Mapping[str, float | int | str | None]


class MetricLog:
    """Appends records to `metrics.jsonl`.

    Args:
        path: the file; made if missing.
        after_iteration: records of later iterations are dropped first, because a resumed run will
            write them again.
    """

    def __init__(self, path: Path, *, after_iteration: int) -> None:
        kept = [r for r in read_metrics(path) if int(r["iteration"]) <= after_iteration]
        write_text(path, _lines(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, iteration: int, values: Values) -> None:
        """Appends one record; a reader may look at any time. None: there was no such figure."""
        self._file.write(_lines([_record(kind, iteration, values)]))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def add_record(path: Path, kind: str, iteration: int, values: Values) -> None:
    """Appends one record to a log that is there, whoever else appends to it; readers put it in
    order.

    The file is never replaced: a training that has it open would go on writing into one that has no
    name any more.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"  # behind a line that was cut short
        # One write, wherever the end is by then.
        file.write(begin + _lines([_record(kind, iteration, values)]).encode())


def _record(kind: str, iteration: int, values: Values) -> dict[str, Any]:
    return {"kind": kind, "iteration": iteration, "time": round(time.time(), 3), **values}


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the whole records of a log by iteration, else as they came; lines that a kill cut
    short are left out.

    Figures are numbers, words or None, which NaN and Infinity are read as, too.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line, parse_constant=lambda _: None))
        except ValueError:
            continue
    return sorted(records, key=lambda each: int(each["iteration"]))


def in_brief(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Returns at most `most` (2 or more) records, evenly spread, the first and the last among them.

    Without clock times, numbers to four digits: what is kept of a run when its folder is not.
    """
    count = min(most, len(records))
    places = [round(k * (len(records) - 1) / max(1, count - 1)) for k in range(count)]
    return [
        {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in records[place].items()
            if key != "time"
        }
        for place in places
    ]
