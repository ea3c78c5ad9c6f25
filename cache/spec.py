"""What a cache is: its schema number, its errors with their exit codes, and its fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

SCHEMA = 2
"""Goes up whenever a reader of one layout could misread the other. 2: ragged ground truth."""

PART_NAMES = (
    "schema",
    "split",
    "images",
    "proposals",
    "crops",
    "teacher",
    "storage",
    "batch_layout",
)
"""What the fingerprint of the image data is made of; `text` has a fingerprint of its own."""


class CacheError(ValueError):
    """A cache cannot be made or used as asked; the message is for the user."""

    exit_code = 2


class UnsealedCacheError(CacheError):
    """The cache is not finished (or not there): no COMPLETE.json."""

    exit_code = 4


class StaleCacheError(CacheError):
    """The cache was made from other inputs; the message lists the differences in words."""

    exit_code = 4


class CorruptCacheError(CacheError):
    """A file or a value of the cache is not what was committed."""

    exit_code = 5


class DiskFullError(CacheError):
    """There is no room to write; whatever was committed before stays good."""

    exit_code = 6


class CacheLockedError(CacheError):
    """Another process writes this cache."""

    exit_code = 7


def canonical_json(value: Any) -> bytes:
    """Returns the one UTF-8 JSON text of plain data: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: the data holds NaN or infinity.
        TypeError: the data is not plain JSON data.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Returns the sha256, in hex, of the canonical JSON of nested plain data."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def split_text_parts(parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parts of the image data and those of the text, as plain JSON data.

    Raises:
        CacheError: a part of the image data is missing, or one is not known.
    """
    plain: dict[str, Any] = json.loads(canonical_json(parts))
    text: dict[str, Any] = plain.pop("text", {})
    missing = [name for name in PART_NAMES if name not in plain]
    unknown = sorted(set(plain) - set(PART_NAMES))
    if missing or unknown:
        raise CacheError(
            "the parts of a cache's fingerprint are wrong:"
            + (f" missing {', '.join(missing)};" if missing else "")
            + (f" unknown {', '.join(unknown)};" if unknown else "")
            + f" wanted {', '.join(PART_NAMES)} and, apart, text"
        )
    return plain, text


def diff_parts(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns one line for each leaf that differs: `teacher.dtype  cache: fp32  wanted: fp16`."""
    old, new = _flatten(cached), _flatten(wanted)
    keys = [key for key in sorted({*old, *new}) if _show(old, key) != _show(new, key)]
    width = max((len(key) for key in keys), default=0)
    return [
        f"{key:<{width}}  cache: {_shorten(_show(old, key))}  wanted: {_shorten(_show(new, key))}"
        for key in keys
    ]


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    if key not in flat:
        return "(absent)"
    value = flat[key]
    return value if isinstance(value, str) else canonical_json(value).decode()


def _shorten(text: str, limit: int = 60) -> str:
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: limit - 14]}... (#{digest})"
