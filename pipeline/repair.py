"""Repairs a cache: finds what is damaged by its hashes, and has stage 1 make exactly that again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache.damage import Damage, find_damage, finish_repair, uncommit
from cache.layout import PROVENANCE_FILE, load_plan, load_provenance
from cache.neighbors import NeighborSettings
from cache.spec import CacheError, CorruptCacheError
from pipeline.build import cache_teacher
from pipeline.executor import Executor
from pipeline.neighbor_stage import ensure_neighbors
from pipeline.request import CacheRequest, recorded_request


@dataclass(frozen=True)
class RepairSummary:
    """What was damaged and is whole again."""

    path: Path
    repaired: tuple[str, ...]
    merkle_root: str
    same_bytes: bool
    """False only if the old root was lost with the seal, so that nothing could be compared."""

    def lines(self) -> list[str]:
        """Returns the repair as a person reads it."""
        if not self.repaired:
            return [f"{self.path}: nothing is damaged"]
        ending = (
            "the same bytes as before"
            if self.same_bytes
            else "sealed anew (the old seal was lost, so nothing could be compared)"
        )
        return [*(f"repaired  {name}" for name in self.repaired), f"{self.path}: {ending}"]

    def as_json(self) -> dict[str, Any]:
        """Returns the repair as plain data."""
        return dict(vars(self))


def repair_cache(
    path: Path,
    *,
    shards: Sequence[int] = (),
    data_root: Path | None = None,
    device: str = "auto",
    workers: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> RepairSummary:
    """Returns what was made again; the cache is sealed, with the root that it had.

    Args:
        path: the cache.
        shards: look at these alone; none: at every file.
        data_root: where the pictures lie now; None: where they lay.
        device: where the teacher runs.
        workers: see `CacheRequest.executor`.
        say: told in a line what is going on.

    Raises:
        StaleCacheError: the pictures, the teacher or the proposals are not what they were.
        CorruptCacheError: other bytes came out than were sealed, or the provenance is damaged.
        CacheError, DkdetrError: as `cache_teacher`.
    """
    damage = find_damage(path, shards=shards or None)
    if not damage.any:
        return RepairSummary(path, (), damage.old_root or "", same_bytes=True)
    say(f"damaged: {', '.join(damage.lines())}")
    request = _request_of(path, damage)
    if data_root is not None:
        request = replace(request, data_root=data_root)
    request = replace(request, out=path, device=device, executor=Executor(workers=workers))
    uncommit(damage)
    summary = cache_teacher(replace(request, neighbors=False), say)
    finish_repair(damage, summary.merkle_root)
    if damage.neighbors:
        ensure_neighbors(path, NeighborSettings(), rebuild=True)
    return RepairSummary(
        path, tuple(damage.lines()), summary.merkle_root, same_bytes=damage.old_root is not None
    )


def _request_of(path: Path, damage: Damage) -> CacheRequest:
    try:
        record = load_provenance(path).get("request")
    except (FileNotFoundError, CorruptCacheError):
        raise CorruptCacheError(
            f"{path / PROVENANCE_FILE} is lost, and with it how the cache was made; next: run its "
            f"own cache-teacher command again after deleting the files of {damage.lines()}"
        ) from None
    request = recorded_request(record, path)
    try:
        # `auto` is settled by the device; the cache knows what it was settled to.
        crop_batch = load_plan(path).batch_layout.get("crop_batch")
    except (FileNotFoundError, CacheError):
        return request
    return replace(request, crop_batch=crop_batch)
