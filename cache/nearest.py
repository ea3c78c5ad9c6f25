"""Nearest vectors by inner product: all against all, or an inverted file with an exact re-rank.

The only home of faiss. Vectors are half-precision rows of a memory-mapped file; what is held in
float32 at a time is a block. With the wheel `faiss-gpu` and a GPU the same steps run there.
"""

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cache.spec import CacheError

SearchDevice = Literal["auto", "cpu", "cuda"]
Floats = NDArray[np.float32]
Halves = NDArray[np.float16]

MAX_DEPTH = 2048
"""The most candidates of a query: faiss's limit on a GPU, and a bound on the work on a CPU."""

_BASE_BLOCK = 65_536
_RERANK_BLOCK = 256
_VECTORS_PER_LIST = 512
_POINTS_PER_LIST = 64
_MOST_POINTS = 1 << 20
_SEED = 0


class Searcher(Protocol):
    """Finds candidates among the vectors it was made of."""

    name: str

    def search(self, queries: Floats, depth: int) -> tuple[Floats, NDArray[np.int64]]:
        """Returns cosines and indices `[queries, depth]`, in no order; index -1 where none is."""
        ...


class ExactSearch:
    """All queries against all vectors, a block of vectors at a time."""

    name = "exact"

    def __init__(self, vectors: Halves, device: SearchDevice = "auto") -> None:
        self._faiss, self._resources = _load_faiss(device)
        self._vectors = vectors

    def search(self, queries: Floats, depth: int) -> tuple[Floats, NDArray[np.int64]]:
        """Returns the `depth` best of each query (all vectors, if there are fewer)."""
        depth = min(depth, len(self._vectors))
        scores = np.zeros((len(queries), 0), np.float32)
        found = np.zeros((len(queries), 0), np.int64)
        for start in range(0, len(self._vectors), _BASE_BLOCK):
            block = self._vectors[start : start + _BASE_BLOCK].astype(np.float32)
            block_scores, block_found = self._knn(queries, block, min(depth, len(block)))
            scores = np.concatenate([scores, block_scores], axis=1)
            found = np.concatenate([found, block_found + start], axis=1)
            if scores.shape[1] > depth:
                best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
                scores = np.take_along_axis(scores, best, axis=1)
                found = np.take_along_axis(found, best, axis=1)
        return scores, found

    def _knn(self, queries: Floats, base: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
        metric = self._faiss.METRIC_INNER_PRODUCT
        if self._resources is not None:
            return self._faiss.knn_gpu(self._resources, queries, base, k, metric=metric)
        return self._faiss.knn(queries, base, k, metric=metric)


class InvertedFile:
    """`IVF{lists},SQ8` on centred unit vectors; true cosines of whatever it finds.

    CLIP's vectors lie in a narrow cone; without the centring nearly all of them would share a few
    lists, and the quantiser would spend its levels on the cone's axis.
    """

    def __init__(self, vectors: Halves, *, lists: int = 0, device: SearchDevice = "auto") -> None:
        faiss, resources = _load_faiss(device)
        num_vectors, dim = len(vectors), int(vectors.shape[1])
        self.lists = lists or number_of_lists(num_vectors)
        self.name = f"IVF{self.lists},SQ8"
        self._vectors = vectors
        random = np.random.default_rng(_SEED)
        size = min(num_vectors, max(self.lists * _POINTS_PER_LIST, 4096), _MOST_POINTS)
        picked = random.choice(num_vectors, size, replace=False).astype(np.int64)
        picked.sort()
        sample = vectors[picked].astype(np.float32)
        self._mean = sample.mean(axis=0)
        index = faiss.index_factory(dim, self.name, faiss.METRIC_INNER_PRODUCT)
        # A list of few points is no mistake here, and faiss would print a warning about it.
        index.cp.min_points_per_centroid = 1
        if resources is not None:
            index = faiss.index_cpu_to_gpu(resources, 0, index)
        index.train(self._centred(sample))
        for start in range(0, num_vectors, _BASE_BLOCK):
            index.add(self._centred(vectors[start : start + _BASE_BLOCK].astype(np.float32)))
        self._index = index
        self.probes = min(4, self.lists)

    def search(self, queries: Floats, depth: int) -> tuple[Floats, NDArray[np.int64]]:
        """Returns up to `depth` candidates of each query from the `probes` nearest lists."""
        self._index.nprobe = self.probes
        depth = min(depth, len(self._vectors), MAX_DEPTH)
        _, found = self._index.search(self._centred(queries), depth)
        scores = np.empty(found.shape, np.float32)
        for start in range(0, len(queries), _RERANK_BLOCK):
            block = slice(start, start + _RERANK_BLOCK)
            near = self._vectors[np.maximum(found[block], 0)].astype(np.float32)
            scores[block] = np.matmul(near, queries[block, :, None])[..., 0]
        return scores, found

    def _centred(self, vectors: Floats) -> Floats:
        centred = vectors - self._mean
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)


def number_of_lists(num_vectors: int) -> int:
    """Returns the power of two nearest to a list for every 512 vectors, at most 65,536.

    A list's length, and with it a query's work, stays the same however many vectors there are.
    """
    return 1 << min(16, max(0, round(float(np.log2(max(num_vectors, 1) / _VECTORS_PER_LIST)))))


def faiss_version(device: SearchDevice) -> str:
    """Returns the version of faiss and where it searches, as recorded with the lists."""
    faiss, resources = _load_faiss(device)
    return f"faiss {faiss.__version__} on {'cpu' if resources is None else 'gpu'}"


def _load_faiss(device: SearchDevice) -> tuple[Any, Any]:
    """Returns faiss and GPU resources; None for these on a CPU."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise CacheError(
            "neighbour lists need faiss, which is not installed; next: pip install 'dkdetr[cpu]' "
            "(or 'dkdetr[gpu]'; never both)"
        ) from None
    library: Any = faiss
    has_gpu = hasattr(library, "StandardGpuResources") and library.get_num_gpus() > 0
    if device == "cuda" and not has_gpu:
        raise CacheError(
            "no GPU for faiss: it needs the wheel faiss-gpu (pip install 'dkdetr[gpu]' in an "
            "environment without faiss-cpu) and a GPU; next: the same command with --device cpu"
        )
    return library, library.StandardGpuResources() if has_gpu and device != "cpu" else None
