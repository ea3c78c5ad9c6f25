"""One writer a folder, over processes; none after its process has ended, however it did."""

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dkdetr.errors import DkdetrError

_FILE = ".lock"
# What file systems answer that know no locks (some network mounts).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


class FolderLockedError(DkdetrError):
    """Another process writes the folder."""

    exit_code = 7


@contextmanager
def locked_folder(folder: Path, busy: str) -> Iterator[int]:
    """Yields the lock's open file; children that keep it open hold the lock too.

    Where the file system knows no locks a line says so, and nothing is locked.

    Args:
        folder: made if it is not there.
        busy: the error's sentence: who else may be at work, and what to do.

    Raises:
        FolderLockedError: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderLockedError(busy) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"note: '{folder}' cannot be locked here ({error.strerror}): see to it that no "
                "other command writes there",
                file=sys.stderr,
            )
        yield file.fileno()
