"""The JSON text of a COCO or LVIS annotation file, without the polygons that nobody asked for.

Cutting them out of the text before it is parsed spares the 1.1 GB LVIS file most of its memory.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from dkdetr.data.problems import Problems
from dkdetr.errors import DataError

_POLYGONS = re.compile(rb'"segmentation"\s*:\s*(\[[\[\]0-9eE+\-.,\s]*\])')
_OUTLINES = re.compile(rb'"segmentation"\s*:\s*(\[[\[\]0-9eE+\-.,\s]*\]|\{[^{}]*\})')

Records = list[dict[str, Any]]


def parse_annotation_file(path: Path, *, with_polygons: bool = False) -> dict[str, Any]:
    """Returns the file's object; `segmentation` is null where polygons were cut out.

    Raises:
        DataError: it cannot be read, or is no JSON object.
    """
    text = _read(path)
    if not with_polygons:
        text = _POLYGONS.sub(b'"segmentation":null', text)
    return _parse(text, path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no annotation file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read the annotation file {path}: {error.strerror}") from None


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        document = _parse_not_a_number(text, path, error)
    if not isinstance(document, dict):
        raise DataError(f"{path}: an annotation file is a JSON object, this is none")
    return document


@dataclass(frozen=True, eq=False)
class OutlinedFile:
    """An annotation file whose outlines stay text: `segmentation` numbers a span of `text`."""

    document: dict[str, Any]
    text: bytes
    spans: Sequence[tuple[int, int]]

    def outline_text(self, record: dict[str, Any]) -> bytes | None:
        """Returns an annotation's outline as the file has it, or None if none was left out."""
        number = record.get("segmentation")
        return self.text[slice(*self.spans[number])] if type(number) is int else None

    def record_text(self, record: dict[str, Any]) -> bytes:
        """Returns an annotation as JSON, its outline as the file has it."""
        outline = self.outline_text(record)
        if outline is None:
            return orjson.dumps(record)
        rest = {key: value for key, value in record.items() if key != "segmentation"}
        return b'%b,"segmentation":%b}' % (orjson.dumps(rest)[:-1], outline)


def parse_outlined_file(path: Path, *, with_run_lengths: bool = False) -> OutlinedFile:
    """Returns the file with its outlines unparsed; as Python objects they fill ten times as much.

    Args:
        path: a COCO or LVIS annotation file.
        with_run_lengths: leaves masks of run lengths unparsed too, not the polygons alone.

    Raises:
        DataError: it cannot be read, or is no JSON object.
    """
    text = _read(path)
    spans: list[tuple[int, int]] = []

    def number(found: re.Match[bytes]) -> bytes:
        spans.append(found.span(1))
        return b'"segmentation":%d' % (len(spans) - 1)

    outlines = _OUTLINES if with_run_lengths else _POLYGONS
    # Each gives way to its number, so that the rest parses small and in its own order.
    return OutlinedFile(_parse(outlines.sub(number, text), path), text, spans)


def _parse_not_a_number(text: bytes, path: Path, error: orjson.JSONDecodeError) -> Any:
    # Python writes NaN and Infinity, which are no JSON. Read them, so that their boxes get named.
    try:
        if b"NaN" in text or b"Infinity" in text:
            return json.loads(text)
    except (ValueError, RecursionError):
        pass
    raise DataError(f"{path} is not JSON: {error}") from None


def records_of(document: dict[str, Any], key: str, problems: Problems) -> Records:
    """Returns one of the file's lists, without what is no object in it (a problem).

    Raises:
        DataError: there is no such list, or nothing in it though it cannot be empty.
    """
    records = document.get(key)
    if not isinstance(records, list):
        raise DataError(
            f"{problems.where}: no list '{key}'; is this a COCO or LVIS annotation file?"
        )
    bad = [i for i, record in enumerate(records) if not isinstance(record, dict)]
    problems.refuse(bad, records, f"/{key}", "not an object")
    if bad:
        # An empty record in its place: pointers to those behind it stay right.
        records = [record if isinstance(record, dict) else {} for record in records]
    if not records and key != "annotations":
        raise DataError(f"{problems.where}: the list '{key}' is empty")
    return records
