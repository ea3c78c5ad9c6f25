"""What ranks tell of themselves in the job's store, so that the others can name one that died.

Nobody hears from a process that is killed: on the same machine the kernel knows that it is gone.
"""

import contextlib
import json
import os
import platform
import select
from collections.abc import Mapping
from pathlib import Path
from threading import Thread

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from dkdetr.errors import PreemptedError

_KEY = "dkdetr/rank"
_PATIENCE_MS = 1000
"""A process's connections are closed a moment before it has ended."""
_STORE_PATIENCE_S = 10.0
"""A store whose machine went silent answers nobody, and its clients know no limit of their own."""


class RollCall:
    """One rank's entry, and its view of the others'.

    Args:
        store: the job's, which torchrun keeps.
        rank: this process's.
        world_size: of the job.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        # A connection of its own: who waits for an answer holds the other's lock meanwhile.
        # (PyTorch before 2.8 may have none.)
        own = store.clone() if hasattr(store, "clone") else store
        self._store, self._rank, self._world_size = own, rank, world_size
        self._machine = f"{platform.node()} {_boot()} {_process_namespace()}"
        # torchrun keeps the store when it starts its ranks anew (--max-restarts).
        self._store.delete_key(_end_of(rank))
        self._store.set(_process_of(rank), json.dumps([self._machine, os.getpid()]))

    def leave(self, why: str) -> None:
        """Says that this rank ends: by an error of its own, or "" as one that lost another."""
        as_utf8 = why.encode(errors="backslashreplace").decode()  # a file's name need not be
        with contextlib.suppress(RuntimeError):  # the store may be gone with the machine it was on
            self._store.set(_end_of(self._rank), as_utf8)

    def who_died(self) -> str:
        """Returns the ranks that are gone and how, in words; "" where that is not known.

        Known are errors, of any rank, and ends without one on this machine. Waits for a second at
        most where nobody is gone, and for ten where the store does not answer.
        """
        told: list[str] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # see `leave`
                told.append(self._who_died())

        asking = Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_STORE_PATIENCE_S)
        return told[0] if told else ""

    def _who_died(self) -> str:
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        here: dict[int, int] = {}
        for rank in others:
            machine, process = json.loads(self._read(_process_of(rank)) or '["", 0]')
            if machine == self._machine:
                here[rank] = process
        gone = _ended(here)
        # Read after that: who lost another rank, too, has said so before it ended.
        ends = {rank: self._read(_end_of(rank)) for rank in others}
        told: list[str] = []
        stopped: list[str] = []
        for rank, why in ends.items():
            if why:
                # After a death torchrun stops the others: beside it that is no news.
                words = stopped if why.startswith(PreemptedError.__name__) else told
                words.append(f"rank {rank}, which ended with {why}")
        killed = [rank for rank in sorted(gone) if ends[rank] is None]
        told += [f"rank {rank}, whose process {here[rank]} is gone" for rank in killed]
        return " and ".join(told or stopped)

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


def _ended(processes: Mapping[int, int]) -> set[int]:
    """Returns whose processes on this machine have ended, after a moment if none has yet."""
    gone: set[int] = set()
    with contextlib.ExitStack() as stack:
        watch, ranks = select.poll(), dict[int, int]()
        for rank, process in processes.items():
            try:
                handle = os.pidfd_open(process)
            except ProcessLookupError:
                gone.add(rank)
                continue
            except (OSError, AttributeError):  # a kernel without, or that forbids it
                continue
            stack.callback(os.close, handle)
            watch.register(handle, select.POLLIN)
            ranks[handle] = rank
        ended = watch.poll(0 if gone else _PATIENCE_MS)
        return gone | {ranks[handle] for handle, _ in ended}


def _process_of(rank: int) -> str:
    return f"{_KEY}/{rank}/process"


def _end_of(rank: int) -> str:
    return f"{_KEY}/{rank}/end"


def _boot() -> str:
    """Returns what tells a machine from another of the same name, or "" where none is told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_namespace() -> str:
    """Returns what tells a container's process numbers from the next one's."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
