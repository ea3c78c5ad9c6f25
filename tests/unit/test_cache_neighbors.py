import subprocess
import sys

import numpy as np
import pytest

from cache.neighbor_lists import NEIGHBORS_MANIFEST
from cache.neighbors import build_neighbors, image_graph
from cache.spec import CacheError, CorruptCacheError, StaleCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from tests.cache_samples import sample_plan, write_sample_cache


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("neighbors") / "c"
    write_sample_cache(path, sample_plan(num_images=25))
    return path


def _brute_force(reader, per_image, k):
    objects = [
        (row, region, embedding)
        for row, image_id in enumerate(reader.image_ids)
        for region, embedding in enumerate(reader.rows(int(image_id)).region_embeddings[:per_image])
    ]
    rows = np.array([row for row, _, _ in objects])
    embeddings = np.stack([embedding for _, _, embedding in objects])
    scores = embeddings.astype(np.float64) @ embeddings.T
    scores[rows[:, None] == rows] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return objects, rows, best, np.take_along_axis(scores, best, axis=1)


def test_the_lists_are_those_of_brute_force(path):
    built = build_neighbors(path, per_image=4, k=5)
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

    weights = np.zeros((25, 25))
    for place, row in enumerate(rows):
        for neighbor, score in zip(best[place], scores[place], strict=True):
            weights[row, rows[neighbor]] += max(score, 0)
    for row in range(25):
        related, weight = lists.related_images(row)
        assert (np.diff(weight) <= 0).all()
        dense = np.zeros(25)
        dense[related] = weight
        np.testing.assert_allclose(dense, weights[row], atol=1e-5)
    assert verify_cache(path).good


def test_too_few_neighbours_are_marked(path, tmp_path):
    write_sample_cache(tmp_path / "c", sample_plan(num_images=3))
    lists = build_neighbors(tmp_path / "c", per_image=50, k=40)
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
    indptr, related, weights = image_graph(rows, indices, sims, 3)
    assert indptr.tolist() == [0, 1, 1, 2]
    assert related.tolist() == [2, 0]
    assert weights.tolist() == [0.75, 0.25]


def test_spoilt_or_foreign_lists_are_refused(tmp_path):
    path = tmp_path / "c"
    write_sample_cache(path, sample_plan(num_images=8))
    build_neighbors(path, per_image=2, k=2)
    file = path / "neighbors" / "indices.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=r"indices\.npy .*next: dkdetr cache neighbors"):
        open_cache(path).neighbors()
    assert any("indices.npy" in problem for problem in verify_cache(path).problems)

    write_sample_cache(tmp_path / "other", sample_plan(num_images=9))
    build_neighbors(tmp_path / "other", per_image=2, k=2)
    (path / NEIGHBORS_MANIFEST).write_bytes((tmp_path / "other" / NEIGHBORS_MANIFEST).read_bytes())
    with pytest.raises(StaleCacheError, match="other embeddings"):
        open_cache(path).neighbors()
    with pytest.raises(CacheError, match="at least 1"):
        build_neighbors(path, per_image=0)


def test_reading_needs_neither_zarr_nor_faiss(path):
    code = (
        "import sys, cache.store, pathlib\n"
        "reader = cache.store.open_cache(pathlib.Path(sys.argv[1]))\n"
        "reader.rows(int(reader.image_ids[0])), reader.neighbors()\n"
        "assert not {'zarr', 'faiss', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
