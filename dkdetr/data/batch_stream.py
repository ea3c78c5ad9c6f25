"""Batches from loader processes: started safely, waited for with patience, never in silence.

Loader processes start by forkserver: forking a process that has read Zarr (an event-loop thread)
or used OpenMP can deadlock.
"""

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from cache.spec import CacheError
from dkdetr.errors import DkdetrError

Batch = TypeVar("Batch")

_POLL_S = 1.0
_PATIENCE_S = 120.0


@runtime_checkable
class KeyLists(Protocol):
    """A known number of lists of sample keys, one a batch."""

    def __len__(self) -> int:
        """Returns the number of batches."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """Yields the lists."""
        ...


class LoaderLostError(DkdetrError):
    """A loader process died: killed by the system, mostly for its memory."""


@dataclass(frozen=True)
class _Failure:
    """An error for the user on its way from a loader process.

    DataLoader itself would re-raise it with a traceback of the worker for a message.
    """

    error: Exception


class _BatchDataset(Dataset[Any]):
    """Hands whole batches to a DataLoader that does no batching of its own."""

    def __init__(self, make_batch: Callable[[Any], Any]) -> None:
        self._make_batch = make_batch

    def __getitem__(self, keys: Any) -> Any:
        try:
            return self._make_batch(keys)
        except (DkdetrError, CacheError) as error:
            return _Failure(error)


class BatchStream(Generic[Batch]):
    """Yields batches once through; its length is the number of batches left.

    Args:
        make_batch: makes a batch of a sampler's list of keys; goes to the loader processes.
        keys: the lists of keys, in order.
        workers: loader processes; 0 loads here.
        pin_memory: whether batches come in memory that a GPU copies from while it computes.
        should_stop: asked while no batch is ready; True ends the stream.
        patience_s: after so long without a batch the loader processes must say where they are.
    """

    def __init__(
        self,
        make_batch: Callable[[Any], Batch],
        keys: KeyLists,
        *,
        workers: int,
        pin_memory: bool = False,
        should_stop: Callable[[], bool] | None = None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._num_batches = len(keys)
        self._workers = min(workers, self._num_batches)
        self._should_stop = should_stop or _never
        self._patience_s = patience_s
        self._loader: DataLoader[Any] = DataLoader(
            _BatchDataset(make_batch),
            batch_size=None,
            sampler=keys,
            num_workers=self._workers,
            multiprocessing_context=_forkserver() if self._workers else None,
            worker_init_fn=_prepare_worker if self._workers else None,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            timeout=_POLL_S if self._workers else 0,
            # Its own: DataLoader draws a seed, and the run's global state must not notice.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        others = set(multiprocessing.active_children())
        batches = iter(self._loader)
        mine = [child for child in multiprocessing.active_children() if child not in others]
        # Registered after DataLoader's own: at the end of the program it comes first.
        last_word = atexit.register(partial(_kill, mine))
        try:
            for _ in range(self._num_batches):
                batch = self._wait_for(batches)
                if batch is None:
                    return
                if isinstance(batch, _Failure):
                    raise batch.error
                yield batch
        finally:
            del batches  # ends the processes, unless a traceback that somebody keeps still holds it
            if not any(child.is_alive() for child in mine):
                atexit.unregister(last_word)

    def _wait_for(self, batches: Iterator[Any]) -> Any:
        """Returns the next batch, or None once `should_stop` says so."""
        asked = warned = time.monotonic()
        while not self._should_stop():
            try:
                return next(batches)
            except RuntimeError as error:
                message = str(error)
                if message.startswith("DataLoader worker (pid"):
                    raise LoaderLostError(_loss_of(error)) from None
                if not message.startswith("DataLoader timed out"):
                    raise
            now = time.monotonic()
            if now - warned >= self._patience_s:
                warned = now
                _ask_workers(now - asked)
        return None


def _kill(children: Sequence[BaseProcess]) -> None:
    """Ends loader processes of a stream that nobody closed: SIGTERM would not reach them."""
    for child in children:
        if child.is_alive():
            child.kill()


def _loss_of(error: RuntimeError) -> str:
    return (
        f"a loader process is gone ({str(error).splitlines()[0]}); if the machine ran out of "
        "memory, lower data.workers. What was saved stands, the same command goes on from there"
    )


def _ask_workers(seconds: float) -> None:
    """Says that nothing came for so long, and lets every loader process print its stack."""
    children = multiprocessing.active_children()
    pids = [child.pid for child in children if child.is_alive() and child.pid is not None]
    print(
        f"no batch for {seconds:.0f} s: loader processes {pids} are alive; each prints its stack "
        "now. A slow disk or network file system? A deadlock shows the same stack again",
        file=sys.stderr,
        flush=True,
    )
    for pid in pids:
        with suppress(ProcessLookupError):
            if _listens(pid):
                os.kill(pid, signal.SIGUSR1)


def _listens(pid: int) -> bool:
    """Returns False for a process that has not begun to answer SIGUSR1: it would die of it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:  # no Linux: a process that is silent for so long has begun
        return True
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def _forkserver() -> BaseContext:
    """Returns the start method; its server imports torch once, for all loaders of the run.

    The server and its children are born with SIGTERM blocked: a batch system sends it to every
    process of the job, and the main process still needs its batches to stop in good order. The
    signal that asks for stacks waits too, until there is somebody to answer it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # its own start would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _prepare_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; the main one alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Again, for a server that somebody else had started before.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def _never() -> bool:
    return False


def _as_it_is(batch: Any) -> Any:
    return batch
