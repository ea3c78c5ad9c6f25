"""Caches as flat .npy files that are mapped into memory: for slow file systems and shared memory.

Rows lie one after the other without padding; `region_offsets` and `gt_offsets` say where an
image's begin. Every file is hashed in blocks, one a shard of the plan, and a block is checked
when the first image of its shard is asked for: so opening costs nothing, and nothing is believed.
"""

import os
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cache.arrays import GT_FIELDS, REGION_VIEWS, region_views
from cache.durable import PARTIAL_SUFFIX, disk_errors, hash_bytes, sync_folder
from cache.plan import Plan
from cache.regions import RegionRows, size_hw
from cache.rows import ImageRows
from cache.shard_reader import image_rows
from cache.spec import CorruptCacheError
from cache.zarr_rows import RowSource


@dataclass(frozen=True)
class FlatArray:
    """One file: its rows are counted along `axis`: images, offsets, regions or gt."""

    name: str
    axis: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def file(self) -> str:
        """Returns the file's name."""
        return f"{self.name.replace('/', '_')}.npy"


def flat_arrays(plan: Plan, *, regions_only: bool) -> tuple[FlatArray, ...]:
    """Returns the files of a cache, or of its regions alone, in the order they are written."""
    stored = "<f2" if plan.storage == "fp16" else "|i1"
    views = region_views(plan)
    vectors = [FlatArray(name, "regions", (plan.embed_dim,), stored) for name, _ in views]
    if plan.storage == "int8":
        vectors += [FlatArray(scale, "regions", (), "<f2") for _, scale in views]
    regions = (
        FlatArray("image_id", "images", (), "<i8"),
        FlatArray("image_size_hw", "images", (2,), "<i4"),
        FlatArray("region_offsets", "offsets", (), "<i8"),
        FlatArray("boxes_xyxy", "regions", (4,), "<f4"),
        FlatArray("objectness", "regions", (), "<f4"),
        FlatArray("max_base_iou", "regions", (), "<f4"),
        *vectors,
    )
    if regions_only:
        return regions
    whole = FlatArray("image_embedding", "images", (plan.embed_dim,), "<f2")
    return (
        *regions,
        *((whole,) if plan.image_embeddings else ()),
        FlatArray("gt_offsets", "offsets", (), "<i8"),
        FlatArray("gt/boxes_xyxy", "gt", (4,), "<f4"),
        FlatArray("gt/category_ids", "gt", (), "<i8"),
        FlatArray("gt/embeddings", "gt", (plan.embed_dim,), "<f2"),
    )


def row_bytes(plan: Plan) -> int:
    """Returns the bytes of one region over all files."""
    arrays = flat_arrays(plan, regions_only=True)
    return sum(
        np.dtype(array.dtype).itemsize * int(np.prod(array.shape, dtype=np.int64))
        for array in arrays
        if array.axis == "regions"
    )


def write_flat(
    folder: Path,
    plan: Plan,
    source: RowSource,
    *,
    max_base_iou: float | None = None,
) -> dict[str, Any]:
    """Writes the files; returns the record that `FlatReader` checks them by.

    Args:
        folder: where; made if need be.
        plan: the cache's.
        source: the rows.
        max_base_iou: keep only regions below it, and no ground truth; None keeps everything.

    Raises:
        DiskFullError: no room; half-written files are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = flat_arrays(plan, regions_only=max_base_iou is not None)
    written: dict[str, int] = {"regions": 0, "gt": 0}
    blocks: dict[str, list[str]] = {array.name: [] for array in arrays}
    partial = {a.name: folder / f"{a.file}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}" for a in arrays}
    with disk_errors(str(folder)), ExitStack() as stack:
        stack.callback(lambda: [file.unlink(missing_ok=True) for file in partial.values()])
        streams = {name: stack.enter_context(file.open("wb")) for name, file in partial.items()}
        for array in arrays:
            streams[array.name].write(_header(array, plan, written))
        for shard in range(plan.num_shards):
            block = _flat_block(source, plan.shard_rows(shard), written, max_base_iou)
            last = shard == plan.num_shards - 1
            for array in arrays:
                data = np.ascontiguousarray(block[array.name], array.dtype).tobytes()
                blocks[array.name].append(hash_bytes(data))
                # Blocks of offsets overlap by one: an image's end is the next one's beginning.
                one = np.dtype(array.dtype).itemsize if array.axis == "offsets" and not last else 0
                streams[array.name].write(data[: len(data) - one])
        files = {
            array.name: _finish(streams[array.name], array, plan, written, blocks[array.name])
            for array in arrays
        }
        stack.pop_all()
        for stream in streams.values():
            stream.close()
        for array in arrays:
            partial[array.name].replace(folder / array.file)
        sync_folder(folder)
    return {"rows": written, "files": files, "regions_only": max_base_iou is not None}


def _header(array: FlatArray, plan: Plan, counts: Mapping[str, int]) -> bytes:
    """Returns a file's header; its length does not depend on the counts (npy leaves room)."""
    sizes = {"images": plan.num_images, "offsets": plan.num_images + 1, **counts}
    buffer = BytesIO()
    table = {
        "shape": (sizes[array.axis], *array.shape),
        "fortran_order": False,
        "descr": array.dtype,
    }
    npy.write_array_header_2_0(buffer, table)
    return buffer.getvalue()


def _finish(
    stream: BinaryIO, array: FlatArray, plan: Plan, rows: Mapping[str, int], blocks: list[str]
) -> dict[str, Any]:
    """Returns a file's record once its bytes are on the disk, under the true header."""
    header = _header(array, plan, rows)
    size = stream.tell()
    stream.seek(0)
    stream.write(header)
    stream.flush()
    os.fsync(stream.fileno())
    return {"size": size, "header": hash_bytes(header), "offset": len(header), "blocks": blocks}


def _flat_block(
    source: RowSource, rows: range, written: dict[str, int], max_base_iou: float | None
) -> dict[str, NDArray[Any]]:
    """Returns a shard's rows of every file, and counts them in `written`."""
    found = [source.regions(row) for row in rows]
    keep = [
        slice(None) if max_base_iou is None else np.flatnonzero(each.max_base_iou < max_base_iou)
        for each in found
    ]
    pairs = list(zip(found, keep, strict=True))
    block: dict[str, NDArray[Any]] = {
        "image_id": np.array([each.image_id for each in found], np.int64),
        "image_size_hw": np.array([each.image_size_hw for each in found], np.int32),
        "boxes_xyxy": np.concatenate([each.boxes_xyxy[kept] for each, kept in pairs]),
        "objectness": np.concatenate([each.objectness[kept] for each, kept in pairs]),
        "max_base_iou": np.concatenate([each.max_base_iou[kept] for each, kept in pairs]),
    }
    for name in found[0].vectors:
        block[name] = np.concatenate([each.vectors[name][kept] for each, kept in pairs])
    lengths = [len(each.objectness[kept]) for each, kept in pairs]
    block["region_offsets"] = _offsets(lengths, written, "regions")
    if max_base_iou is None:
        truth = [source.ground_truth(row) for row in rows]
        for name in GT_FIELDS:
            block[name] = np.concatenate([each[name] for each in truth])
        block["gt_offsets"] = _offsets(
            [len(each["gt/boxes_xyxy"]) for each in truth], written, "gt"
        )
        block["image_embedding"] = np.stack([source.image_embedding(row) for row in rows])
    return block


def _offsets(lengths: list[int], written: dict[str, int], axis: str) -> NDArray[np.int64]:
    offsets = written[axis] + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    written[axis] = int(offsets[-1])
    return offsets.astype(np.int64)


class FlatReader:
    """Reads what `write_flat` wrote, mapped. Files are opened and their sizes checked at once.

    Raises:
        CorruptCacheError: a file is missing, or not of its size and header.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], plan: Plan) -> None:
        self._folder, self._record, self._plan = folder, record, plan
        self._arrays = flat_arrays(plan, regions_only=bool(record["regions_only"]))
        self._maps = {array.name: self._map(array) for array in self._arrays}
        names = [name for pair in REGION_VIEWS for name in pair]
        self._vectors = [name for name in names if name in self._maps]
        self._good: set[int] = set()

    def _map(self, array: FlatArray) -> NDArray[Any]:
        file, record = self._folder / array.file, self._record["files"][array.name]
        header = _header(array, self._plan, self._record["rows"])
        try:
            with file.open("rb") as stream:
                whole = stream.read(len(header)) == header
                size = os.fstat(stream.fileno()).st_size
        except FileNotFoundError:
            raise CorruptCacheError(f"{file} is missing") from None
        if not whole or hash_bytes(header) != record["header"] or size != record["size"]:
            raise CorruptCacheError(f"{file} is not the file that was exported: size or header")
        if size == len(header):
            return np.zeros((0, *array.shape), array.dtype)
        flat = np.memmap(file, array.dtype, "r", offset=len(header))
        return np.asarray(flat).reshape(-1, *array.shape)

    def regions(self, row: int) -> RegionRows:
        """Returns the regions of the image at `row`; raises CorruptCacheError."""
        self._check(row // self._plan.shard_size)
        maps = self._maps
        start, stop = maps["region_offsets"][row : row + 2].tolist()
        return RegionRows(
            image_id=int(maps["image_id"][row]),
            image_size_hw=size_hw(maps["image_size_hw"][row]),
            boxes_xyxy=maps["boxes_xyxy"][start:stop],
            objectness=maps["objectness"][start:stop],
            max_base_iou=maps["max_base_iou"][start:stop],
            vectors={name: maps[name][start:stop] for name in self._vectors},
        )

    def rows(self, row: int) -> ImageRows:
        """Returns everything of the image at `row`; only of a whole export."""
        found = self.regions(row)
        return image_rows(found, self.image_embedding(row), self.ground_truth(row))

    def image_embedding(self, row: int) -> NDArray[Any]:
        """Returns the embedding of the whole image at `row`; raises CorruptCacheError."""
        self._check(row // self._plan.shard_size)
        if not self._plan.image_embeddings:
            return np.full(self._plan.embed_dim, np.nan, np.float16)
        return self._maps["image_embedding"][row]

    def ground_truth(self, row: int) -> dict[str, NDArray[Any]]:
        """Returns the rows of each ragged array of an image; raises CorruptCacheError."""
        self._check(row // self._plan.shard_size)
        span = slice(*self._maps["gt_offsets"][row : row + 2].tolist())
        return {name: self._maps[name][span] for name in GT_FIELDS}

    def problems(self) -> list[str]:
        """Returns a line for each block that has changed."""
        found: list[str] = []
        for shard in range(self._plan.num_shards):
            found += self.block_problems(shard)
        return found

    def _check(self, shard: int) -> None:
        if shard in self._good:
            return
        problems = self.block_problems(shard)
        if problems:
            raise CorruptCacheError(problems[0])
        self._good.add(shard)

    def block_problems(self, shard: int) -> list[str]:
        """Returns a line for each file whose rows of a shard have changed."""
        rows = self._plan.shard_rows(shard)
        spans = {
            "images": slice(rows.start, rows.stop),
            "offsets": slice(rows.start, rows.stop + 1),
        }
        problems: list[str] = []
        # Offsets first: they say which rows of the others belong to the shard.
        for array in sorted(self._arrays, key=lambda each: each.axis != "offsets"):
            block = self._maps[array.name][spans[array.axis]]
            if hash_bytes(block.data if block.size else b"") != self._hash(array.name, shard):
                file = self._folder / array.file
                problems.append(
                    f"shard {shard:06d}: {file} has changed since it was exported (its hash "
                    "differs); export the cache again"
                )
                if array.axis == "offsets":
                    return problems
            elif array.axis == "offsets":
                axis = "regions" if array.name == "region_offsets" else "gt"
                spans[axis] = slice(int(block[0]), int(block[-1]))
        return problems

    def _hash(self, name: str, shard: int) -> str:
        return str(self._record["files"][name]["blocks"][shard])
