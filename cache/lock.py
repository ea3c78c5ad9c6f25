"""The lease on a cache: one writer at a time, over processes and hosts, and none after a crash.

The lease is a small file that a thread touches every few seconds. It is stale when its process is
known to be dead (same host, same boot, same process namespace) or when it has not been touched
for a minute; then the next writer takes it over. Ages are differences of file times on the
cache's own file system, so hosts whose clocks differ agree on them.
"""

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from cache.durable import write_atomic
from cache.spec import CacheLockedError

LOCK_FILE = ".lock"
_GUARD_FILE = ".lock.guard"
HEARTBEAT_S = 5.0
STALE_AFTER_S = 60.0
_GUARD_WAIT_S = 1.0


@dataclass(frozen=True)
class LeaseHolder:
    """Who holds a lease. `namespace` and `started_ticks` tell a process from a later namesake."""

    host: str
    pid: int
    boot_id: str
    namespace: str
    started_ticks: str
    since: str
    token: str


class Lease:
    """A context manager that holds the lease of the cache at `path`.

    Raises:
        CacheLockedError: another process holds it; says who, since when, and the heartbeat's age.
    """

    def __init__(
        self,
        path: Path,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        stale_after_s: float = STALE_AFTER_S,
    ) -> None:
        self._path = path
        self._file = path / LOCK_FILE
        self._heartbeat_s = heartbeat_s
        self._stale_after_s = stale_after_s
        self._holder: LeaseHolder | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        guard = self._path / _GUARD_FILE
        try:
            with FileLock(guard, timeout=_GUARD_WAIT_S):
                self._acquire(guard)
        except Timeout:
            raise CacheLockedError(
                f"the cache {self._path} is being taken by another process at this moment"
            ) from None
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="cache-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lease back; does nothing if it is no longer ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.held():
            self._file.unlink(missing_ok=True)
        self._holder = None

    def held(self) -> bool:
        """Returns True while this process holds the lease (a long sleep can lose it)."""
        holder = self._holder
        if holder is None or holder.pid != os.getpid():
            return False
        found = _read_holder(self._file)
        return found is not None and found.token == holder.token

    def check(self) -> None:
        """Returns if the lease is still ours, else raises CacheLockedError."""
        if not self.held():
            raise CacheLockedError(
                f"this process lost its lease on {self._path}: it did not answer for more than "
                f"{self._stale_after_s:.0f} s and another writer took over"
            )

    def _acquire(self, guard: Path) -> None:
        if self._file.exists():
            found = _read_holder(self._file)
            age = _age(self._file, guard)
            if found is not None and not _is_dead(found) and age < self._stale_after_s:
                raise CacheLockedError(
                    f"the cache {self._path} is held by {found.host}:{found.pid} since "
                    f"{found.since}, heartbeat {age:.0f} s ago. Two writers would spoil it: wait "
                    "until that command is done, or stop it and run this one again"
                )
        holder = _this_process()
        write_atomic(self._file, json.dumps(asdict(holder)).encode())
        self._holder = holder

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            try:
                if not self.held():
                    return
                os.utime(self._file)
            except OSError:
                # The file system may be away for a moment; an older heartbeat says just that.
                continue


def _read_holder(file: Path) -> LeaseHolder | None:
    """Returns the holder that a lease file names, or None if it is gone or unreadable."""
    try:
        return LeaseHolder(**json.loads(file.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _age(file: Path, guard: Path) -> float:
    os.utime(guard)  # "now" in the file system's own time
    try:
        return guard.stat().st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _is_dead(holder: LeaseHolder) -> bool:
    if holder.host != socket.gethostname():
        return False
    here = _this_process()
    if holder.boot_id != here.boot_id:
        # The same host name under another boot: a restart, or two containers named alike on two
        # machines. Only the heartbeat can tell.
        return False
    if holder.namespace != here.namespace:
        return False
    return _started_ticks(holder.pid) != holder.started_ticks


def _this_process() -> LeaseHolder:
    pid = os.getpid()
    now = datetime.fromtimestamp(time.time(), UTC)
    return LeaseHolder(
        host=socket.gethostname(),
        pid=pid,
        boot_id=_read_line(Path("/proc/sys/kernel/random/boot_id")),
        namespace=_process_namespace(),
        started_ticks=_started_ticks(pid),
        since=now.isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
    )


def _process_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started_ticks(pid: int) -> str:
    """Returns when a process started, in ticks since boot; "" if it is gone or a zombie."""
    if not Path("/proc/self/stat").exists():
        return "unknown" if _answers(pid) else ""
    stat = _read_line(Path(f"/proc/{pid}/stat"))
    after_name = stat.rpartition(")")[2].split()
    if len(after_name) < 20 or after_name[0] in ("Z", "X"):
        return ""
    return after_name[19]


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read_line(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
