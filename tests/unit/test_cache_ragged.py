"""Ground truth lies in a shard without padding: any numbers of boxes, over any chunk's border."""

from dataclasses import replace

import numpy as np
import pytest
import zarr

from cache.arrays import GT_CHUNK_ROWS, gt_rows_of_shard
from cache.durable import dump_checked_json
from cache.layout import Head
from cache.spec import CorruptCacheError, StaleCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from cache.writer import create_or_resume
from tests.cache_samples import HEIGHT, WIDTH, parts, sample_plan, sample_rows, unit_rows

# Past a chunk's end, exactly a chunk, none at all, the most there may be, one.
_NUM_GT = [3, GT_CHUNK_ROWS - 3, 0, 200, 1, 0] + [7] * 30


def _image(image_id, num_gt, plan):
    generator = np.random.default_rng(image_id)
    low = generator.uniform(0, [WIDTH / 2, HEIGHT / 2], (num_gt, 2))
    boxes = np.concatenate([low, low + generator.uniform(1, 30, (num_gt, 2))], axis=1)
    return replace(
        sample_rows(image_id, plan),
        gt_boxes_xyxy=boxes.astype(np.float32),
        gt_category_ids=generator.integers(1, 1000, num_gt),
        gt_embeddings=unit_rows(generator, num_gt, plan.embed_dim),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("ragged") / "c"
    plan = sample_plan(num_images=len(_NUM_GT), max_gt=200)
    images = {
        image_id: _image(image_id, num, plan)
        for image_id, num in zip(plan.image_ids, _NUM_GT, strict=True)
    }
    with create_or_resume(path, parts=parts(), plan=plan, provenance={}) as writer:
        for shard in writer.missing_shards():
            writer.commit_shard(shard, [images[i] for i in plan.shard_image_ids(shard)])
        writer.write_text({"names": ["x"]}, unit_rows(np.random.default_rng(0), 1, 16))
        writer.seal()
    return path, plan, images


def test_every_image_gets_its_own_boxes_back(cache):
    path, _, images = cache
    reader = open_cache(path)
    for image_id, wanted in images.items():
        found = reader.rows(image_id)
        np.testing.assert_array_equal(found.gt_boxes_xyxy, wanted.gt_boxes_xyxy)
        np.testing.assert_array_equal(found.gt_category_ids, wanted.gt_category_ids)
        half = wanted.gt_embeddings.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found.gt_embeddings, half)
        assert found.gt_boxes_xyxy.flags.writeable
    assert verify_cache(path).good
    assert verify_cache(path).num_gt == sum(_NUM_GT)


def test_zarr_reads_the_same_by_first_row_and_num_boxes(cache):
    path, plan, images = cache
    group = zarr.open_group(path / "data.zarr", mode="r", zarr_format=3)
    first, count = group["gt/first_row"], group["gt/num_boxes"]
    for row, image_id in enumerate(plan.image_ids):
        start = int(first[row])
        assert start // gt_rows_of_shard(plan) == row // plan.shard_size
        stored = group["gt/category_ids"][start : start + int(count[row])]
        np.testing.assert_array_equal(stored, images[image_id].gt_category_ids)


def test_truth_takes_its_own_room_and_not_the_largest_images(cache):
    path, plan, _ = cache
    for shard in range(plan.num_shards):
        rows = plan.shard_rows(shard)
        used = sum(_NUM_GT[rows.start : rows.stop])
        chunks = max(1, -(-used // GT_CHUNK_ROWS))
        size = (path / f"data.zarr/gt/embeddings/c/{shard}/0").stat().st_size
        index = gt_rows_of_shard(plan) // GT_CHUNK_ROWS * 16 + 4
        assert size == chunks * (GT_CHUNK_ROWS * 16 * 2 + 4) + index


def test_a_cache_of_the_padded_schema_is_refused_with_what_to_run(tmp_path):
    old = {"schema": 1, "fingerprint": "x", "parts": {}}
    (tmp_path / "CACHE.json").write_bytes(dump_checked_json(old))
    made = dump_checked_json({"command": "cache-teacher --split lvis_train"})
    (tmp_path / "provenance.json").write_bytes(made)
    with pytest.raises(StaleCacheError, match="has schema 1, and this version reads") as caught:
        Head.load(tmp_path)
    assert caught.value.exit_code == 4
    assert "dkdetr cache-teacher --split lvis_train" in str(caught.value)
    with pytest.raises(StaleCacheError, match="schema 1"):
        create_or_resume(tmp_path, parts=parts(), plan=sample_plan(), provenance={})


def test_rows_that_point_out_of_the_shard_are_corrupt(cache, monkeypatch):
    path, plan, _ = cache
    reader = open_cache(path)
    reader.rows(plan.image_ids[0])
    shard = reader.source._shards[0]
    monkeypatch.setattr(shard, "_first_gt", 10**9)
    with pytest.raises(CorruptCacheError, match="has no rows"):
        reader.rows(plan.image_ids[0])
