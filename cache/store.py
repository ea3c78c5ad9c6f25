"""Reading a sealed cache. Nothing is believed because it is there: hashes say what is whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cache.arrays import DATA_FOLDER
from cache.exported import is_export, open_export, require_finished_export
from cache.layout import (
    COMPLETE_FILE,
    QUARANTINE_FILE,
    TEXT_MANIFEST,
    Head,
    Seal,
    leaf_problem,
    load_plan,
    load_provenance,
    load_text_files,
    load_text_manifest,
    made_by,
)
from cache.location import CachePath, cache_path, total_size
from cache.manifest import MANIFEST_FOLDER, ShardManifest, manifest_file
from cache.neighbor_lists import NeighborLists, load_neighbors
from cache.regions import RegionRows
from cache.rows import ImageRows, flipped_problem, norm_problem
from cache.spec import CorruptCacheError, UnsealedCacheError
from cache.zarr_rows import RowSource, ZarrRows

_CHECKED_LATER = (f"{MANIFEST_FOLDER}/", f"{DATA_FOLDER}/")
"""An export has mapped files in place of the data, with hashes of its own."""

RANDOM_TEACHER_KEY = "random"
"""`parts["teacher"]["random"]`: True for a teacher without learned weights."""


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds. `parts` includes those of the text, under `text`."""

    path: CachePath
    split: str
    fingerprint: str
    merkle_root: str
    parts: Mapping[str, Any]
    provenance: Mapping[str, Any]
    num_images: int
    num_regions: int
    max_regions: int
    embed_dim: int
    teacher: str
    random_teacher: bool

    @property
    def bytes_on_disk(self) -> int:
        """Returns the bytes of all files; looks at each, so it is for showing alone."""
        return total_size(self.path)


class CacheReader:
    """The rows of a sealed cache by image id. Pickles as its path and opens itself again.

    Use `open_cache`. It reads Zarr shards or, of an export, mapped files. It holds no lock or
    thread, so loader processes of any start method may use it.
    """

    def __init__(self, path: CachePath) -> None:
        self.path = path
        self.is_export = is_export(path)
        if self.is_export:
            require_finished_export(path)
        self._seal = _load_seal(path)
        self._head = Head.load(path)
        for name in self._seal.leaves:
            if not name.startswith(_CHECKED_LATER if self.is_export else f"{MANIFEST_FOLDER}/"):
                self._check_leaf(name)
        self.plan = load_plan(path)
        if self._seal.fingerprint != self._head.fingerprint:
            raise CorruptCacheError(f"{path}: {COMPLETE_FILE} seals another cache")
        self.source: RowSource = (
            open_export(path, self.plan, self._seal)
            if self.is_export
            else ZarrRows(path, self.plan, self.manifest)
        )
        self.image_ids: NDArray[np.int64] = np.asarray(self.plan.image_ids, np.int64)
        self.quarantined: Mapping[int, str] = _load_quarantine(path)
        self.info = self._make_info()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.path,)

    def rows(self, image_id: int) -> ImageRows:
        """Returns the rows of an image; of a quarantined one, no regions and a NaN embedding.

        Raises:
            KeyError: the cache has no such image.
            CorruptCacheError: names the shard and the file or array.
        """
        row = self._row_of(image_id)
        rows = self.source.rows(row)
        problem = self._rows_problem(rows, int(image_id))
        if problem is not None:
            raise self._bad_row(row, image_id, problem)
        return rows

    def regions(self, image_id: int) -> RegionRows:
        """Returns the regions of an image, embeddings on demand: what training reads.

        Raises:
            KeyError, CorruptCacheError: as `rows`.
        """
        row = self._row_of(image_id)
        found = self.source.regions(row)
        if found.image_id != int(image_id):
            raise self._bad_row(row, image_id, f"its row belongs to image {found.image_id}")
        return found

    def text(self) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """Returns the text's metadata and its embeddings, float32 [C, embed_dim], unit norm."""
        self._check_leaf(TEXT_MANIFEST)
        return load_text_files(self.path)

    def neighbors(self) -> NeighborLists | None:
        """Returns the neighbour lists, or None if none were built; see `load_neighbors`."""
        return load_neighbors(self.path, data_root=self._seal.data_root)

    @property
    def data_root(self) -> str:
        """Returns the Merkle root over all but the text: what neighbour lists are bound to."""
        return self._seal.data_root

    def manifest(self, shard_index: int) -> ShardManifest:
        """Returns the manifest of a shard, as sealed; raises CorruptCacheError."""
        self._check_leaf(manifest_file(shard_index), f"shard {shard_index:06d}: ")
        return ShardManifest.load(self.path, shard_index)

    def _row_of(self, image_id: int) -> int:
        row = self.plan.row_of.get(int(image_id))
        if row is None:
            raise KeyError(f"{self.path} holds no image {image_id}")
        return row

    def _bad_row(self, row: int, image_id: int, problem: str) -> CorruptCacheError:
        return CorruptCacheError(
            f"shard {row // self.plan.shard_size:06d}: image {image_id} in {self.path}: {problem}; "
            f"next: dkdetr cache verify {self.path}"
        )

    def _rows_problem(self, rows: ImageRows, image_id: int) -> str | None:
        if rows.image_id != image_id:
            return f"its row belongs to image {rows.image_id}"
        if image_id in self.quarantined:
            return "it is quarantined and yet has regions" if rows.num_regions else None
        problem = norm_problem("region_embeddings", rows.region_embeddings)
        if problem is None and self.plan.image_embeddings:
            problem = norm_problem("image_embedding", rows.image_embedding[None])
        return problem or flipped_problem(rows)

    def storage_error(self) -> tuple[float, float]:
        """Returns mean and greatest 1 - cosine that storing cost region embeddings, as measured
        when they were written; NaN where there are no regions."""
        shards = [self.manifest(shard) for shard in range(self.plan.num_shards)]
        used = [each for each in shards if each.num_regions]
        if not used:
            return float("nan"), float("nan")
        statistics = [each.statistics["region_embeddings"] for each in used]
        means = [each["mean_cosine_error"] for each in statistics]
        mean = np.average(means, weights=[each.num_regions for each in used])
        return float(mean), max(each["max_cosine_error"] for each in statistics)

    def _check_leaf(self, name: str, prefix: str = "") -> None:
        problem = leaf_problem(self.path, name, self._seal.leaves.get(name, ""))
        if problem is not None:
            raise CorruptCacheError(f"{prefix}{problem}; next: dkdetr cache verify {self.path}")

    def _make_info(self) -> CacheInfo:
        provenance = load_provenance(self.path)
        parts = {**self._head.parts, "text": load_text_manifest(self.path)["parts"]}
        return CacheInfo(
            path=self.path,
            # Where the pictures lie is provenance; the parts know what they are.
            split=str(provenance.get("split") or _part_name(parts["split"])),
            fingerprint=self._head.fingerprint,
            merkle_root=self._seal.merkle_root,
            parts=parts,
            provenance=provenance,
            num_images=self.plan.num_images,
            num_regions=self._seal.num_regions,
            max_regions=self.plan.max_regions,
            embed_dim=self.plan.embed_dim,
            teacher=_part_name(parts["teacher"]),
            random_teacher=bool(_entry(parts["teacher"], RANDOM_TEACHER_KEY)),
        )


def open_cache(path: CachePath | str) -> CacheReader:
    """Returns the reader of a sealed cache, its head checked; shards are checked when touched.

    Args:
        path: a folder, or a URL that fsspec knows; a cache or an export of one.

    Raises:
        UnsealedCacheError: there is none, or it is not finished; says what is missing and how to
            go on.
        CorruptCacheError: a file is not what was sealed.
        StaleCacheError: another schema.
    """
    try:
        return CacheReader(cache_path(path))
    except FileNotFoundError as error:
        raise CorruptCacheError(f"{error.filename or error} of a sealed cache is missing") from None


def _load_seal(path: CachePath) -> Seal:
    try:
        return Seal.load(path)
    except FileNotFoundError:
        raise UnsealedCacheError(why_unsealed(path)) from None


def why_unsealed(path: CachePath) -> str:
    """Returns what is missing of an unfinished cache, and the command that goes on with it."""
    try:
        head, plan = Head.load(path), load_plan(path)
    except FileNotFoundError:
        return (
            f"no cache at {path}; next: dkdetr cache-teacher --split SPLIT --out {path} makes one"
        )
    present = [shard for shard in range(plan.num_shards) if _is_committed(path, shard)]
    missing = plan.num_shards - len(present)
    again = f"dkdetr cache-teacher --split {_part_name(head.parts['split'])} --out {path}"
    command = made_by(path, again)
    return (
        f"the cache {path} is not finished: {missing} of {plan.num_shards} shards are missing"
        + ("" if missing else ", but it was never sealed")
        + f". Training on it would leave out images silently; next: {command}   (it resumes)"
    )


def _is_committed(path: CachePath, shard: int) -> bool:
    try:
        return not ShardManifest.load(path, shard).problems(path, quick=True)
    except (FileNotFoundError, CorruptCacheError):
        return False


def _load_quarantine(path: CachePath) -> dict[int, str]:
    lines = (path / QUARANTINE_FILE).read_bytes().decode().splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["image_id"]: entry["reason"] for entry in entries}


def _part_name(part: Any) -> str:
    """Returns the `name` of a part, or the part itself where it is a plain word."""
    return str(_entry(part, "name") or "") if isinstance(part, dict) else str(part)


def _entry(part: Any, key: str) -> Any:
    return cast("dict[str, Any]", part).get(key) if isinstance(part, dict) else None
