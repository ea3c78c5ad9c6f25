"""One writer a folder, over processes; none after its process has ended, however it did."""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dkdetr.errors import DkdetrError

_FILE = ".lock"
# What file systems answer that know no locks (some network mounts).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_PAUSE_S = 5.0
_PAUSES_AFTER_REQUEUE = 36
"""Three minutes: a network file system keeps a dead machine's locks for about half of that."""


class FolderLockedError(DkdetrError):
    """Another process writes the folder."""

    exit_code = 7


@contextmanager
def locked_folder(folder: Path, busy: str) -> Iterator[int]:
    """Yields the lock's open file; children that keep it open hold the lock too.

    Where the file system knows no locks a line says so, and nothing is locked. A job that Slurm has
    put back into its queue waits a while: who holds the lock may be itself, on a machine that died.

    Args:
        folder: made if it is not there.
        busy: the error's sentence: who else may be at work, and what to do.

    Raises:
        FolderLockedError: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _FILE).open("a") as file:
        try:
            if not _lock(file, folder):
                raise FolderLockedError(busy)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"note: '{folder}' cannot be locked here ({error.strerror}): see to it that no "
                "other command writes there",
                file=sys.stderr,
            )
        yield file.fileno()


def _lock(file: IO[str], folder: Path) -> bool:
    """Returns whether the file is locked now; raises OSError where nothing can be."""
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    for pause in range(1 + _PAUSES_AFTER_REQUEUE * requeued):
        if pause == 1:
            wait = _PAUSES_AFTER_REQUEUE * _PAUSE_S
            print(f"note: '{folder}' is locked; waiting up to {wait:.0f} s", file=sys.stderr)
        if pause > 0:
            time.sleep(_PAUSE_S)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False
