import os
import signal
import subprocess
import sys
import types

import faiss
import numpy as np
import pytest

from cache import nearest, neighbors
from cache.durable import PARTIAL_SUFFIX
from cache.image_graph import image_graph
from cache.lock import Lease
from cache.nearest import ExactSearch, InvertedFile, number_of_lists
from cache.neighbor_lists import NEIGHBORS_MANIFEST, ListsDraft, load_parameters
from cache.neighbors import NeighborSettings, build_neighbors, list_recall
from cache.spec import CacheError, CacheLockedError, CorruptCacheError, StaleCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from tests.cache_samples import clustered_rows, sample_plan, write_sample_cache


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("neighbors") / "c"
    write_sample_cache(path, sample_plan(num_images=25))
    return path


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """300 images of 12 regions: 20 kinds of object, and views of a few things nearly the same."""
    path = tmp_path_factory.mktemp("neighbors") / "clustered"
    plan = sample_plan(num_images=300, max_regions=12, embed_dim=32)
    write_sample_cache(path, plan, rows_of=clustered_rows)
    return path


def _selectable(reader, per_image, max_base_iou=0.5):
    found = []
    for row, image_id in enumerate(reader.image_ids):
        image = reader.rows(int(image_id))
        mine = [r for r in range(image.num_regions) if image.max_base_iou[r] < max_base_iou]
        found += [(row, r, image.region_embeddings[r]) for r in mine[:per_image]]
    return found


def _brute_force(reader, per_image, k, duplicate_cosine=0.95):
    objects = _selectable(reader, per_image)
    rows = np.array([row for row, _, _ in objects])
    embeddings = np.stack([embedding for _, _, embedding in objects])
    scores = embeddings.astype(np.float64) @ embeddings.T
    scores[rows[:, None] == rows] = -np.inf
    scores[scores > duplicate_cosine] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best_scores = np.take_along_axis(scores, best, axis=1)
    return objects, rows, np.where(np.isfinite(best_scores), best, -1), best_scores


def test_the_lists_are_those_of_brute_force(path):
    built = build_neighbors(path, NeighborSettings(per_image=4, k=5))
    reader = open_cache(path)
    objects, rows, best, scores = _brute_force(reader, 4, 5)
    lists = reader.neighbors()
    assert lists.object_rows.tolist() == rows.tolist()
    assert lists.object_regions.tolist() == [region for _, region, _ in objects]
    np.testing.assert_array_equal(lists.indices, best)
    np.testing.assert_allclose(lists.sims, scores, atol=1e-3)
    assert (lists.indices.dtype, lists.sims.dtype) == (np.int32, np.float16)
    np.testing.assert_array_equal(built.indices, lists.indices)
    assert (rows[lists.indices] != rows[:, None]).all()
    for index, (row, region, _) in enumerate(objects):
        assert lists.object_of(row, region) == index
        assert index in lists.objects_of(row)
    assert lists.object_of(0, 99) is None
    how = load_parameters(path)
    assert (how["search"], how["recall"], how["objects"]) == ("exact", 1.0, len(objects))

    weights = np.zeros((25, 25))
    for place, row in enumerate(rows):
        for neighbor, score in zip(best[place], scores[place], strict=True):
            weights[row, rows[neighbor]] += max(score, 0)
    for row in range(25):
        related, weight = lists.related_images(row)
        assert (np.diff(weight) <= 0).all()
        dense = np.zeros(25)
        dense[related] = weight
        np.testing.assert_allclose(dense, weights[row], atol=2e-3)
    assert verify_cache(path).good


@pytest.mark.parametrize("base_block", [65_536, 100])
def test_duplicates_are_dropped_and_those_behind_them_found(clustered, monkeypatch, base_block):
    # Many regions show the same thing: the first candidates are all duplicates.
    monkeypatch.setattr(nearest, "_BASE_BLOCK", base_block)
    monkeypatch.setattr(neighbors, "_QUERY_BLOCK", 500)
    monkeypatch.setattr(neighbors, "_DEEP_CELLS", 20_000)
    lists = build_neighbors(clustered, NeighborSettings(per_image=8, k=4))
    _, rows, best, scores = _brute_force(open_cache(clustered), 8, 4)
    raw = np.stack([e for _, _, e in _selectable(open_cache(clustered), 8)])
    near = (raw @ raw.T > 0.95) & (rows[:, None] != rows)
    assert (near.sum(axis=1) > 16).any(), "the sample must make the search go deeper"
    np.testing.assert_allclose(lists.sims, scores, atol=2e-3)
    agreeing = (lists.indices == best).mean()  # float32 and float64 order near ties differently
    assert agreeing > 0.99
    assert np.nanmax(lists.sims) <= 0.951


def test_a_list_holds_512_vectors_whatever_their_number():
    assert [number_of_lists(n) for n in (0, 100, 512, 2**20, 5_000_000, 10**9)] == [
        1, 1, 1, 2048, 8192, 65_536,
    ]  # fmt: skip


def test_the_inverted_file_agrees_with_the_exact_lists(clustered, monkeypatch):
    monkeypatch.setattr(nearest, "_VECTORS_PER_LIST", 8)
    exact = build_neighbors(clustered, NeighborSettings(per_image=8, k=4))
    wanted, true = np.array(exact.indices), np.array(exact.sims)
    settings = NeighborSettings(per_image=8, k=4, exact_below=100)
    built = build_neighbors(clustered, settings)
    how = load_parameters(clustered)
    assert how["search"] == "IVF128,SQ8"
    assert how["recall_sample"] == min(1000, len(wanted))
    recall = list_recall(np.array(built.indices), wanted)
    assert recall >= 0.9
    assert abs(recall - how["recall"]) < 0.05
    # Re-ranked exactly: a pair that both list has the same cosine.
    same = built.indices == wanted
    np.testing.assert_array_equal(built.sims[same], true[same])
    assert (np.diff(built.sims.astype(np.float32), axis=1) <= 0).all()
    assert verify_cache(clustered).good


def test_probes_rise_until_the_sample_s_recall_is_reached(clustered, monkeypatch):
    monkeypatch.setattr(nearest, "_VECTORS_PER_LIST", 8)
    monkeypatch.setattr(InvertedFile, "search", _bad_below(16, InvertedFile.search))
    monkeypatch.setattr(neighbors, "InvertedFile", _with_probes(4))
    build_neighbors(clustered, NeighborSettings(per_image=8, k=4, exact_below=100))
    how = load_parameters(clustered)
    assert how["probes"] == 16
    assert how["recall"] > 0.5
    build_neighbors(
        clustered, NeighborSettings(per_image=8, k=4, exact_below=100, recall_target=1e-9)
    )
    assert load_parameters(clustered)["probes"] == 4
    assert load_parameters(clustered)["recall"] < 0.5


def _with_probes(probes):
    def build(*args, **options):
        index = InvertedFile(*args, **options)
        index.probes = probes
        return index

    return build


def _bad_below(probes, search):
    def poor(self, queries, depth):
        scores, found = search(self, queries, depth)
        if self.probes < probes:
            found = np.where(np.arange(found.shape[1]) < 3, found, -1)
        return scores, found

    return poor


class FakeGPU(types.ModuleType):
    """faiss as the GPU wheel shows it; the work is done on the CPU and written down."""

    def __init__(self, gpus: int) -> None:
        super().__init__("faiss")
        self.gpus, self.calls = gpus, []

    def __getattr__(self, name):
        return getattr(faiss, name)

    def get_num_gpus(self):
        return self.gpus

    def StandardGpuResources(self):
        return "resources"

    def knn_gpu(self, resources, queries, base, k, *, metric):
        self.calls.append(f"knn_gpu {resources}")
        return faiss.knn(queries, base, k, metric=metric)

    def index_cpu_to_gpu(self, resources, device, index):
        assert not index.is_trained, "training belongs on the GPU too"
        self.calls.append(f"index_cpu_to_gpu {resources} {device}")
        return index


def test_a_gpu_is_used_where_faiss_has_one(clustered, monkeypatch):
    settings = {"per_image": 8, "k": 4}
    on_cpu = np.array(build_neighbors(clustered, NeighborSettings(**settings)).indices)
    library = FakeGPU(gpus=1)
    monkeypatch.setitem(sys.modules, "faiss", library)
    lists = build_neighbors(clustered, NeighborSettings(**settings))
    np.testing.assert_array_equal(lists.indices, on_cpu)
    assert set(library.calls) == {"knn_gpu resources"}
    assert load_parameters(clustered)["library"].endswith("on gpu")
    build_neighbors(clustered, NeighborSettings(**settings, exact_below=100))
    assert "index_cpu_to_gpu resources 0" in library.calls
    library.calls.clear()
    build_neighbors(clustered, NeighborSettings(**settings, device="cpu"))
    assert library.calls == []
    monkeypatch.setitem(sys.modules, "faiss", FakeGPU(gpus=0))
    with pytest.raises(CacheError, match="no GPU for faiss"):
        build_neighbors(clustered, NeighborSettings(**settings, device="cuda"))
    assert load_parameters(clustered)["library"].endswith("on cpu")


def test_searchers_read_half_precision_rows_block_by_block(monkeypatch):
    random = np.random.default_rng(1)
    vectors = random.standard_normal((700, 24)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    queries = vectors[:50].astype(np.float32)
    monkeypatch.setattr(nearest, "_BASE_BLOCK", 64)
    scores, found = ExactSearch(vectors).search(queries, 20)
    true = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    np.testing.assert_allclose(np.sort(scores)[:, ::-1], -np.sort(-true)[:, :20], atol=1e-5)
    index = InvertedFile(vectors, lists=4)
    index.probes = 4
    scores, found = index.search(queries, 20)
    np.testing.assert_allclose(scores, np.take_along_axis(true, found, axis=1), atol=1e-5)


def test_too_few_neighbours_are_marked(path, tmp_path):
    write_sample_cache(tmp_path / "c", sample_plan(num_images=3))
    lists = build_neighbors(tmp_path / "c", NeighborSettings(per_image=50, k=40))
    num_objects = len(lists.object_rows)
    own = np.bincount(lists.object_rows)[lists.object_rows]
    assert ((lists.indices >= 0).sum(axis=1) == num_objects - own).all()
    assert (np.isnan(lists.sims) == (lists.indices < 0)).all()
    # What is there comes first.
    assert (np.diff((lists.indices < 0).astype(int), axis=1) >= 0).all()


def test_the_image_graph_by_hand():
    rows = np.int32([0, 0, 2])
    indices = np.int32([[2, -1], [2, -1], [1, 0]])
    sims = np.float32([[0.5, np.nan], [0.25, np.nan], [0.25, -0.5]])
    graph = image_graph(rows, indices, sims, 3)
    assert graph.indptr.tolist() == [0, 1, 1, 2]
    assert graph.rows.tolist() == [2, 0]
    assert graph.weights.tolist() == [0.75, 0.25]


def test_the_graph_keeps_the_heaviest_edges_of_each_image(monkeypatch):
    random = np.random.default_rng(0)
    rows = np.sort(random.integers(0, 50, 400)).astype(np.int32)
    indices = random.integers(-1, 400, (400, 6)).astype(np.int32)
    sims = np.where(indices < 0, np.nan, random.uniform(0.1, 1, (400, 6))).astype(np.float32)
    whole = image_graph(rows, indices, sims, 50)
    monkeypatch.setattr("cache.image_graph._BLOCK_ROWS", 7)
    for mine, other in zip(image_graph(rows, indices, sims, 50), whole, strict=True):
        np.testing.assert_array_equal(mine, other)
    few = image_graph(rows, indices, sims, 50, most=3)
    for row in range(50):
        span = slice(*whole.indptr[row : row + 2])
        kept = slice(*few.indptr[row : row + 2])
        assert few.rows[kept].tolist() == whole.rows[span][:3].tolist()
        assert few.weights[kept].tolist() == whole.weights[span][:3].tolist()


def test_no_selectable_region_at_all_is_legal(tmp_path):
    write_sample_cache(tmp_path / "c", sample_plan(num_images=6))
    lists = build_neighbors(tmp_path / "c", NeighborSettings(max_base_iou=1e-9))
    assert lists.indices.shape == (0, 16)
    assert lists.graph_indptr.tolist() == [0] * 7


FAULTS = ["neighbors.before_rename", "neighbors.after_rename:3", "neighbors.before_manifest"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_killed_build_leaves_the_older_lists_or_none(tmp_path, fault):
    path = tmp_path / "c"
    write_sample_cache(path, sample_plan(num_images=12))
    older = np.array(build_neighbors(path, NeighborSettings(per_image=2, k=2)).indices)
    code = (
        "import pathlib, sys\n"
        "from cache.neighbors import NeighborSettings, build_neighbors\n"
        "build_neighbors(pathlib.Path(sys.argv[1]), NeighborSettings(per_image=4, k=3))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env={**os.environ, "DKDETR_FAULT": fault},
        check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    lists = open_cache(path).neighbors()
    if fault == "neighbors.before_rename":
        np.testing.assert_array_equal(lists.indices, older)
    else:
        assert lists is None
    again = build_neighbors(path, NeighborSettings(per_image=4, k=3))
    assert again.indices.shape[1] == 3
    assert not list(path.rglob(f"*{PARTIAL_SUFFIX}"))
    assert verify_cache(path).good


def test_one_builder_at_a_time_and_an_error_leaves_nothing(path, monkeypatch):
    build_neighbors(path, NeighborSettings(per_image=4, k=5))
    before = {file.name: file.read_bytes() for file in (path / "neighbors").iterdir()}
    with Lease(path), pytest.raises(CacheLockedError):
        build_neighbors(path)
    monkeypatch.setattr(ListsDraft, "put", _fail)
    with pytest.raises(ZeroDivisionError):
        build_neighbors(path, NeighborSettings(per_image=3))
    assert {file.name: file.read_bytes() for file in (path / "neighbors").iterdir()} == before


def _fail(*_args):
    raise ZeroDivisionError


def test_spoilt_or_foreign_lists_are_refused(tmp_path):
    path = tmp_path / "c"
    write_sample_cache(path, sample_plan(num_images=8))
    build_neighbors(path, NeighborSettings(per_image=2, k=2))
    file = path / "neighbors" / "indices.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=r"indices\.npy .*next: dkdetr cache neighbors"):
        open_cache(path).neighbors()
    assert any("indices.npy" in problem for problem in verify_cache(path).problems)

    write_sample_cache(tmp_path / "other", sample_plan(num_images=9))
    build_neighbors(tmp_path / "other", NeighborSettings(per_image=2, k=2))
    (path / NEIGHBORS_MANIFEST).write_bytes((tmp_path / "other" / NEIGHBORS_MANIFEST).read_bytes())
    with pytest.raises(StaleCacheError, match="other embeddings"):
        open_cache(path).neighbors()
    with pytest.raises(CacheError, match="at least 1"):
        NeighborSettings(per_image=0)
    with pytest.raises(CacheError, match="above 0"):
        NeighborSettings(duplicate_cosine=1.5)


def test_reading_needs_neither_zarr_nor_faiss(path):
    code = (
        "import sys, cache.store, pathlib\n"
        "reader = cache.store.open_cache(pathlib.Path(sys.argv[1]))\n"
        "reader.rows(int(reader.image_ids[0])), reader.neighbors()\n"
        "assert not {'zarr', 'faiss', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
