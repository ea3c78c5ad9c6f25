"""Which images are related: the links of their objects, summed, as compressed sparse rows."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK_ROWS = 4096


class ImageGraph(NamedTuple):
    """Row r's related rows are `rows[indptr[r]:indptr[r + 1]]`, most related first."""

    indptr: NDArray[np.int64]
    """[num_images + 1]"""
    rows: NDArray[np.int32]
    weights: NDArray[np.float32]
    """Sum of the positive cosines of the links from one image's objects to the other's."""


def image_graph(
    object_rows: NDArray[np.int32],
    indices: NDArray[np.int32],
    sims: NDArray[np.floating],
    num_images: int,
    *,
    most: int = 64,
) -> ImageGraph:
    """Returns the graph of at most `most` related images each; linear in time and memory.

    Args:
        object_rows: [M], the image row of each object, ascending.
        indices: [M, k], neighbours as indices of objects, -1 where there is none.
        sims: [M, k], their cosines.
        num_images: rows of the graph.
        most: related images kept of an image, those of the greatest weight.
    """
    counts: list[NDArray[np.int64]] = []
    rows: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float32]] = []
    for first in range(0, num_images, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, num_images)
        begin, end = np.searchsorted(object_rows, (first, last))
        sources, related, weight = _edges(
            object_rows[begin:end],
            object_rows,
            indices[begin:end],
            np.asarray(sims[begin:end], np.float32),
            num_images,
        )
        place = np.arange(len(sources)) - np.searchsorted(sources, sources)
        kept = place < most
        counts.append(np.bincount(sources[kept] - first, minlength=last - first))
        rows.append(related[kept].astype(np.int32))
        weights.append(weight[kept].astype(np.float32))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return ImageGraph(indptr, np.concatenate(rows), np.concatenate(weights))


def _edges(
    source_rows: NDArray[np.int32],
    object_rows: NDArray[np.int32],
    indices: NDArray[np.int32],
    sims: NDArray[np.float32],
    num_images: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Returns source row, related row and weight of every edge, by source, heaviest first."""
    from_object, place = np.nonzero((indices >= 0) & (sims > 0))
    edges = source_rows[from_object].astype(np.int64) * num_images
    edges += object_rows[indices[from_object, place]]
    unique, which = np.unique(edges, return_inverse=True)
    sums = np.bincount(which, weights=sims[from_object, place], minlength=len(unique))
    weights = sums.astype(np.float64)
    sources, related = np.divmod(unique, num_images)
    order = np.lexsort((related, -weights, sources))
    return sources[order], related[order], weights[order]
