"""Repairs a cache: finds what is damaged by its hashes, and has stage 1 make exactly that again."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache.damage import Damage, find_damage, finish_repair, uncommit
from cache.layout import PROVENANCE_FILE, Head, load_plan, load_provenance
from cache.spec import CacheError, CorruptCacheError
from dkdetr.data.splits import load_split
from dkdetr.progress import progress_of
from pipeline.build import Repair, cache_teacher
from pipeline.executor import Executor
from pipeline.import_cache import ImportRequest, import_cache, recorded_import
from pipeline.neighbor_stage import ensure_neighbors, recorded_settings
from pipeline.network_check import why_lost
from pipeline.pre_checks import check_trainable
from pipeline.proposal_sources import NETWORK_FILE, parse_proposals
from pipeline.request import CacheRequest, recorded_request


@dataclass(frozen=True)
class RepairSummary:
    """What was damaged and is whole again."""

    path: Path
    repaired: tuple[str, ...]
    merkle_root: str
    same_bytes: bool
    """False only if there was no seal, or none that can be read, so nothing could be compared."""

    def lines(self) -> list[str]:
        """Returns the repair as a person reads it."""
        if not self.repaired:
            return [f"{self.path}: nothing is damaged"]
        ending = (
            "the same bytes as before"
            if self.same_bytes
            else "sealed (there was no seal to compare it with)"
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

    What is damaged is taken out once all is there that makes it again: pictures, teacher and
    proposals as they were, a network of `fit` that was lost or damaged trained anew; of an import
    its files.

    Args:
        path: the cache.
        shards: look at these alone, and at a network of `fit` if they are damaged; none: at all.
        data_root: where the pictures lie now; None: where they lay.
        device: where the teacher runs.
        workers: see `CacheRequest.executor`; an import knows none.
        say: told in a line what is going on.

    Raises:
        StaleCacheError: the pictures, the teacher or the proposals are not what they were.
        CorruptCacheError: other bytes came out than were sealed; or the provenance is lost, and
            what else is damaged was taken out for the cache's own command to make.
        CacheError, DkdetrError: as `cache_teacher`.
    """
    with progress_of("look for damage") as advance:
        damage = find_damage(path, shards=shards or None, on_shard=advance)
    network = why_lost(path) if damage.any or not shards else ""
    if not damage.any and not network:
        return RepairSummary(path, (), damage.old_root or "", same_bytes=True)
    names = (*damage.lines(), *([NETWORK_FILE] if network else ()))
    say(f"damaged: {', '.join(names)}")
    neighbors = recorded_settings(path)
    root = damage.old_root
    if damage.files or damage.shards or network:
        request = _request_of(path, damage)
        if data_root is not None:
            request = replace(request, data_root=data_root)
        request = replace(request, out=path)
        if isinstance(request, ImportRequest):
            root = import_cache(request, say, damage).merkle_root
        else:
            # What was set aside is under the root that is compared: no limit beside it.
            executor = Executor(workers=workers)
            request = replace(request, device=device, executor=executor, max_bad=1.0)
            root = _make_again(request, damage, network, say)
        finish_repair(damage, root)
    if damage.neighbors:
        ensure_neighbors(path, neighbors)
    return RepairSummary(path, names, root or "", same_bytes=damage.old_root is not None)


def _make_again(
    request: CacheRequest, damage: Damage, network: str, say: Callable[[str], None]
) -> str:
    """Returns the root of the cache, sealed again; `network` is why that of `fit` is lost.

    A lost one is trained anew beside its place, and takes it once stage 1 has found it to be the
    cache's own: hours later, and on another device, it may be none of it.
    """
    spec = parse_proposals(request.proposals)
    if network:
        split = load_split(request.split, request.data_root)
        check_trainable(request, split, spec, lost=True)
        say(network)
        say("the network of fit is trained anew; nothing is taken out of the cache before")
    return cache_teacher(request, say, Repair(damage, network_lost=bool(network))).merkle_root


def _request_of(path: Path, damage: Damage) -> CacheRequest | ImportRequest:
    try:
        provenance = load_provenance(path)
    except (FileNotFoundError, CorruptCacheError):
        # Nobody can open it as it is, so nothing is lost by this.
        uncommit(damage)
        raise CorruptCacheError(
            f"{path / PROVENANCE_FILE} is lost or damaged, and with it how the cache was made; "
            "next: run its own cache-teacher (or cache import) command again, which writes it and "
            f"makes what is damaged: {', '.join(damage.lines())}"
        ) from None
    record = provenance.get("request")
    if "imported" in provenance:
        return recorded_import(record, path)
    request = recorded_request(record, path)
    # `auto` is settled by the device; the cache knows what it was settled to.
    for batch_layout in (
        lambda: load_plan(path).batch_layout,
        lambda: Head.load(path).parts["batch_layout"],
    ):
        with contextlib.suppress(FileNotFoundError, CacheError):
            return replace(request, crop_batch=batch_layout().get("crop_batch"))
    return request
