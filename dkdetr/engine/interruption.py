"""SIGTERM as a flag: the batch system's warning before it kills."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
