"""Progress that reads well on a terminal and in a batch system's log.

On a terminal: one bar with rate and estimated time left. Elsewhere: a plain line every 30 seconds
and one at the end, so that a log of a week stays readable.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_LINE_EVERY_S = 30.0
_SHOWN = ContextVar("shown", default=False)
"""Whether a bar of this thread is there already: two would write over each other."""

Advance = Callable[[int, str], None]
"""`advance(done, note)`: `done` units are finished in all; `note` is shown behind the bar."""


def format_duration(seconds: float) -> str:
    """Returns a duration as people read it: `42s`, `7m05s`, `3h20m`."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


@contextmanager
def progress(title: str, total: int, *, done: int = 0, quiet: bool = False) -> Iterator[Advance]:
    """Yields an `advance` function for `total` units of work, of which `done` are finished already.

    Within another's block nothing is shown.

    Args:
        title: what is being done, in a word or three.
        total: number of units.
        done: units that an earlier run finished; they do not count in the rate.
        quiet: show nothing (all ranks but the first).
    """
    if quiet or _SHOWN.get():
        yield lambda _done, _note: None
        return
    _SHOWN.set(True)
    try:
        with _shown(title, total, done) as advance:
            yield advance
    finally:
        _SHOWN.set(False)


@contextmanager
def _shown(title: str, total: int, done: int) -> Iterator[Advance]:
    if sys.stderr.isatty():
        columns = (
            # A split of a user's own is named by its paths, which would leave the bar no room.
            TextColumn("{task.description}", table_column=Column(max_width=32, no_wrap=True)),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
            task = bar.add_task(title, total=total, completed=done, note="")
            yield lambda now, note: bar.update(task, completed=now, note=note)
    else:
        yield from _plain_lines(title, total, done)


@contextmanager
def progress_of(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `advance(done, total)`, for work whose total is known once it has begun."""
    with ExitStack() as bars:
        shown: list[Advance] = []

        def advance(done: int, total: int) -> None:
            if not shown:
                shown.append(bars.enter_context(progress(title, total)))
            shown[0](done, "")

        yield advance


def _plain_lines(title: str, total: int, done: int) -> Iterator[Advance]:
    started = last_line = time.monotonic()
    state = {"done": done, "note": ""}

    def line(now_done: int, note: str) -> str:
        elapsed = time.monotonic() - started
        fresh = now_done - done
        left = elapsed / fresh * (total - now_done) if fresh > 0 else 0.0
        eta = f", about {format_duration(left)} left" if fresh > 0 and now_done < total else ""
        spent = format_duration(elapsed)
        return f"{title}: {now_done}/{total} in {spent}{eta}{'  ' + note if note else ''}"

    def advance(now_done: int, note: str) -> None:
        nonlocal last_line
        state["done"], state["note"] = now_done, note
        if time.monotonic() - last_line >= _LINE_EVERY_S:
            last_line = time.monotonic()
            print(line(now_done, note), file=sys.stderr, flush=True)

    yield advance
    print(line(int(state["done"]), str(state["note"])), file=sys.stderr, flush=True)
