"""What ranks behind the first say: kept in the run's folder, too, with where it broke.

torchrun mixes all ranks' words on one terminal, or leaves them on the machines of a job that is
over; which of them failed first is then asked too late.
"""

import os
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from dkdetr.engine.distributed import Ranks
from dkdetr.errors import PreemptedError


@contextmanager
def rank_log(run: Path, ranks: Ranks) -> Iterator[None]:
    """Appends what this rank says on stderr, and the traceback of an error, to its own file.

    Of SIGTERM, which is no error, one line.

    RUN/logs/rank_K.log; not of the first rank, whose words are the command's, and not before there
    is a word. Where the file cannot be written a line says so, and the training goes on.
    """
    if ranks.is_first:
        yield
        return
    log = _RankLog(run / "logs" / f"rank_{ranks.rank}.log", ranks)
    try:
        with redirect_stderr(cast("TextIO", _Copied(sys.stderr, log))):
            yield
    except PreemptedError as stopped:
        log.write(f"{_now()} {stopped}\n")
        raise
    except Exception:
        log.write(f"{_now()} {traceback.format_exc()}")
        raise


class _RankLog:
    """A file that begins with who writes; opened for each word, for words are few."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self._path, self._begun, self._broken = path, False, False
        self._head = (
            f"{_now()} rank {ranks.rank} of {ranks.world_size}, {ranks.device}, "
            f"{platform.node()}, process {os.getpid()}\n"
        )

    def write(self, text: str) -> None:
        """Appends a text; after an error of the disk no more."""
        if self._broken:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            # As stderr takes it: a file's name in a message need not be UTF-8.
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text if self._begun else self._head + text)
            self._begun = True
        except OSError as error:
            self._broken = True
            print(f"note: '{self._path}' cannot be written: {error}", file=sys.stderr)


class _Copied:
    """A stream whose text is kept as well; in all else the stream itself, whatever stderr is."""

    def __init__(self, stream: Any, log: _RankLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Returns how many characters the stream took."""
        self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
