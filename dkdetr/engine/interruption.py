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


@contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """Yields the flag; the handler before is put back at the end."""
    flag = StopFlag()

    def remember(_signal: int, _frame: FrameType | None) -> None:
        flag.is_set = True

    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)


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
