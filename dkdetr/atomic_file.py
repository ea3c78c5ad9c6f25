"""Files that appear whole or not at all."""

import fcntl
import glob
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_ABANDONED_S = 600.0


@contextmanager
def atomic_file(path: Path, *, large: bool = False) -> Iterator[BinaryIO]:
    """Yields a new file that takes the name `path` once the block has ended without an error.

    The bytes reach the disk before the name does; after an error `path` is as it was.

    Args:
        path: the file's last name.
        large: what killed writers of `path` have left beside it is worth a look: it is removed
            after ten minutes, if all who write it say this. Where there are no locks it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if large:
        _sweep_killed(path)
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            if large:
                _hold(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)  # while the lock is held
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            # A full disk names nothing, others the temporary file.
            error.filename = str(path)
        raise
    # Some file systems cannot sync a folder; the rename stands all the same.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _beside(path: Path) -> Path:
    # Containers that share a volume often share small process numbers as well.
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def _sweep_killed(path: Path) -> None:
    """Removes what nobody has written to for a while, nor holds.

    Both: locks may be each machine's own, and a download may stall.
    """
    # As `_beside` has it: what only begins so is of another name, and perhaps not locked.
    own = re.compile(re.escape(f".{path.name}.") + r"\d+\.[0-9a-f]{8}\.partial")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if not own.fullmatch(leftover.name):
            continue
        with suppress(OSError), leftover.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = os.fstat(file.fileno())
            if state.st_size and time.time() - state.st_mtime > _ABANDONED_S:
                leftover.unlink()


def _hold(file: BinaryIO) -> None:
    """Locks a file that is being written, before its first byte."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)


def write_bytes(path: Path, content: bytes, *, large: bool = False) -> None:
    """Writes a whole file atomically; `large` as `atomic_file` has it."""
    with atomic_file(path, large=large) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Writes a whole text file atomically, as UTF-8."""
    write_bytes(path, content.encode())
