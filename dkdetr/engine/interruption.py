"""SIGTERM, the batch system's warning before it kills: as a flag, or as the end at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dkdetr.errors import PreemptedError


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


class _Terminated(BaseException):
    # No Exception: whoever takes an error for bad data must not take this.
    pass


@contextmanager
def end_on_sigterm(message: str) -> Iterator[None]:
    """Ends the block at SIGTERM, wherever it is; only for work that leaves nothing half done.

    Raises:
        PreemptedError: SIGTERM came; with this message.
    """

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        raise PreemptedError(message) from None
    finally:
        signal.signal(signal.SIGTERM, before)
