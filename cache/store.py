"""Reading a sealed cache. Nothing is believed because it is there: hashes say what is whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cache.arrays import array_specs, rows_of
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
)
from cache.manifest import MANIFEST_FOLDER, ShardManifest, manifest_file
from cache.neighbor_lists import NeighborLists, load_neighbors
from cache.rows import ImageRows, flipped_problem, norm_problem
from cache.shard_reader import ShardReader
from cache.spec import CacheError, CorruptCacheError, UnsealedCacheError

RANDOM_TEACHER_KEY = "random"
"""`parts["teacher"]["random"]`: True for a teacher without learned weights."""


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds. `parts` includes those of the text, under `text`."""

    path: Path
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
    bytes_on_disk: int


class CacheReader:
    """The rows of a sealed cache by image id. Pickles as its path and opens itself again.

    Use `open_cache`. It holds no open file, lock or thread, so loader processes of any start
    method may use it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seal = _load_seal(path)
        for name in self._seal.leaves:
            if not name.startswith(f"{MANIFEST_FOLDER}/"):
                self._check_leaf(name)
        self._head, self.plan = Head.load(path), load_plan(path)
        if self._seal.fingerprint != self._head.fingerprint:
            raise CorruptCacheError(f"{path}: {COMPLETE_FILE} seals another cache")
        self._specs = array_specs(self.plan)
        self._shards: dict[int, dict[str, ShardReader]] = {}
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
        row = self.plan.row_of.get(int(image_id))
        if row is None:
            raise KeyError(f"{self.path} holds no image {image_id}")
        shard, place = divmod(row, self.plan.shard_size)
        readers = self._shards.get(shard) or self._open_shard(shard)
        rows = rows_of({name: reader.read(place) for name, reader in readers.items()})
        problem = self._rows_problem(rows, int(image_id))
        if problem is not None:
            raise CorruptCacheError(
                f"shard {shard:06d}: image {image_id} in {self.path}: {problem}; "
                f"next: dkdetr cache verify {self.path}"
            )
        return rows

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

    def _open_shard(self, shard: int) -> dict[str, ShardReader]:
        problems = self.manifest(shard).problems(self.path)
        if problems:
            raise CorruptCacheError(
                f"{problems[0]}. Its embeddings cannot be trusted; "
                f"next: dkdetr cache verify {self.path}"
            )
        size = self.plan.shard_size
        readers = {s.name: ShardReader(self.path, s, shard, size) for s in self._specs}
        self._shards[shard] = readers
        return readers

    def _rows_problem(self, rows: ImageRows, image_id: int) -> str | None:
        if rows.image_id != image_id:
            return f"its row belongs to image {rows.image_id}"
        if image_id in self.quarantined:
            return "it is quarantined and yet has regions" if rows.num_regions else None
        return (
            norm_problem("region_embeddings", rows.region_embeddings)
            or norm_problem("image_embedding", rows.image_embedding[None])
            or flipped_problem(rows)
        )

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
            bytes_on_disk=sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file()),
        )


def open_cache(path: Path) -> CacheReader:
    """Returns the reader of a sealed cache, its head checked; shards are checked when touched.

    Raises:
        UnsealedCacheError: there is none, or it is not finished; says what is missing and how to
            go on.
        CorruptCacheError: a file is not what was sealed.
        StaleCacheError: another schema.
    """
    try:
        return CacheReader(Path(path))
    except FileNotFoundError as error:
        raise CorruptCacheError(f"{error.filename} of a sealed cache is missing") from None


def _load_seal(path: Path) -> Seal:
    try:
        return Seal.load(path)
    except FileNotFoundError:
        raise UnsealedCacheError(why_unsealed(path)) from None


def why_unsealed(path: Path) -> str:
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
    command = _command(path) or again
    return (
        f"the cache {path} is not finished: {missing} of {plan.num_shards} shards are missing"
        + ("" if missing else ", but it was never sealed")
        + f". Training on it would leave out images silently; next: {command}   (it resumes)"
    )


def _is_committed(path: Path, shard: int) -> bool:
    try:
        return not ShardManifest.load(path, shard).problems(path, quick=True)
    except (FileNotFoundError, CorruptCacheError):
        return False


def _command(path: Path) -> str | None:
    try:
        return load_provenance(path).get("command")
    except (FileNotFoundError, CacheError):
        return None


def _load_quarantine(path: Path) -> dict[int, str]:
    lines = (path / QUARANTINE_FILE).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["image_id"]: entry["reason"] for entry in entries}


def _part_name(part: Any) -> str:
    """Returns the `name` of a part, or the part itself where it is a plain word."""
    return str(_entry(part, "name") or "") if isinstance(part, dict) else str(part)


def _entry(part: Any, key: str) -> Any:
    return cast("dict[str, Any]", part).get(key) if isinstance(part, dict) else None
