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

from dkdetr.engine.interruption import stop_on_sigterm
from dkdetr.errors import DkdetrError, PreemptedError

_FILE = ".lock"
# What file systems answer that know no locks (some network mounts).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
PATIENCE_S = 180.0
"""A network file system keeps a dead machine's locks for about half of that."""
_PAUSE_S = 5.0


class FolderLockedError(DkdetrError):
    """Another process writes the folder."""

    exit_code = 7


@contextmanager
def locked_folder(folder: Path, busy: str, *, patience_s: float = PATIENCE_S) -> Iterator[int]:
    """Yields the lock's open file; children that keep it open hold the lock too.

    Where the file system knows no locks a line says so, and nothing is locked.

    Args:
        folder: made if it is not there.
        busy: the error's sentence: who else may be at work, and what to do.
        patience_s: how long a job that Slurm has put back into its queue waits: who holds the lock
            may be itself, on a machine that died. Nobody else waits.

    Raises:
        FolderLockedError: somebody else holds it.
        PreemptedError: SIGTERM came while it waited.
    """
    folder.mkdir(parents=True, exist_ok=True)
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    with (folder / _FILE).open("a") as file:
        try:
            if not (_locked(file) or (requeued and _locked_later(file, folder, patience_s))):
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


def _locked(file: IO[str]) -> bool:
    """Returns whether the file is locked now; raises OSError where nothing can be."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _locked_later(file: IO[str], folder: Path, patience_s: float) -> bool:
    """Returns whether who holds the lock has let go in time, and the file is locked."""
    print(f"note: '{folder}' is locked; waiting up to {patience_s:.0f} s", file=sys.stderr)
    with stop_on_sigterm() as stop:
        for _ in range(round(patience_s / _PAUSE_S)):
            time.sleep(_PAUSE_S)
            if stop.is_set:
                raise PreemptedError(
                    f"stopped by SIGTERM, waiting for '{folder}'; the same command goes on"
                )
            if _locked(file):
                return True
    return False
