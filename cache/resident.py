"""The selectable regions of a cache in shared memory, loaded once for all processes of a machine.

Regions that overlap a base object are never distilled, whatever the view, so they are left out.
The files lie in the memory file system under the cache's root hash. Each process that opens them
holds a shared lock until it ends; the last one removes them. A guard, held for a moment (or while
the files are written), keeps those who come and those who leave apart. What a killed process left
behind is used by the next run of the same cache, or swept by any other run.
"""

import fcntl
import os
import shutil
import weakref
from pathlib import Path
from typing import IO, Any, Self

from cache.durable import dump_checked_json, load_checked_json, sweep_partial_files, write_atomic
from cache.mapped import FlatReader, row_bytes, write_flat
from cache.plan import Plan
from cache.regions import RegionRows
from cache.spec import CacheError, CorruptCacheError
from cache.store import CacheReader

MEMORY_FOLDER = Path("/dev/shm")  # where Linux keeps shared memory
_RECORD = "RESIDENT.json"
_BESIDE = ("lock", "guard")  # in the order in which they go


class ResidentRegions:
    """A RegionSource over shared memory. Pickles as the place; a copy holds no lock of its own.

    Use `load_resident`; `close`, or the end of the process, gives the memory back once nobody else
    uses it.
    """

    def __init__(self, folder: Path, plan: Plan, lock: IO[bytes] | None) -> None:
        self.folder, self.plan = folder, plan
        self._finalizer = lock and weakref.finalize(self, _let_go, folder, lock)
        record = load_checked_json(folder / _RECORD)
        self._flat = FlatReader(folder, record, plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return ResidentRegions, (self.folder, self.plan, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def regions(self, image_id: int) -> RegionRows:
        """Returns the selectable regions of an image; raises KeyError, CorruptCacheError."""
        row = self.plan.row_of.get(int(image_id))
        if row is None:
            raise KeyError(f"{self.folder} holds no image {image_id}")
        found = self._flat.regions(row)
        if found.image_id != int(image_id):
            raise CorruptCacheError(f"{self.folder}: row {row} belongs to image {found.image_id}")
        return found

    def close(self) -> None:
        """Lets go of the memory; the last process to do so frees it."""
        if self._finalizer is not None:
            self._finalizer()


def load_resident(
    reader: CacheReader, *, max_base_iou: float, memory: Path = MEMORY_FOLDER
) -> ResidentRegions:
    """Returns the regions below `max_base_iou`, loaded now or found loaded by another process.

    Raises:
        CacheError: they do not fit into memory, or the system has no such file system.
        CorruptCacheError: a shard is not what was committed.
    """
    if not memory.is_dir():
        raise CacheError(
            f"resident mode wants shared memory at {memory}, which this system lacks; "
            "next: --set data.cache_mode=stored"
        )
    root = reader.info.merkle_root
    folder = memory / f"{_prefix()}{root[:24]}-{max_base_iou:g}"
    sweep_resident(memory)
    with _guard(folder):
        lock = _lock_file(folder).open("a+b")
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            _fill(folder, reader, max_base_iou)
        except BaseException:
            lock.close()
            _remove(folder)
            raise
    return ResidentRegions(folder, reader.plan, lock)


def sweep_resident(memory: Path = MEMORY_FOLDER) -> int:
    """Removes what killed processes left in memory; returns in how many places that was."""
    # A process killed at its very first or last step leaves a guard alone.
    beside = [file for kind in _BESIDE for file in memory.glob(f"{_prefix()}*.{kind}")]
    return sum(map(_remove_unused, {file.with_suffix("") for file in beside}))


def _prefix() -> str:
    return f"dkdetr-{os.getuid()}-"


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _guard(folder: Path) -> IO[bytes]:
    """Returns the guard of a place in memory, held until it is closed."""
    file = folder.with_name(f"{folder.name}.guard")
    while True:
        stream = file.open("a+b")
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            if os.fstat(stream.fileno()).st_ino == file.stat().st_ino:
                return stream
        except FileNotFoundError:
            pass
        # Whoever left last has unlinked the file that we waited for: take the new one.
        stream.close()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for kind in _BESIDE:
        folder.with_name(f"{folder.name}.{kind}").unlink(missing_ok=True)


def _let_go(folder: Path, lock: IO[bytes]) -> None:
    lock.close()
    _remove_unused(folder)


def _remove_unused(folder: Path) -> bool:
    """Removes a place in memory and returns True if nobody uses it."""
    with _guard(folder):
        try:
            with _lock_file(folder).open("a+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _remove(folder)
    return True


def _fill(folder: Path, reader: CacheReader, max_base_iou: float) -> None:
    if (folder / _RECORD).is_file():
        return
    _require_room(folder.parent, reader, max_base_iou)
    folder.mkdir(mode=0o700, exist_ok=True)
    sweep_partial_files(folder)
    record = write_flat(folder, reader.plan, reader.source, max_base_iou=max_base_iou)
    write_atomic(folder / _RECORD, dump_checked_json(record))


def _require_room(memory: Path, reader: CacheReader, max_base_iou: float) -> None:
    needed = reader.info.num_regions * row_bytes(reader.plan) + 64 * reader.plan.num_images
    free = min(shutil.disk_usage(memory).free, _free_memory())
    if needed > free:
        raise CacheError(
            f"the regions of {reader.path} below base IoU {max_base_iou:g} may take "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of shared memory are free; "
            "next: --set data.cache_mode=stored, on an export (dkdetr cache export) if the disk "
            "is slow"
        )


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise CacheError("/proc/meminfo does not say how much memory is available")
