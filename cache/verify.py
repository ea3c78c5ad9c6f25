"""Checking a cache from end to end: every file against its hash, every row against the rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from cache.arrays import array_specs, rows_of
from cache.layout import Head, Seal, load_plan, load_provenance, seal_problems
from cache.layout import text_problems as find_text_problems
from cache.manifest import ShardManifest
from cache.neighbor_lists import load_neighbors
from cache.plan import Plan
from cache.rows import ImageRows, rows_problem
from cache.shard_reader import ShardReader
from cache.spec import CacheError, CorruptCacheError
from cache.store import why_unsealed

RECALL_CUTOFFS = (20, 100, 300)
_RECALL_IOU = 0.5
_NO_BOXES: Mapping[int, NDArray[np.float32]] = MappingProxyType({})


@dataclass(frozen=True)
class VerifyReport:
    """What was found. `problems` is empty for a good cache; each line names a file or a shard.

    `recall["base"][100]` is the share of base ground truth that one of an image's best 100
    proposals overlaps by half; `"novel"` is there if novel boxes were given.
    """

    path: Path
    sealed: bool
    problems: Sequence[str]
    num_shards: int
    num_images: int
    num_regions: int
    num_gt: int
    num_quarantined: int
    recall: Mapping[str, Mapping[int, float]]

    @property
    def good(self) -> bool:
        """Returns True if nothing is wrong."""
        return not self.problems


def verify_cache(
    path: Path,
    *,
    novel_boxes: Mapping[int, NDArray[np.float32]] = _NO_BOXES,
    on_shard: Callable[[int, int], None] = lambda _done, _total: None,
) -> VerifyReport:
    """Returns what is wrong with a cache, finished or not, after reading every byte of it.

    Args:
        path: the cache.
        novel_boxes: image id -> boxes [m, 4] in pixels of the original; for the report alone.
        on_shard: called as `on_shard(done, total)` after each shard.

    Raises:
        CacheError: there is no cache, or its head cannot be read.
    """
    try:
        head, plan = Head.load(path), load_plan(path)
    except FileNotFoundError:
        raise CacheError(why_unsealed(path)) from None
    checker = _Checker(path, head, plan, novel_boxes)
    sealed = checker.check_head()
    for shard in range(plan.num_shards):
        checker.check_shard(shard)
        on_shard(shard + 1, plan.num_shards)
    return VerifyReport(
        path=path,
        sealed=sealed,
        problems=tuple(checker.problems),
        num_shards=plan.num_shards,
        num_images=plan.num_images,
        num_regions=checker.num_regions,
        num_gt=checker.num_gt,
        num_quarantined=checker.num_quarantined,
        recall={name: tally.shares() for name, tally in checker.tallies.items()},
    )


class RecallTally:
    """Counts ground-truth boxes, and those covered by the best 20, 100, 300 proposals."""

    def __init__(self) -> None:
        self._total = 0
        self._covered = dict.fromkeys(RECALL_CUTOFFS, 0)

    def add(self, boxes_xyxy: NDArray[np.float32], gt_boxes_xyxy: NDArray[np.float32]) -> None:
        """Adds one image: its proposals, best first, and its ground truth."""
        self._total += len(gt_boxes_xyxy)
        hits = _pairwise_iou(boxes_xyxy, gt_boxes_xyxy) >= _RECALL_IOU
        for cutoff in RECALL_CUTOFFS:
            self._covered[cutoff] += int(hits[:cutoff].any(axis=0).sum())

    def shares(self) -> dict[int, float]:
        """Returns recall by cutoff; NaN where there was no ground truth."""
        if not self._total:
            return dict.fromkeys(RECALL_CUTOFFS, float("nan"))
        return {cutoff: count / self._total for cutoff, count in self._covered.items()}


class _Checker:
    def __init__(
        self, path: Path, head: Head, plan: Plan, novel_boxes: Mapping[int, NDArray[np.float32]]
    ) -> None:
        self._path, self._head, self._plan = path, head, plan
        self._novel_boxes = novel_boxes
        self.problems: list[str] = []
        self.num_regions = self.num_gt = self.num_quarantined = 0
        self.tallies = {"base": RecallTally()}
        if novel_boxes:
            self.tallies["novel"] = RecallTally()

    def check_head(self) -> bool:
        """Checks all but the shards; returns True if there is a seal."""
        seal = None
        try:
            seal = Seal.load(self._path)
        except FileNotFoundError:
            self.problems.append(why_unsealed(self._path))
        except CorruptCacheError as error:
            self.problems.append(str(error))
        if seal is not None:
            self.problems += seal_problems(self._path, seal)
            self.problems += find_text_problems(self._path)
            if seal.fingerprint != self._head.fingerprint:
                self.problems.append(f"{self._path}: COMPLETE.json seals another cache")
            root = seal.data_root
            self._check("neighbour lists", lambda: load_neighbors(self._path, data_root=root))
        self._check("provenance", lambda: load_provenance(self._path))
        return seal is not None

    def check_shard(self, shard: int) -> None:
        """Checks a shard's files, then every row of it."""
        try:
            manifest = ShardManifest.load(self._path, shard)
        except FileNotFoundError:
            self.problems.append(f"shard {shard:06d} was not committed")
            return
        except CorruptCacheError as error:
            self._add(str(error))
            return
        if manifest.fingerprint != self._head.fingerprint:
            self.problems.append(f"shard {shard:06d} belongs to another cache")
            return
        problems = manifest.problems(self._path)
        if problems:
            self.problems += problems + self._bad_chunks(shard)
            return
        self._check_rows(shard, manifest)

    def _check_rows(self, shard: int, manifest: ShardManifest) -> None:
        readers = self._readers(shard)
        num_regions = num_gt = 0
        for place, image_id in enumerate(self._plan.shard_image_ids(shard)):
            rows = rows_of({name: reader.read(place) for name, reader in readers.items()})
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
            self._tally(rows)
        if (num_regions, num_gt) != (manifest.num_regions, manifest.num_gt):
            self.problems.append(f"shard {shard:06d}: its manifest counts other rows than it has")
        self.num_regions += num_regions
        self.num_gt += num_gt

    def _tally(self, rows: ImageRows) -> None:
        self.tallies["base"].add(rows.boxes_xyxy, rows.gt_boxes_xyxy)
        if rows.image_id in self._novel_boxes:
            self.tallies["novel"].add(rows.boxes_xyxy, self._novel_boxes[rows.image_id])

    def _bad_chunks(self, shard: int) -> list[str]:
        """Returns the first bad chunk of each array of a shard, found by its checksum."""
        found: list[str] = []
        for spec in array_specs(self._plan):
            try:
                reader = ShardReader(self._path, spec, shard, self._plan.shard_size)
                for place in range(len(self._plan.shard_rows(shard))):
                    reader.read(place)
            except CorruptCacheError as error:
                found.append(str(error))
        return found

    def _readers(self, shard: int) -> dict[str, ShardReader]:
        size = self._plan.shard_size
        specs = array_specs(self._plan)
        return {spec.name: ShardReader(self._path, spec, shard, size) for spec in specs}

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


def _pairwise_iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns the IoU [len(a), len(b)] of boxes in pixels, xyxy."""
    low = np.maximum(a[:, None, :2], b[None, :, :2]).astype(np.float64)
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.clip(high - low, 0, None)
    inner = sides[..., 0] * sides[..., 1]
    area_a, area_b = (np.prod(x[:, 2:] - x[:, :2], axis=1, dtype=np.float64) for x in (a, b))
    return inner / np.maximum(area_a[:, None] + area_b[None] - inner, 1e-12)
