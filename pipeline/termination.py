"""SIGTERM, the batch system's warning, as an orderly end of stage 1 wherever it is.

Everything that stage 1 writes is made whole beside its place and then moved there, so it may be
left at any point; and most of its time goes to one long call after another, where a flag would be
read too late. So the signal raises, in the main thread, an exception that no `except Exception`
holds up. (`fit` asks a flag instead: its ranks must stop at the same step, and save it.)
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dkdetr.errors import PreemptedError


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Yields; raises PreemptedError in the place of whatever SIGTERM interrupts.

    Does nothing outside the main thread, where Python knows no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        # Once: a second one must not interrupt the cleaning up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except _Terminated:
        raise PreemptedError(
            "stopped by SIGTERM; what was finished stands, and the same command goes on from there"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
