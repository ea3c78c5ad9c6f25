"""SIGTERM as a flag: the batch system's warning before it kills."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """True once SIGTERM has come; to be asked at every safe place."""

    def __init__(self) -> None:
        self.is_set = False


_FLAG = StopFlag()
_guarded = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """Yields the flag; the handler before is put back at the end of the outermost such block.

    A command opens one before its imports, which take seconds; what runs in it opens another.
    """
    global _guarded
    if _guarded:
        yield _FLAG
        return
    _FLAG.is_set = False
    before = signal.signal(signal.SIGTERM, _remember)
    _guarded = True
    try:
        yield _FLAG
    finally:
        _guarded = False
        signal.signal(signal.SIGTERM, before)


def _remember(_signal: int, _frame: FrameType | None) -> None:
    _FLAG.is_set = True
