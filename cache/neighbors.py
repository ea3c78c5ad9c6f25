"""Building neighbour lists: which regions of other images look most alike to the teacher.

Run it in a fresh process (faiss's OpenMP and torch's do not share one well). Embeddings stream
from the cache into a half-precision scratch file; the lists grow in files of their own and replace
the older ones at the end, or not at all.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.durable import disk_errors, sweep_partial_files
from cache.image_graph import image_graph
from cache.lock import Lease
from cache.nearest import (
    MAX_DEPTH,
    ExactSearch,
    Floats,
    Halves,
    InvertedFile,
    SearchDevice,
    Searcher,
    faiss_version,
)
from cache.neighbor_lists import NEIGHBORS_FOLDER, ListsDraft, NeighborLists
from cache.spec import CacheError
from cache.store import CacheReader, open_cache

OnProgress = Callable[[str, int, int], None]
"""Told the step ("reading", "searching"), what is done and of how much."""

_QUERY_BLOCK = 16_384
_DEEP_CELLS = 1 << 22  # candidates in memory at once where a search goes deep
_MAX_PROBES = 256
_SAMPLE = 1000
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class NeighborSettings:
    """Which regions take part, and what is listed of each."""

    per_image: int = 50
    """The most regions of an image: the best by objectness of those that may be distilled."""
    k: int = 16
    """Neighbours listed of each region."""
    max_base_iou: float = 0.5
    """Regions that overlap a base object by this much are never distilled and take no part."""
    duplicate_cosine: float = 0.95
    """Closer ones show the same thing again, not a related one, and are not listed."""
    exact_below: int = 1_000_000
    """From so many regions on an inverted file is searched instead of all pairs."""
    recall_target: float = 0.95
    """Lists of the inverted file are probed until a sample finds this share of its true ones."""
    related_images: int = 64
    """The most related images kept of an image."""
    device: SearchDevice = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        if min(self.per_image, self.k, self.related_images) < 1 or self.k > MAX_DEPTH // 4:
            raise CacheError(
                f"per_image, k and related_images must be at least 1 and k at most "
                f"{MAX_DEPTH // 4}, got {self.per_image}, {self.k} and {self.related_images}"
            )
        if not (0 < self.duplicate_cosine <= 1 and 0 < self.max_base_iou <= 1):
            raise CacheError(
                f"duplicate_cosine and max_base_iou must be above 0 and at most 1, got "
                f"{self.duplicate_cosine} and {self.max_base_iou}"
            )

    def recorded(self) -> dict[str, object]:
        """Returns the settings as they are written beside the lists."""
        return {name: value for name, value in asdict(self).items() if name != "device"}


@dataclass(frozen=True, eq=False)
class _Objects:
    rows: NDArray[np.int32]
    regions: NDArray[np.int32]
    embeddings: Halves
    """[M, embed_dim], mapped from the scratch file."""


def build_neighbors(
    path: Path,
    settings: NeighborSettings | None = None,
    *,
    on_progress: OnProgress = lambda _step, _done, _total: None,
) -> NeighborLists:
    """Returns the lists of a sealed cache after writing them to its neighbors/ folder.

    Of same-image and near-duplicate regions none is listed. Below `exact_below` regions the lists
    are exact (up to 2,048 candidates of a region are looked at); above, the recall on a sample is
    measured against the exact lists and recorded. Killed at any time, it leaves the older lists
    or none.

    Raises:
        CacheError: faiss is not installed; the cache is unsealed, damaged or being written.
        DiskFullError: no room.
    """
    settings = settings or NeighborSettings()
    reader = open_cache(path)
    version = faiss_version(settings.device)
    with Lease(path), disk_errors(f"the neighbour lists of {path}"):
        (path / NEIGHBORS_FOLDER).mkdir(exist_ok=True)
        sweep_partial_files(path / NEIGHBORS_FOLDER)
        with ListsDraft(path) as draft:
            objects = _collect(reader, settings, draft.scratch("embeddings"), on_progress)
            search = _Search(objects, settings)
            searched = search.prepare()
            count, k = len(objects.rows), settings.k
            indices = draft.array("indices", (count, k), np.int32)
            sims = draft.array("sims", (count, k), np.float16)
            for start in range(0, count, _QUERY_BLOCK):
                on_progress("searching", start, count)
                block = np.arange(start, min(start + _QUERY_BLOCK, count))
                indices[block], sims[block] = search.lists(search.searcher, block)
            on_progress("searching", count, count)
            graph = image_graph(
                objects.rows, indices, sims, reader.info.num_images, most=settings.related_images
            )
            draft.put("object_rows", objects.rows)
            draft.put("object_regions", objects.regions)
            draft.put("graph_indptr", graph.indptr)
            draft.put("graph_rows", graph.rows)
            draft.put("graph_weights", graph.weights)
            parameters = {**settings.recorded(), **searched, "objects": count, "library": version}
            draft.commit(data_root=reader.data_root, parameters=parameters)
    lists = open_cache(path).neighbors()
    assert lists is not None
    return lists


def _collect(
    reader: CacheReader, settings: NeighborSettings, scratch: Path, on_progress: OnProgress
) -> _Objects:
    """Returns the regions that training may select, their embeddings in the scratch file."""
    rows: list[NDArray[np.int32]] = []
    regions: list[NDArray[np.int32]] = []
    dim, total = reader.info.embed_dim, len(reader.image_ids)
    with scratch.open("wb") as stream:
        for row, image_id in enumerate(reader.image_ids):
            image = reader.rows(int(image_id))
            best = np.flatnonzero(image.max_base_iou < settings.max_base_iou)[: settings.per_image]
            rows.append(np.full(len(best), row, np.int32))
            regions.append(best.astype(np.int32))
            stream.write(image.region_embeddings[best].astype(np.float16).tobytes())
            if row % 256 == 0:
                on_progress("reading", row, total)
    on_progress("reading", total, total)
    object_rows = np.concatenate(rows)
    if not len(object_rows):
        embeddings = np.zeros((0, dim), np.float16)
    else:
        embeddings = np.memmap(scratch, np.float16, "r", shape=(len(object_rows), dim))
    return _Objects(object_rows, np.concatenate(regions), embeddings)


class _Search:
    def __init__(self, objects: _Objects, settings: NeighborSettings) -> None:
        self._objects = objects
        self._settings = settings
        self._exact = ExactSearch(objects.embeddings, settings.device)
        self.searcher: Searcher = self._exact

    def prepare(self) -> dict[str, object]:
        """Returns what is recorded of the search, after choosing and, where need be, tuning it."""
        count, settings = len(self._objects.rows), self._settings
        if count < settings.exact_below:
            return {"search": "exact", "recall": 1.0, "recall_sample": 0}
        index = InvertedFile(self._objects.embeddings, device=settings.device)
        self.searcher = index
        random = np.random.default_rng(_SEED)
        sample = np.sort(random.choice(count, min(_SAMPLE, count), replace=False))
        wanted, _ = self.lists(self._exact, sample)
        limit = min(_MAX_PROBES, index.lists)
        while True:
            recall = list_recall(self.lists(index, sample)[0], wanted)
            if recall >= settings.recall_target or index.probes >= limit:
                break
            index.probes = min(2 * index.probes, limit)
        return {
            "search": index.name,
            "probes": index.probes,
            "recall": round(recall, 4),
            "recall_sample": len(sample),
        }

    def lists(
        self, searcher: Searcher, which: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], Floats]:
        """Returns neighbours and cosines `[len(which), k]` of some objects, best first."""
        k = self._settings.k
        indices = np.full((len(which), k), -1, np.int32)
        sims = np.full((len(which), k), np.nan, np.float32)
        todo, depth = np.arange(len(which)), 4 * k
        most = min(len(self._objects.rows), MAX_DEPTH)
        while len(todo):
            depth = min(depth, most)
            short: list[NDArray[np.int64]] = []
            step = max(1, _DEEP_CELLS // max(depth, 1))
            for start in range(0, len(todo), step):
                part = todo[start : start + step]
                queries = self._objects.embeddings[which[part]].astype(np.float32)
                scores, found = searcher.search(queries, depth)
                taken, cosines = self._take(which[part], scores, found)
                indices[part, : taken.shape[1]] = taken
                sims[part, : taken.shape[1]] = cosines
                # Its own image and duplicates filled the candidates: there may be more behind.
                full = (taken[:, -1] >= 0) & (taken.shape[1] == k) | (found < 0).any(axis=1)
                short.append(part[~full])
            todo = np.concatenate(short) if depth < most else todo[:0]
            depth *= 4
        return indices, sims

    def _take(
        self, which: NDArray[np.int64], scores: Floats, found: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], Floats]:
        rows, k = self._objects.rows, self._settings.k
        out = (found < 0) | (rows[found] == rows[which][:, None])
        out |= scores > self._settings.duplicate_cosine
        # Best first; equal scores by index, so that the lists do not hang on faiss's order of ties.
        order = np.lexsort((found, -scores, out), axis=1)[:, :k]
        masked = np.take_along_axis(out, order, axis=1)
        indices = np.where(masked, -1, np.take_along_axis(found, order, axis=1))
        cosines = np.where(masked, np.nan, np.take_along_axis(scores, order, axis=1))
        return indices.astype(np.int32), cosines.astype(np.float32)


def list_recall(found: NDArray[np.int32], wanted: NDArray[np.int32]) -> float:
    """Returns the share of the wanted neighbours (-1: none) that are found, row by row."""
    hits = (wanted[:, :, None] == found[:, None, :]).any(axis=2) & (wanted >= 0)
    return float(hits.sum() / max(int((wanted >= 0).sum()), 1))
