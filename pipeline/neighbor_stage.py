"""Neighbour lists as stage 1's last step: in a process of their own, and never a reason to fail."""

import multiprocessing
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.neighbor_lists import load_parameters
from cache.neighbors import NeighborSettings, build_neighbors
from cache.spec import CacheError, CorruptCacheError, StaleCacheError
from cache.store import open_cache
from dkdetr.engine.interruption import stop_on_sigterm
from dkdetr.errors import PreemptedError
from dkdetr.progress import Advance, progress

_QUIET_BELOW = 2000


@dataclass(frozen=True)
class NeighborsBuilt:
    """The lists that a cache has now, and whether they were made now."""

    path: Path
    made: bool
    parameters: dict[str, Any]

    def lines(self) -> list[str]:
        """Returns the result as a person reads it."""
        how = self.parameters
        search = f"{how['search']} search, recall {how['recall']:.1%} of the exact lists"
        if how["recall_sample"]:
            search += f" on a sample of {how['recall_sample']:,}"
        state = "built" if self.made else "are there already (--rebuild makes them anew)"
        return [
            f"neighbour lists of {self.path} {state}",
            f"{how['objects']:,} regions, at most {how['per_image']} an image, {how['k']} "
            f"neighbours each; {search}; {how['library']}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        return {"path": str(self.path), "made": self.made, **self.parameters}


def add_neighbors(path: Path) -> tuple[str, ...]:
    """Returns notes on what was not built; the lists themselves are derived data.

    Raises:
        PreemptedError: SIGTERM came; the cache is sealed, and the same command builds the lists.
    """
    try:
        ensure_neighbors(path, recorded_settings(path))
    except (CacheError, OSError) as error:
        return (
            f"no neighbour lists: {error}; the cache is whole without them; "
            f"dkdetr cache neighbors {path}",
        )
    return ()


def recorded_settings(path: Path) -> NeighborSettings:
    """Returns how the lists that are there were made, be they whole or not; else the defaults."""
    try:
        recorded = load_parameters(path) or {}
    except CorruptCacheError:
        recorded = {}
    names = NeighborSettings().recorded()
    return NeighborSettings(**{name: recorded[name] for name in names if name in recorded})


def ensure_neighbors(
    path: Path, settings: NeighborSettings, *, rebuild: bool = False
) -> NeighborsBuilt:
    """Returns the lists of a sealed cache, built now unless whole ones of these settings are there.

    Raises:
        CacheError: the cache is unsealed or damaged, or faiss is not installed.
        OSError: a file cannot be read or written.
        PreemptedError: SIGTERM came; the older lists stand, or whole new ones.
    """
    if not rebuild and (there := _current(path, settings)) is not None:
        return NeighborsBuilt(path, False, there)
    _build_apart(path, settings)
    parameters = load_parameters(path)
    assert parameters is not None
    return NeighborsBuilt(path, True, parameters)


def _current(path: Path, settings: NeighborSettings) -> dict[str, Any] | None:
    try:
        if open_cache(path).neighbors() is None:
            return None
    except StaleCacheError:
        return None
    except CorruptCacheError as error:
        print(f"{error}: they are built anew", file=sys.stderr)
        return None
    parameters = load_parameters(path) or {}
    wanted = settings.recorded()
    return parameters if wanted == {key: parameters.get(key) for key in wanted} else None


def _build_apart(path: Path, settings: NeighborSettings) -> None:
    # Of its own process: faiss's OpenMP and torch's do not share one well.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (path.resolve(), settings, os.getpid(), sender)
    child = context.Process(target=_build_and_answer, args=arguments, daemon=True)
    with stop_on_sigterm() as stop:
        error = None
        child.start()
        sender.close()
        try:
            while not (stop.is_set or receiver.poll(0.1)):
                pass
            if not stop.is_set:
                error = _answer(receiver)
                child.join()
        finally:
            child.terminate()  # does nothing to one that has ended
            child.join()
    # Of a signal to the whole group the child may have died first, and this one be told later.
    if stop.is_set or child.exitcode == -signal.SIGTERM:
        raise PreemptedError(
            f"stopped by SIGTERM while the neighbour lists of {path} were being built; "
            "what was there before stands, and the same command builds them"
        )
    if error is not None:
        raise error
    if child.exitcode:
        raise CacheError(f"the process that builds neighbour lists ended with {child.exitcode}")


def _answer(receiver: Any) -> Exception | None:
    try:
        return receiver.recv()
    except EOFError:  # it died without a word; its exit code says how
        return None


def _build_and_answer(path: Path, settings: NeighborSettings, parent: int, sender: Any) -> None:
    """Runs in the child; Ctrl-C and SIGTERM are the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ExitStack() as bars:
        advances: dict[str, Advance] = {}

        def advance(step: str, done: int, total: int) -> None:
            if os.getppid() != parent:
                raise SystemExit(1)  # nobody waits for the lists any more
            if step not in advances:
                bars.close()
                bar = progress(f"neighbours: {step}", total, quiet=total < _QUIET_BELOW)
                advances[step] = bars.enter_context(bar)
            advances[step](done, "")

        try:
            build_neighbors(path, settings, on_progress=advance)
        except (CacheError, OSError) as error:
            sender.send(error)
            return
    sender.send(None)
