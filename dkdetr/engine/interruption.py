"""SIGTERM, the batch system's warning before it kills: as a flag, or as the end at once."""

import signal
import threading
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
    """SIGTERM came; no Exception, so that whoever takes an error for bad data does not take it."""


@contextmanager
def end_on_sigterm(message: str) -> Iterator[None]:
    """Ends the block at SIGTERM, wherever it is; only for work that leaves nothing half done.

    For one long call after another, where a flag would be read too late. Does nothing outside the
    main thread, where Python knows no signals.

    Raises:
        PreemptedError: SIGTERM came; with this message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_signal: int, _frame: FrameType | None) -> None:
        # Once: a second one must not interrupt the cleaning up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        raise PreemptedError(message) from None
    finally:
        signal.signal(signal.SIGTERM, before)
