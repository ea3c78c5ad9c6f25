"""What is damaged in a cache, and taking it out of the commit so that stage 1 makes it again.

Whatever decides a byte of a cache is in its fingerprint or in the request that its provenance
keeps, so the remade files are the lost ones; the seal that was there before says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.arrays import DATA_FOLDER
from cache.beginning import break_bad_seal
from cache.durable import load_checked_json, sync_folder
from cache.exported import refuse_export
from cache.layout import (
    CACHE_FILE,
    COMPLETE_FILE,
    PLAN_FILE,
    QUARANTINE_FILE,
    TEXT_MANIFEST,
    Head,
    Seal,
    leaf_problem,
    load_plan,
    text_problems,
)
from cache.location import local_folder
from cache.lock import Lease
from cache.manifest import MANIFEST_FOLDER, ShardManifest, manifest_file
from cache.neighbor_lists import NEIGHBORS_MANIFEST, load_neighbors
from cache.spec import CacheError, CorruptCacheError


@dataclass(frozen=True)
class Damage:
    """What is not as it was committed. `old_root` is the seal's, where the seal can be read."""

    path: Path
    files: tuple[str, ...]
    """Small files, by name inside the cache; the text counts as its manifest."""
    shards: tuple[int, ...]
    neighbors: bool
    old_root: str | None

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
    if not (path / CACHE_FILE).exists() and not (path / COMPLETE_FILE).exists():
        raise CacheError(f"no cache at {path}, nothing to repair")
    seal = _load_seal(path)
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
    old_root = seal.merkle_root if seal else None
    neighbors = everything and _bad_neighbors(path, seal)
    return Damage(path, tuple(files), tuple(bad), neighbors, old_root)


def uncommit(damage: Damage) -> None:
    """Removes what is damaged, so that stage 1 makes it anew; what is whole stays committed.

    Raises:
        CacheLockedError: another process writes the cache.
    """
    path = damage.path
    with Lease(path):
        for name in damage.files:
            (path / name).unlink(missing_ok=True)
        for shard in damage.shards:
            (path / manifest_file(shard)).unlink(missing_ok=True)
        if damage.neighbors:
            (path / NEIGHBORS_MANIFEST).unlink(missing_ok=True)
        for folder in (path, path / MANIFEST_FOLDER):
            if folder.is_dir():
                sync_folder(folder)
        break_bad_seal(path)


def _load_seal(path: Path) -> Seal | None:
    try:
        return Seal.load(path)
    except (FileNotFoundError, CorruptCacheError):
        return None


def _num_shards(path: Path, seal: Seal | None) -> int:
    if seal is not None:
        return seal.num_shards
    try:
        return load_plan(path).num_shards
    except (FileNotFoundError, CorruptCacheError):
        return len(list((path / MANIFEST_FOLDER).glob("*.json")))


def _bad_files(path: Path, seal: Seal | None) -> list[str]:
    if seal is None:
        bad = [name for name in (CACHE_FILE, PLAN_FILE) if not _checks_itself(path / name)]
        if (path / COMPLETE_FILE).exists():
            bad.append(COMPLETE_FILE)
    else:
        shards = (f"{MANIFEST_FOLDER}/", TEXT_MANIFEST)
        bad = [
            name
            for name, wanted in seal.leaves.items()
            if not name.startswith(shards) and leaf_problem(path, name, wanted)
        ]
    whole_text = seal is None or not leaf_problem(path, TEXT_MANIFEST, seal.leaves[TEXT_MANIFEST])
    if not whole_text or ((path / TEXT_MANIFEST).exists() and text_problems(path)):
        bad.append(TEXT_MANIFEST)
    # The quarantine is merged from the manifests, and zarr.json written from the plan, each time.
    return [name for name in bad if (path / name).exists() or name in _MADE_ANEW or _is_zarr(name)]


_MADE_ANEW = (CACHE_FILE, PLAN_FILE, QUARANTINE_FILE, TEXT_MANIFEST)


def _is_zarr(name: str) -> bool:
    return name.startswith(f"{DATA_FOLDER}/")


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
        head = Head.load(path)
    except FileNotFoundError:
        return True
    except CorruptCacheError:
        return seal is None or _checks_itself(path / CACHE_FILE)
    return manifest.fingerprint != head.fingerprint or bool(manifest.problems(path))


def _bad_neighbors(path: Path, seal: Seal | None) -> bool:
    if seal is None:
        return False
    try:
        load_neighbors(path, data_root=seal.data_root)
    except CacheError:
        return True
    return False
