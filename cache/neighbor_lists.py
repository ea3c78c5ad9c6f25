"""Neighbour lists as they lie on disk: what training reads; faiss is not needed for it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.durable import (
    dump_checked_json,
    file_problem,
    file_record,
    load_checked_json,
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

    def related_images(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Returns the rows related to an image's row, most related first, and their weights."""
        span = slice(int(self.graph_indptr[row]), int(self.graph_indptr[row + 1]))
        return self.graph_rows[span], self.graph_weights[span]


def write_neighbors(
    path: Path, lists: NeighborLists, *, data_root: str, parameters: Mapping[str, Any]
) -> None:
    """Writes the lists and, last, their manifest, bound to the data they were made from."""
    folder = path / NEIGHBORS_FOLDER
    folder.mkdir(exist_ok=True)
    (path / NEIGHBORS_MANIFEST).unlink(missing_ok=True)
    for name in _names():
        buffer = BytesIO()
        np.save(buffer, getattr(lists, name), allow_pickle=False)
        write_atomic(folder / f"{name}.npy", buffer.getvalue())
    fault_point("neighbors.before_manifest")
    files = {
        f"{NEIGHBORS_FOLDER}/{name}.npy": file_record(folder / f"{name}.npy") for name in _names()
    }
    manifest = {"data_root": data_root, "parameters": dict(parameters), "files": files}
    write_atomic(path / NEIGHBORS_MANIFEST, dump_checked_json(manifest))


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
