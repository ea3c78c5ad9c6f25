"""Making a cache: create or resume it under the lease, commit whole shards, seal it.

The order of writes is the protocol (README.md): a shard's files, flushed and hashed, then its
manifest; all manifests, then COMPLETE.json. A kill between any two of them costs at most the
shard in the making.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.arrays import blocks_of
from cache.beginning import (
    break_bad_seal,
    check_repair_goal,
    check_same_cache,
    refuse_foreign_folder,
    write_head,
)
from cache.durable import (
    disk_errors,
    hash_file,
    sweep_partial_files,
    sync_folder,
    write_atomic,
)
from cache.faults import fault_point
from cache.layout import (
    CACHE_FILE,
    COMPLETE_FILE,
    PLAN_FILE,
    QUARANTINE_FILE,
    REPAIR_NOTE,
    TEXT_MANIFEST,
    Head,
    Roots,
    Seal,
    load_plan,
    load_text_manifest,
    merkle_root,
    text_problems,
    write_text_files,
)
from cache.lock import Lease
from cache.manifest import (
    ShardManifest,
    build_manifest,
    manifest_file,
    quarantine_lines,
)
from cache.plan import Plan
from cache.rows import ImageRows, check_rows, empty_rows
from cache.spec import (
    SCHEMA,
    CacheError,
    CorruptCacheError,
    StaleCacheError,
    UnsealedCacheError,
    fingerprint,
    split_text_parts,
)
from cache.zarr_files import metadata_files, shard_files

_NOTHING: Mapping[Any, Any] = MappingProxyType({})


class CacheWriter:
    """A cache being made, and the lease on it; a context manager that gives the lease back."""

    def __init__(
        self,
        path: Path,
        head: Head,
        plan: Plan,
        text_parts: Mapping[str, Any],
        lease: Lease,
        old_roots: Roots | None,
    ) -> None:
        self.path = path
        self.plan = plan
        self.fingerprint = head.fingerprint
        self._text_parts = text_parts
        self._lease = lease
        self.old_roots = old_roots
        self._verified: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.release()

    @property
    def sealed(self) -> bool:
        """Returns True if COMPLETE.json is there."""
        return (self.path / COMPLETE_FILE).exists()

    def missing_shards(self) -> list[int]:
        """Returns the shards that are not committed, or whose files are not as committed.

        Hashes are compared once a shard and writer; of a sealed cache only presence and sizes.
        """
        missing: list[int] = []
        for shard in range(self.plan.num_shards):
            if shard in self._verified:
                continue
            if self._manifest_problems(shard, quick=self.sealed):
                missing.append(shard)
            else:
                self._verified.add(shard)
        return missing

    def commit_shard(
        self,
        shard_index: int,
        rows: Sequence[ImageRows],
        *,
        quarantined: Mapping[int, str] = _NOTHING,
    ) -> ShardManifest:
        """Commits a shard from this process; see the function of the same name."""
        self._lease.check()
        return commit_shard(
            self.path, shard_index, rows,
            quarantined=quarantined, plan=self.plan, fingerprint=self.fingerprint,
        )  # fmt: skip

    def text_is_current(self) -> bool:
        """Returns True if the text that the parts ask for is already in the cache, whole."""
        if text_problems(self.path):
            return False
        return load_text_manifest(self.path)["fingerprint"] == fingerprint(self._text_parts)

    def write_text(self, metadata: Mapping[str, Any], embeddings: NDArray[Any]) -> None:
        """Writes the text under the parts that this writer was opened with."""
        self._lease.check()
        write_text(self.path, metadata, embeddings, parts=self._text_parts)

    def seal(self) -> Seal:
        """Returns the seal after writing quarantine.jsonl and, last of all, COMPLETE.json.

        Of a cache that is sealed already nothing changes, unless a shard was made again.

        Raises:
            UnsealedCacheError: a shard or the text is missing.
            CacheLockedError: the lease was lost.
        """
        self._lease.check()
        manifests: list[ShardManifest] = []
        for shard in range(self.plan.num_shards):
            problems = self._manifest_problems(shard, quick=True)
            if problems:
                raise UnsealedCacheError(
                    f"{self.path} cannot be sealed: {problems[0]}. Run the same cache-teacher "
                    "command again: it makes what is missing"
                )
            manifests.append(ShardManifest.load(self.path, shard))
        problems = text_problems(self.path)
        if problems:
            raise UnsealedCacheError(f"{self.path} cannot be sealed: {problems[0]}")
        sweep_partial_files(self.path)
        write_atomic(self.path / QUARANTINE_FILE, quarantine_lines(manifests))
        fault_point("seal.after_quarantine")
        seal = self._make_seal(manifests)
        if not self.sealed or Seal.load(self.path) != seal:
            seal.write(self.path)
        # Who repairs holds the goal himself; a later repair must not take this one for its own.
        (self.path / REPAIR_NOTE).unlink(missing_ok=True)
        return seal

    def _manifest_problems(self, shard: int, *, quick: bool) -> list[str]:
        try:
            manifest = ShardManifest.load(self.path, shard)
        except FileNotFoundError:
            return [f"shard {shard:06d} was not committed"]
        except CorruptCacheError as error:
            return [str(error)]
        if manifest.fingerprint != self.fingerprint:
            return [f"shard {shard:06d} belongs to another cache"]
        return manifest.problems(self.path, quick=quick)

    def _make_seal(self, manifests: Sequence[ShardManifest]) -> Seal:
        names = [
            CACHE_FILE,
            PLAN_FILE,
            QUARANTINE_FILE,
            *metadata_files(self.plan),
            *(manifest_file(manifest.shard) for manifest in manifests),
        ]
        data = {name: hash_file(self.path / name) for name in names}
        leaves = {**data, TEXT_MANIFEST: hash_file(self.path / TEXT_MANIFEST)}
        return Seal(
            schema=SCHEMA,
            fingerprint=self.fingerprint,
            merkle_root=merkle_root(leaves),
            data_root=merkle_root(data),
            num_images=self.plan.num_images,
            num_regions=sum(manifest.num_regions for manifest in manifests),
            num_shards=self.plan.num_shards,
            leaves=leaves,
        )


def create_or_resume(
    path: Path, *, parts: Mapping[str, Any], plan: Plan, provenance: Mapping[str, Any]
) -> CacheWriter:
    """Returns the writer of the cache at `path`: a new one, or the one begun with the same parts.

    Of a finished cache `missing_shards()` is empty and `sealed` is True.

    Args:
        path: the cache's folder.
        parts: plain JSON data under the names of `spec.PART_NAMES`; `text`, if there, has a
            fingerprint of its own: another text is written anew without touching the shards.
        plan: the rows and shards.
        provenance: plain JSON data that is kept but never compared: host, clock, command.

    Raises:
        StaleCacheError: the folder holds a cache made from other parts; lists the differences.
        CacheLockedError: another process writes it.
        CacheError: the folder holds something else.
    """
    image_parts, text_parts = split_text_parts(parts)
    head = Head(schema=SCHEMA, fingerprint=fingerprint(image_parts), parts=image_parts)
    refuse_foreign_folder(path)
    with disk_errors(str(path)):
        path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lease = stack.enter_context(Lease(path))
        sweep_partial_files(path)
        if (path / CACHE_FILE).exists():
            check_same_cache(path, head, plan)
        else:
            check_repair_goal(path, head)
        write_head(path, head, plan, provenance)
        old_roots = break_bad_seal(path)
        stack.pop_all()
    return CacheWriter(path, head, plan, text_parts, lease, old_roots)


def commit_shard(
    path: Path,
    shard_index: int,
    rows: Sequence[ImageRows],
    *,
    quarantined: Mapping[int, str] = _NOTHING,
    plan: Plan | None = None,
    fingerprint: str | None = None,
) -> ShardManifest:
    """Returns the manifest of a shard once it is committed; a committed one is left as it is.

    Takes no lease: each worker of a run commits shards of its own, and one that is run twice
    writes the same bytes.

    Args:
        path: the cache, made by `create_or_resume`.
        shard_index: which shard.
        rows: of every image of the shard that is not quarantined, in any order.
        quarantined: image id -> why it could not be used; no path of this machine in it.
        plan: the cache's plan, where the caller has read it: reading it for every shard would
            make the whole quadratic in the images.
        fingerprint: of the cache that the rows were made for, by a process that may outlive it.

    Raises:
        StaleCacheError: another cache lies there by now.
        CorruptCacheError: a row must not be cached; names image and array.
        CacheError: the rows are not exactly the shard's images.
        DiskFullError: no room.
    """
    plan, head = plan or load_plan(path), Head.load(path)
    if fingerprint not in (None, head.fingerprint):
        raise StaleCacheError(
            f"shard {shard_index:06d} was made for another cache than lies in {path} now: its "
            "rows are not this one's. next: the same cache-teacher command again"
        )
    try:
        committed = ShardManifest.load(path, shard_index)
    except (FileNotFoundError, CorruptCacheError):
        committed = None
    if committed and committed.fingerprint == head.fingerprint and not committed.problems(path):
        return committed
    images = _in_plan_order(plan, shard_index, rows, quarantined)
    if committed is not None:
        (path / manifest_file(shard_index)).unlink(missing_ok=True)
    fault_point("commit.before_write")
    _write_shard(path, plan, shard_index, images)
    manifest = build_manifest(path, plan, head.fingerprint, shard_index, images, quarantined)
    fault_point("commit.before_manifest")
    manifest.write(path)
    fault_point("commit.after_manifest")
    return manifest


def write_text(
    path: Path,
    metadata: Mapping[str, Any],
    embeddings: NDArray[Any],
    *,
    parts: Mapping[str, Any] = _NOTHING,
) -> None:
    """Writes the text embeddings [C, D]; breaks the seal first, so `seal()` must follow.

    Args:
        path: the cache.
        metadata: plain JSON data: names, prompts, teacher.
        embeddings: unit norm, one row a name.
        parts: what the text's own fingerprint is made of.
    """
    (path / COMPLETE_FILE).unlink(missing_ok=True)
    sync_folder(path)
    write_text_files(path, metadata, np.asarray(embeddings), dict(parts))


def _write_shard(path: Path, plan: Plan, shard_index: int, images: Sequence[ImageRows]) -> None:
    folders: set[Path] = set()
    with disk_errors(f"shard {shard_index:06d}"):
        for name, data in shard_files(plan, shard_index, blocks_of(images, plan)):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path / name, data)
            folders.update(Path(name).parents)
            fault_point("commit.after_file")
        for folder in sorted(folders):
            sync_folder(path / folder)


def _in_plan_order(
    plan: Plan,
    shard_index: int,
    rows: Sequence[ImageRows],
    quarantined: Mapping[int, str],
) -> list[ImageRows]:
    given = {image.image_id: image for image in rows}
    wanted = plan.shard_image_ids(shard_index)
    both = sorted({*given} & {*quarantined})
    lacking = [i for i in wanted if i not in given and i not in quarantined]
    foreign = sorted(({*given} | {*quarantined}) - {*wanted})
    if both or lacking or foreign or len(given) != len(rows):
        raise CacheError(
            f"shard {shard_index:06d} must be committed whole: missing images {lacking[:5]}, "
            f"foreign images {foreign[:5]}, both good and quarantined {both[:5]}, "
            f"{len(rows) - len(given)} given twice"
        )
    for image in rows:
        check_rows(image, plan)
    return [given.get(image_id) or empty_rows(image_id, plan) for image_id in wanted]
