"""Building neighbour lists: which regions of other images look most alike to the teacher.

The only home of faiss. Run it in a fresh process: its OpenMP and torch's do not share one well.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.neighbor_lists import NeighborLists, write_neighbors
from cache.spec import CacheError
from cache.store import CacheReader, open_cache

_BLOCK = 4096


def build_neighbors(path: Path, *, per_image: int = 50, k: int = 16) -> NeighborLists:
    """Returns the lists of a sealed cache after writing them to its neighbors/ folder.

    The search is exact: inner products of unit vectors, all against all. Its time grows with the
    square of `per_image` times the images; memory with 4 bytes a number.

    Args:
        path: the cache.
        per_image: the regions taken of each image, the best by objectness.
        k: neighbours listed of each region; never of its own image.

    Raises:
        CacheError: faiss is not installed, or a number is below 1.
    """
    if per_image < 1 or k < 1:
        raise CacheError(f"per_image and k must be at least 1, got {per_image} and {k}")
    reader = open_cache(path)
    rows, regions, embeddings = _collect(reader, per_image)
    indices, sims = _search(rows, embeddings, k, _largest_group(rows))
    indptr, related, weights = image_graph(rows, indices, sims, reader.info.num_images)
    lists = NeighborLists(
        object_rows=rows,
        object_regions=regions,
        indices=indices,
        sims=sims.astype(np.float16),
        graph_indptr=indptr,
        graph_rows=related,
        graph_weights=weights,
    )
    parameters = {"per_image": per_image, "k": k, "search": "exact"}
    write_neighbors(path, lists, data_root=reader.data_root, parameters=parameters)
    return lists


def image_graph(
    object_rows: NDArray[np.int32],
    indices: NDArray[np.int32],
    sims: NDArray[np.float32],
    num_images: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Returns indptr [num_images + 1], related rows and weights, most related first.

    An edge's weight is the sum of the positive cosines of the links between the two images.
    """
    from_object, place = np.nonzero((indices >= 0) & (sims > 0))
    edges = object_rows[from_object].astype(np.int64) * num_images
    edges += object_rows[indices[from_object, place]]
    unique, which = np.unique(edges, return_inverse=True)
    weights = np.bincount(which, weights=sims[from_object, place], minlength=len(unique))
    sources, related = np.divmod(unique, num_images)
    order = np.lexsort((related, -weights, sources))
    counts = np.bincount(sources, minlength=num_images)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]).astype(np.int64)
    return indptr, related[order].astype(np.int32), weights[order].astype(np.float32)


def _collect(
    reader: CacheReader, per_image: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    rows: list[NDArray[np.int32]] = []
    regions: list[NDArray[np.int32]] = []
    embeddings: list[NDArray[np.float32]] = []
    for row, image_id in enumerate(reader.image_ids):
        best = reader.rows(int(image_id)).region_embeddings[:per_image]
        rows.append(np.full(len(best), row, np.int32))
        regions.append(np.arange(len(best), dtype=np.int32))
        embeddings.append(best)
    return np.concatenate(rows), np.concatenate(regions), np.concatenate(embeddings)


def _largest_group(rows: NDArray[np.int32]) -> int:
    return int(np.bincount(rows).max()) if len(rows) else 0


def _search(
    rows: NDArray[np.int32], embeddings: NDArray[np.float32], k: int, own: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Returns the k nearest of other images; `own` is the most objects that an image has."""
    indices = np.full((len(rows), k), -1, np.int32)
    sims = np.full((len(rows), k), np.nan, np.float32)
    if not len(rows):
        return indices, sims
    index = _flat_index(embeddings.shape[1])
    index.add(embeddings)
    # Of k + own candidates at most `own` are of the query's own image, so k others are among them.
    depth = min(len(rows), k + own)
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores, found = index.search(embeddings[block], depth)
        taken = _drop_own_image(rows, rows[block], scores, found, k)
        indices[block, : taken[0].shape[1]], sims[block, : taken[1].shape[1]] = taken
    return indices, sims


def _drop_own_image(
    rows: NDArray[np.int32],
    query_rows: NDArray[np.int32],
    scores: NDArray[np.float32],
    found: NDArray[np.int64],
    k: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    own = (found < 0) | (rows[found] == query_rows[:, None])
    # Best first; equal scores by index, so that the lists do not hang on faiss's order of ties.
    order = np.lexsort((found, -scores, own), axis=1)[:, :k]
    masked = np.take_along_axis(own, order, axis=1)
    indices = np.where(masked, -1, np.take_along_axis(found, order, axis=1))
    sims = np.where(masked, np.nan, np.take_along_axis(scores, order, axis=1))
    return indices.astype(np.int32), sims.astype(np.float32)


def _flat_index(embed_dim: int) -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise CacheError(
            "neighbour lists need faiss, which is not installed; next: pip install 'dkdetr[cpu]' "
            "(or 'dkdetr[gpu]'; never both)"
        ) from None
    return faiss.IndexFlatIP(embed_dim)
