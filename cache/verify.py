"""Checking a cache from end to end: every file against its hash, every row against the rules."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache.arrays import DATA_FOLDER, array_specs, gt_rows_of_shard
from cache.exported import is_export, open_export, require_finished_export
from cache.layout import Head, Seal, load_plan, load_provenance, seal_problems
from cache.layout import text_problems as find_text_problems
from cache.location import CachePath, cache_path
from cache.manifest import ShardManifest
from cache.mapped import FlatReader
from cache.neighbor_lists import load_neighbors
from cache.plan import Plan
from cache.rows import ImageRows, rows_problem
from cache.shard_reader import ArrayReader, Shard
from cache.spec import CacheError, CorruptCacheError
from cache.store import why_unsealed


@dataclass(frozen=True)
class VerifyReport:
    """What was found. `problems` is empty for a good cache; each line names a file or a shard."""

    path: CachePath
    sealed: bool
    unfinished: bool
    """Whether all that is wrong is that it was not finished: no seal, shards not committed."""
    problems: Sequence[str]
    num_shards: int
    num_images: int
    num_regions: int
    num_gt: int
    num_quarantined: int

    @property
    def good(self) -> bool:
        """Returns True if nothing is wrong."""
        return not self.problems


def verify_cache(
    path: CachePath | str,
    *,
    on_shard: Callable[[int, int], None] = lambda _done, _total: None,
) -> VerifyReport:
    """Returns what is wrong with a cache, finished or not, after reading every byte of it.

    Args:
        path: the cache, or an export of one; a folder or a URL.
        on_shard: called as `on_shard(done, total)` after each shard.

    Raises:
        CacheError: there is no cache, or its head cannot be read; UnsealedCacheError for an export
            that was not finished.
    """
    path = cache_path(path)
    if is_export(path):
        with contextlib.suppress(CorruptCacheError):  # listed below, beside what else is wrong
            require_finished_export(path)
    try:
        head, plan = Head.load(path), load_plan(path)
    except FileNotFoundError:
        raise CacheError(why_unsealed(path)) from None
    checker = _Checker(path, head, plan)
    sealed = checker.check_head()
    for shard in range(plan.num_shards):
        checker.check_shard(shard)
        on_shard(shard + 1, plan.num_shards)
    return VerifyReport(
        path=path,
        sealed=sealed,
        unfinished=checker.unfinished,
        problems=tuple(checker.problems),
        num_shards=plan.num_shards,
        num_images=plan.num_images,
        num_regions=checker.num_regions,
        num_gt=checker.num_gt,
        num_quarantined=checker.num_quarantined,
    )


class _Checker:
    def __init__(self, path: CachePath, head: Head, plan: Plan) -> None:
        self._path, self._head, self._plan = path, head, plan
        self._flat: FlatReader | None = None
        self._exported = is_export(path)
        self.problems: list[str] = []
        self._not_made = 0
        self.num_regions = self.num_gt = self.num_quarantined = 0

    @property
    def unfinished(self) -> bool:
        """Returns True if something was not made yet, and all that was made is good.

        What a seal vouches for was made: the seal's own line says that it is lost.
        """
        return 0 < self._not_made == len(self.problems)

    def check_head(self) -> bool:
        """Checks all but the shards; returns True if there is a seal."""
        seal = None
        try:
            seal = Seal.load(self._path)
        except FileNotFoundError:
            self.problems.append(why_unsealed(self._path))
            self._not_made += 1
        except CorruptCacheError as error:
            self.problems.append(str(error))
        if seal is not None:
            self.problems += seal_problems(
                self._path, seal, without=self._not_exported(seal) if self._exported else ()
            )
            self.problems += find_text_problems(self._path)
            if seal.fingerprint != self._head.fingerprint:
                self.problems.append(f"{self._path}: COMPLETE.json seals another cache")
            root = seal.data_root
            self._check("neighbour lists", lambda: load_neighbors(self._path, data_root=root))
            if self._exported:
                self._check("mapped files", lambda: self._map(seal))
        self._check("provenance", lambda: load_provenance(self._path))
        return seal is not None

    def check_shard(self, shard: int) -> None:
        """Checks a shard's files, then every row of it."""
        try:
            manifest = ShardManifest.load(self._path, shard)
        except FileNotFoundError:
            self.problems.append(f"shard {shard:06d} was not committed")
            self._not_made += 1
            return
        except CorruptCacheError as error:
            self._add(str(error))
            return
        if manifest.fingerprint != self._head.fingerprint:
            self.problems.append(f"shard {shard:06d} belongs to another cache")
            return
        problems = self._shard_problems(shard, manifest)
        if problems:
            self.problems += problems
            return
        self._check_rows(shard, manifest)

    def _shard_problems(self, shard: int, manifest: ShardManifest) -> list[str]:
        if self._flat is not None:
            return self._flat.block_problems(shard)
        if self._exported:
            return [f"shard {shard:06d} cannot be read from this export"]
        problems = manifest.problems(self._path)
        return problems + self._bad_chunks(shard) if problems else []

    def _check_rows(self, shard: int, manifest: ShardManifest) -> None:
        read = self._row_reader(shard)
        num_regions = num_gt = 0
        for place, image_id in enumerate(self._plan.shard_image_ids(shard)):
            rows = read(place)
            where = f"shard {shard:06d}: image {image_id}"
            if rows.image_id != image_id:
                self.problems.append(f"{where}: its row belongs to image {rows.image_id}")
                continue
            num_regions += rows.num_regions
            num_gt += len(rows.gt_boxes_xyxy)
            if str(image_id) in manifest.quarantined:
                self.num_quarantined += 1
                continue
            problem = rows_problem(rows, self._plan)
            if problem is not None:
                self.problems.append(f"{where}: {problem}")
        if (num_regions, num_gt) != (manifest.num_regions, manifest.num_gt):
            self.problems.append(f"shard {shard:06d}: its manifest counts other rows than it has")
        self.num_regions += num_regions
        self.num_gt += num_gt

    def _row_reader(self, shard: int) -> Callable[[int], ImageRows]:
        if self._flat is None:
            return Shard(self._path, self._plan, shard).rows
        flat, start = self._flat, self._plan.shard_rows(shard).start
        return lambda place: flat.rows(start + place)

    def _map(self, seal: Seal) -> None:
        self._flat = open_export(self._path, self._plan, seal)

    @staticmethod
    def _not_exported(seal: Seal) -> list[str]:
        return [name for name in seal.leaves if name.startswith(f"{DATA_FOLDER}/")]

    def _bad_chunks(self, shard: int) -> list[str]:
        """Returns the first bad chunk of each array of a shard, found by its checksum."""
        found: list[str] = []
        for spec in array_specs(self._plan):
            rows = gt_rows_of_shard(self._plan) if spec.ragged else self._plan.shard_size
            try:
                ArrayReader(self._path, spec, shard, rows).check()
            except CorruptCacheError as error:
                found.append(str(error))
        return found

    def _check(self, what: str, load: Callable[[], object]) -> None:
        try:
            load()
        except FileNotFoundError:
            self.problems.append(f"{self._path}: the {what} are missing")
        except CacheError as error:
            self._add(str(error))

    def _add(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
