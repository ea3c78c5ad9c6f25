"""What is damaged in a cache, and taking it out of the commit so that stage 1 makes it again.

Whatever decides a byte of a cache is in its fingerprint or in the request that its provenance
keeps, so the remade files are the lost ones; the seal that was there before says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.beginning import break_bad_seal, readable_seal, repair_goal, stale_cache
from cache.durable import dump_checked_json, load_checked_json, sync_folder, write_atomic
from cache.exported import refuse_export
from cache.layout import (
    CACHE_FILE,
    COMPLETE_FILE,
    PLAN_FILE,
    PROVENANCE_FILE,
    REPAIR_NOTE,
    TEXT_MANIFEST,
    Head,
    Seal,
    leaf_problem,
    load_plan,
    text_problems,
)
from cache.location import local_folder
from cache.lock import Lease
from cache.manifest import MANIFEST_FOLDER, ShardManifest, committed_shards, manifest_file
from cache.neighbor_lists import load_neighbors
from cache.spec import (
    CacheError,
    CorruptCacheError,
    diff_parts,
    fingerprint,
    split_text_parts,
)


@dataclass(frozen=True)
class Damage:
    """What is not as it was committed; roots and fingerprint are the seal's, if it can be read."""

    path: Path
    files: tuple[str, ...]
    """Small files, by name inside the cache; the text counts as its manifest, a seal that was
    never written as COMPLETE.json."""
    shards: tuple[int, ...]
    neighbors: bool
    old_root: str | None
    old_data_root: str | None
    fingerprint: str | None

    @property
    def any(self) -> bool:
        """Returns True if anything is damaged."""
        return bool(self.files or self.shards or self.neighbors)

    def lines(self) -> list[str]:
        """Returns the damage in words."""
        words = [f"shard {shard:06d}" for shard in self.shards] + list(self.files)
        return [*words, "neighbour lists"] if self.neighbors else words


def find_damage(
    path: Path,
    *,
    shards: Sequence[int] | None = None,
    on_shard: Callable[[int, int], None] = lambda _done, _total: None,
) -> Damage:
    """Returns what is damaged, by the hashes of all files, or of some shards' alone.

    Args:
        path: the cache.
        shards: which shards to hash; None: all, and every other file.
        on_shard: called as `on_shard(done, total)` after each shard.

    Raises:
        CacheError: there is no cache, or no such shard.
    """
    local_folder(path, to="repair")
    refuse_export(path)
    # The note alone: a repair was killed after it had taken out what began the cache.
    if not any((path / name).exists() for name in (CACHE_FILE, COMPLETE_FILE, REPAIR_NOTE)):
        raise CacheError(f"no cache at {path}, nothing to repair")
    seal = readable_seal(path)
    everything = shards is None
    files = _bad_files(path, seal) if everything else []
    num_shards = _num_shards(path, seal)
    wanted = range(num_shards) if shards is None else shards
    foreign = [shard for shard in wanted if not 0 <= shard < num_shards]
    if foreign:
        raise CacheError(f"no shard {foreign[0]}: {path} has {num_shards}")
    bad: list[int] = []
    for done, shard in enumerate(wanted, start=1):
        if _is_bad(path, shard, seal):
            bad.append(shard)
        on_shard(done, len(wanted))
    goal = repair_goal(path)
    if seal is None and not goal and PLAN_FILE in files:
        # Nothing says any more which image a row belongs to, and no root will tell whether the
        # plan that is made anew is the old one.
        bad = committed_shards(path)
    old_root = seal.merkle_root if seal else goal.get("merkle_root")
    old_data_root = seal.data_root if seal else goal.get("data_root")
    made_from = seal.fingerprint if seal else goal.get("fingerprint")
    neighbors = everything and _bad_neighbors(path, seal)
    return Damage(path, tuple(files), tuple(bad), neighbors, old_root, old_data_root, made_from)


def uncommit(damage: Damage, parts: Mapping[str, Any] | None = None) -> None:
    """Removes what is damaged, so that stage 1 makes it anew; what is whole stays committed.

    Neighbour lists stay where they are: who builds them anew replaces them.

    Args:
        damage: what was found.
        parts: what it would be made from anew; None: its maker compares them later.

    Raises:
        CacheLockedError: another process writes the cache.
        StaleCacheError: the cache was made from other parts; nothing was removed.
    """
    path = damage.path
    with Lease(path):
        if parts is not None:
            _refuse_others(damage, split_text_parts(parts)[0])
        if damage.old_root is not None:
            # A repair that is cut short must still know what it has to arrive at.
            goal = {
                "merkle_root": damage.old_root,
                "data_root": damage.old_data_root,
                "fingerprint": damage.fingerprint,
            }
            note = dump_checked_json(goal)
            write_atomic(path / REPAIR_NOTE, note)
        for name in damage.files:
            (path / name).unlink(missing_ok=True)
        for shard in damage.shards:
            (path / manifest_file(shard)).unlink(missing_ok=True)
        for folder in (path, path / MANIFEST_FOLDER):
            if folder.is_dir():
                sync_folder(folder)
        break_bad_seal(path)


def _refuse_others(damage: Damage, parts: Mapping[str, Any]) -> None:
    """Raises StaleCacheError if the cache was made from other parts, as far as it knows its own."""
    wanted = fingerprint(parts)
    try:
        head = Head.load(damage.path)
    except (FileNotFoundError, CorruptCacheError):
        if damage.fingerprint not in (None, wanted):
            told = f"fingerprint  cache: {damage.fingerprint}  wanted: {wanted}"
            raise stale_cache(damage.path, [told], repairing=True) from None
        return
    if head.fingerprint != wanted:
        raise stale_cache(damage.path, diff_parts(head.parts, parts), repairing=True)


def finish_repair(damage: Damage, new_root: str) -> None:
    """Forgets the repair if it has restored the bytes that were sealed before.

    Raises:
        CorruptCacheError: it has made others.
    """
    (damage.path / REPAIR_NOTE).unlink(missing_ok=True)
    if damage.old_root not in (None, new_root):
        raise CorruptCacheError(
            f"{damage.path} was repaired, but not to the same bytes: its root was "
            f"{damage.old_root} and is {new_root}. The device or a library rounds otherwise than "
            "where the cache was made. The cache is sealed and whole; runs made from the old one "
            "are not its runs; next: dkdetr cache diff with a copy tells how far they differ"
        )


def _num_shards(path: Path, seal: Seal | None) -> int:
    if seal is not None:
        return seal.num_shards
    try:
        return load_plan(path).num_shards
    except (FileNotFoundError, CorruptCacheError):
        return max(committed_shards(path), default=-1) + 1


def _bad_files(path: Path, seal: Seal | None) -> list[str]:
    if seal is None:
        bad = [name for name in (CACHE_FILE, PLAN_FILE) if not _checks_itself(path / name)]
        bad.append(COMPLETE_FILE)
    else:
        shards = (f"{MANIFEST_FOLDER}/", TEXT_MANIFEST)
        bad = [
            name
            for name, wanted in seal.leaves.items()
            if not name.startswith(shards) and leaf_problem(path, name, wanted)
        ]
    sealed_text = seal is None or not leaf_problem(path, TEXT_MANIFEST, seal.leaves[TEXT_MANIFEST])
    if not sealed_text or text_problems(path):
        bad.append(TEXT_MANIFEST)
    # All of these are written anew from the request, the manifests and the plan. The request
    # itself is here, and nothing but its own command brings it back.
    if not _checks_itself(path / PROVENANCE_FILE):
        bad.append(PROVENANCE_FILE)
    return bad


def _checks_itself(file: Path) -> bool:
    try:
        load_checked_json(file)
    except (FileNotFoundError, CorruptCacheError):
        return False
    return True


def _is_bad(path: Path, shard: int, seal: Seal | None) -> bool:
    if seal is not None:
        name = manifest_file(shard)
        if leaf_problem(path, name, seal.leaves[name]):
            return True
    try:
        manifest = ShardManifest.load(path, shard)
    except (FileNotFoundError, CorruptCacheError):
        return True
    return manifest.fingerprint != _fingerprint(path, seal, manifest) or bool(
        manifest.problems(path)
    )


def _fingerprint(path: Path, seal: Seal | None, manifest: ShardManifest) -> str:
    """Returns the cache's fingerprint; the manifest's own, if the cache has forgotten it."""
    try:
        return seal.fingerprint if seal else Head.load(path).fingerprint
    except (FileNotFoundError, CorruptCacheError):
        return manifest.fingerprint


def _bad_neighbors(path: Path, seal: Seal | None) -> bool:
    if seal is None:
        return False
    try:
        load_neighbors(path, data_root=seal.data_root)
    except CacheError:
        return True
    return False
