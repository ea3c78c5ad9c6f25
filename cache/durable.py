"""Files that are either whole or absent: atomic writes, hashes, and JSON that checks itself."""

import errno
import json
import os
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from cache.faults import fault_point
from cache.location import CachePath, file_size
from cache.spec import CorruptCacheError, DiskFullError, canonical_json

PARTIAL_SUFFIX = ".partial"
"""Ends the name of every file that is still being written (zarr's own included)."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What file systems say that cannot sync a folder at all: some network and FUSE ones.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
_BLOCK = 1 << 22


@contextmanager
def disk_errors(what: str) -> Generator[None]:
    """Turns "no space left", a quota and a file size limit into DiskFullError; `what` is named."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFullError(
                f"no room to write {what}: {error.strerror}; nothing that was committed is lost. "
                "Free some space (or raise the quota) and run the same command again: it resumes."
            ) from error
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` is the old file or the new one, never a part, power cut or not.

    Raises:
        DiskFullError: no room; the old file is untouched.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    with disk_errors(str(path)):
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            fault_point("atomic.before_rename")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Returns once the bytes of a file are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Returns once the names in a folder are on the disk, as far as its file system can say.

    Where a folder cannot be synced the files stand all the same; a disk's own error is raised.
    """
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sweep_partial_files(root: Path) -> int:
    """Removes what killed writers left half-written under `root`; returns how many files."""
    leftovers = list(root.rglob(f"*{PARTIAL_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def hash_bytes(data: bytes | memoryview) -> str:
    """Returns the xxh3_128 of some bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: CachePath) -> str:
    """Returns the xxh3_128 of a file's bytes, in hex."""
    state = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def file_record(path: CachePath) -> dict[str, Any]:
    """Returns `{"size": bytes, "xxh3_128": hex}` of a file."""
    return {"size": file_size(path), "xxh3_128": hash_file(path)}


def file_problem(path: CachePath, record: Mapping[str, Any], *, quick: bool = False) -> str | None:
    """Returns what is wrong with a file, or None; `quick` looks at presence and size alone."""
    try:
        size = file_size(path)
    except FileNotFoundError:
        return "is missing"
    if size != record["size"]:
        return f"has {size} bytes instead of {record['size']}"
    if not quick and hash_file(path) != record["xxh3_128"]:
        return "has changed since it was committed (its hash differs)"
    return None


def dump_checked_json(value: Mapping[str, Any]) -> bytes:
    """Returns indented JSON text of `value` and, under "check", the hash of its canonical form."""
    checked = {**value, "check": hash_bytes(canonical_json(value))}
    text = json.dumps(checked, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def load_checked_json(path: CachePath) -> dict[str, Any]:
    """Returns what `dump_checked_json` wrote to a file.

    Raises:
        FileNotFoundError: there is none.
        CorruptCacheError: any byte of it has changed.
    """
    data = path.read_bytes()
    try:
        value: dict[str, Any] = json.loads(data)
        check = value.pop("check")
        good = check == hash_bytes(canonical_json(value)) and dump_checked_json(value) == data
    except (ValueError, KeyError, TypeError, AttributeError):
        good, value = False, {}
    if not good:
        raise CorruptCacheError(f"{path} has changed since it was written (its check differs)")
    return value
