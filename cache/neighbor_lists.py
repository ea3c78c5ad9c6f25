"""Neighbour lists as they lie on disk: what training reads; faiss is not needed for it."""

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cache.durable import (
    PARTIAL_SUFFIX,
    dump_checked_json,
    file_problem,
    file_record,
    load_checked_json,
    sync_file,
    sync_folder,
    write_atomic,
)
from cache.faults import fault_point
from cache.location import CachePath, member
from cache.spec import CorruptCacheError, StaleCacheError

NEIGHBORS_FOLDER = "neighbors"
NEIGHBORS_MANIFEST = f"{NEIGHBORS_FOLDER}/manifest.json"


@dataclass(frozen=True, eq=False)
class NeighborLists:
    """For each of M objects (the best regions of each image), its k nearest in other images.

    Rows count images in the order of the plan. Where fewer than k exist: index -1, similarity NaN.
    """

    object_rows: NDArray[np.int32]
    """[M], the row of the object's image; ascending."""
    object_regions: NDArray[np.int32]
    """[M], which region of that image."""
    indices: NDArray[np.int32]
    """[M, k], the neighbours, as indices of objects, most similar first."""
    sims: NDArray[np.float16]
    """[M, k], cosines."""
    graph_indptr: NDArray[np.int64]
    """[num_images + 1], compressed sparse rows of the image graph."""
    graph_rows: NDArray[np.int32]
    """Rows of the related images, most related first."""
    graph_weights: NDArray[np.float32]
    """Sum of the positive cosines of all links from one image's objects to the other's."""

    def object_of(self, row: int, region: int) -> int | None:
        """Returns the index of a region among the objects, or None if it takes no part."""
        begin, end = (int(at) for at in np.searchsorted(self.object_rows, (row, row + 1)))
        at = np.flatnonzero(self.object_regions[begin:end] == region)
        return begin + int(at[0]) if len(at) else None

    def objects_of(self, row: int) -> range:
        """Returns the indices of an image's objects."""
        begin, end = np.searchsorted(self.object_rows, (row, row + 1))
        return range(int(begin), int(end))

    def related_images(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Returns the rows related to an image's row, most related first, and their weights."""
        span = slice(int(self.graph_indptr[row]), int(self.graph_indptr[row + 1]))
        return self.graph_rows[span], self.graph_weights[span]


class ListsDraft:
    """New lists in the making: files of their own, which replace the older lists all at once.

    A context manager; without a `commit` it leaves nothing behind (a kill leaves `*.partial`
    files, which the next writer sweeps).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path / NEIGHBORS_FOLDER
        self._token = uuid.uuid4().hex
        self._arrays: dict[str, np.memmap[Any, Any]] = {}
        self._scratch: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.clear()
        for name in _names():
            self._partial(name).unlink(missing_ok=True)
        for file in self._scratch:
            file.unlink(missing_ok=True)

    def scratch(self, name: str) -> Path:
        """Returns a file for intermediate results; it goes with the draft."""
        file = self._partial(f"scratch_{name}")
        self._scratch.append(file)
        return file

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Returns an array of the lists to be filled, mapped to its file."""
        file = self._partial(name)
        array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        # The space is taken now: a full disk is an error here; in the mapping it would be SIGBUS.
        with file.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
        self._arrays[name] = array
        return array

    def put(self, name: str, values: NDArray[Any]) -> None:
        """Writes a whole array of the lists."""
        self.array(name, values.shape, values.dtype)[...] = values

    def commit(self, *, data_root: str, parameters: Mapping[str, Any]) -> None:
        """Puts the draft in the place of the older lists, its manifest last.

        Args:
            data_root: what the lists were made from, see `CacheReader.data_root`.
            parameters: how they were made; plain JSON data.
        """
        assert sorted(self._arrays) == sorted(_names())
        for name, array in self._arrays.items():
            array.flush()
            sync_file(self._partial(name))
        fault_point("neighbors.before_rename")
        (self._path / NEIGHBORS_MANIFEST).unlink(missing_ok=True)
        sync_folder(self._folder)
        for name in _names():
            self._partial(name).replace(self._folder / f"{name}.npy")
            fault_point("neighbors.after_rename")
        sync_folder(self._folder)
        names = [f"{NEIGHBORS_FOLDER}/{name}.npy" for name in _names()]
        files = {name: file_record(self._path / name) for name in names}
        fault_point("neighbors.before_manifest")
        manifest = {"data_root": data_root, "parameters": dict(parameters), "files": files}
        write_atomic(self._path / NEIGHBORS_MANIFEST, dump_checked_json(manifest))

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.npy.{self._token}{PARTIAL_SUFFIX}"


def load_parameters(path: CachePath) -> dict[str, Any] | None:
    """Returns how the lists were made and their recall, or None if there are none.

    Raises:
        CorruptCacheError: the manifest is not what was written.
    """
    try:
        return load_checked_json(path / NEIGHBORS_MANIFEST)["parameters"]
    except FileNotFoundError:
        return None


def load_neighbors(path: CachePath, *, data_root: str) -> NeighborLists | None:
    """Returns the lists (mapped, not read), or None if none were built.

    Raises:
        CorruptCacheError: a file is not what was written.
        StaleCacheError: they were made from other data.
    """
    try:
        manifest = load_checked_json(path / NEIGHBORS_MANIFEST)
    except FileNotFoundError:
        return None
    if manifest["data_root"] != data_root:
        raise StaleCacheError(
            f"the neighbour lists of {path} were made from other embeddings; "
            f"next: dkdetr cache neighbors {path}"
        )
    for name, record in manifest["files"].items():
        problem = file_problem(member(path, name), record)
        if problem is not None:
            raise CorruptCacheError(f"{path / name} {problem}; next: dkdetr cache neighbors {path}")
    folder = path / NEIGHBORS_FOLDER
    return NeighborLists(**{name: _load_array(folder / f"{name}.npy") for name in _names()})


def _load_array(file: CachePath) -> NDArray[Any]:
    if isinstance(file, Path):
        return np.load(file, mmap_mode="r", allow_pickle=False)
    return np.load(BytesIO(file.read_bytes()), allow_pickle=False)


def _names() -> list[str]:
    return [field.name for field in fields(NeighborLists)]
