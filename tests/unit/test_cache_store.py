import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import zarr

from cache.arrays import array_specs
from cache.layout import changed_rows
from cache.rows import NORM_TOLERANCE
from cache.spec import CacheError, CorruptCacheError, StaleCacheError, UnsealedCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from cache.writer import commit_shard, create_or_resume
from tests.cache_samples import (
    QUARANTINED,
    committed_bytes,
    parts,
    sample_plan,
    sample_rows,
    shard_rows,
    unit_rows,
    write_sample_cache,
)

_EXACT = ("boxes_xyxy", "objectness", "max_base_iou", "gt_boxes_xyxy", "gt_category_ids")


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    path = tmp_path_factory.mktemp("sealed") / "cache of ünicode"
    write_sample_cache(path)
    return path


@pytest.mark.parametrize(("storage", "tolerance"), [("fp16", 5e-4), ("int8", 5e-3)])
def test_what_was_written_is_read(tmp_path, storage, tolerance):
    plan = sample_plan(storage=storage)
    write_sample_cache(tmp_path / "c", plan)
    reader = open_cache(tmp_path / "c")
    assert reader.image_ids.tolist() == list(plan.image_ids)
    for image_id in plan.image_ids:
        got, want = reader.rows(image_id), sample_rows(image_id, plan)
        if image_id in QUARANTINED:
            assert got.num_regions == 0
            assert np.isnan(got.image_embedding).all()
            continue
        assert got.image_size_hw == want.image_size_hw
        for name in _EXACT:
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        for name in ("region_embeddings", "image_embedding", "gt_embeddings"):
            read, written = getattr(got, name), getattr(want, name)
            assert read.dtype == np.float32
            np.testing.assert_allclose(read, written, atol=tolerance, err_msg=name)
            assert (np.abs(np.linalg.norm(read, axis=-1) - 1) <= NORM_TOLERANCE).all()
    assert verify_cache(tmp_path / "c").good


def test_info_and_text(sealed):
    reader = open_cache(sealed)
    info, plan = reader.info, sample_plan()
    assert (info.split, info.num_images, info.max_regions, info.embed_dim) == (
        "lvis_train", 40, 6, 16,
    )  # fmt: skip
    good = [sample_rows(i, plan).num_regions for i in plan.image_ids if i not in QUARANTINED]
    assert info.num_regions == sum(good)
    assert info.teacher == "ViT-B-32-quickgelu:openai"
    assert not info.random_teacher
    assert info.parts == parts()
    assert info.provenance == {"host": "h"}
    assert info.bytes_on_disk > 40 * 6 * 16 * 2
    assert reader.quarantined == QUARANTINED
    metadata, embeddings = reader.text()
    assert metadata == {"names": ["cat", "dog"]}
    np.testing.assert_array_equal(embeddings, unit_rows(np.random.default_rng(0), 2, 16))
    assert reader.neighbors() is None


def test_the_files_are_zarr_v3_that_zarr_reads_alike(sealed):
    reader = open_cache(sealed)
    group = zarr.open_group(sealed / "data.zarr", mode="r", zarr_format=3)
    embeddings, counts = group["region_embeddings"], group["num_regions"]
    for row, image_id in enumerate(reader.image_ids):
        read = reader.rows(int(image_id))
        assert counts[row] == read.num_regions
        stored = embeddings[row, : read.num_regions]
        np.testing.assert_array_equal(stored.astype(np.float32), read.region_embeddings)
    codecs = [codec.to_dict()["name"] for codec in embeddings.metadata.codecs[0].codecs]
    assert codecs == ["bytes", "crc32c"]
    assert embeddings.shards == (16, 6, 16)
    assert embeddings.chunks == (1, 6, 16)


def test_every_chunk_is_on_disk_even_if_all_is_fill(tmp_path):
    plan = sample_plan(num_images=16)
    everything = dict.fromkeys(plan.image_ids, "unreadable")
    with create_or_resume(tmp_path / "c", parts=parts(), plan=plan, provenance={}) as writer:
        writer.commit_shard(0, [], quarantined=everything)
        writer.write_text({}, unit_rows(np.random.default_rng(0), 1, 16))
        writer.seal()
    for spec in array_specs(plan):
        size = (tmp_path / "c" / spec.shard_file(0)).stat().st_size
        # Ground truth: one chunk of rows, and an index of as many as 16 x 3 boxes would take.
        chunks, places = (1, 1) if spec.ragged else (16, 16)
        assert size == chunks * (spec.chunk_bytes + 4) + places * 16 + 4
    assert open_cache(tmp_path / "c").quarantined == everything


def test_any_order_of_commits_gives_the_same_bytes(tmp_path):
    seals = [
        write_sample_cache(tmp_path / name, order=order)
        for name, order in [("a", sorted), ("b", lambda shards: sorted(shards, reverse=True))]
    ]
    assert seals[0] == seals[1]
    assert committed_bytes(tmp_path / "a") == committed_bytes(tmp_path / "b")


def test_an_interrupted_cache_resumes_to_the_same_bytes(tmp_path, sealed):
    path, plan = tmp_path / "c", sample_plan()
    with create_or_resume(path, parts=parts(), plan=plan, provenance={"host": "h"}) as writer:
        rows, quarantined = shard_rows(plan, 1)
        writer.commit_shard(1, rows, quarantined=quarantined)
        assert writer.missing_shards() == [0, 2]
    (path / "data.zarr" / "objectness" / "leftover.partial").write_bytes(b"x")
    write_sample_cache(path, plan)
    assert committed_bytes(path) == committed_bytes(sealed)


def test_a_finished_cache_is_returned_finished(tmp_path):
    write_sample_cache(tmp_path / "c")
    before = committed_bytes(tmp_path / "c")
    with create_or_resume(
        tmp_path / "c", parts=parts(), plan=sample_plan(), provenance={"host": "other"}
    ) as writer:
        assert writer.sealed
        assert writer.missing_shards() == []
        assert writer.text_is_current()
        rows, quarantined = shard_rows(writer.plan, 0)
        writer.commit_shard(0, rows, quarantined=quarantined)
    assert committed_bytes(tmp_path / "c") == before
    assert open_cache(tmp_path / "c").info.provenance == {"host": "h"}


def test_a_later_command_tells_where_the_teacher_is_from(tmp_path):
    write_sample_cache(tmp_path / "c")
    later = {"host": "other", "teacher_weights": {"sha256": "ab"}}
    create_or_resume(
        tmp_path / "c", parts=parts(), plan=sample_plan(), provenance=later
    ).__exit__(None, None, None)  # fmt: skip
    assert open_cache(tmp_path / "c").info.provenance == later | {"host": "h"}


def test_a_lost_shard_made_again_to_other_bytes_is_sealed_again(tmp_path):
    path, plan = tmp_path / "c", sample_plan()
    old = write_sample_cache(path, plan)
    (path / "data.zarr/objectness/c/1/0").unlink()

    def otherwise(image_id, plan):
        rows = sample_rows(image_id, plan)
        return replace(rows, objectness=rows.objectness / 2)

    with create_or_resume(path, parts=parts(), plan=plan, provenance={}) as writer:
        assert writer.missing_shards() == [1]
        rows, quarantined = shard_rows(plan, 1, otherwise)
        writer.commit_shard(1, rows, quarantined=quarantined)
        seal = writer.seal()
        (line,) = changed_rows(path, writer.old_roots, seal)
    assert f"was {old.merkle_root} and is {seal.merkle_root}" in line
    reader = open_cache(path)
    image_id = plan.shard_image_ids(1)[0]
    np.testing.assert_array_equal(
        reader.rows(image_id).objectness, otherwise(image_id, plan).objectness
    )
    assert verify_cache(path).good


def test_sealing_a_sealed_cache_changes_nothing(tmp_path):
    old = write_sample_cache(tmp_path / "c")
    before = committed_bytes(tmp_path / "c")
    with create_or_resume(
        tmp_path / "c", parts=parts(), plan=sample_plan(), provenance={}
    ) as writer:
        seal = writer.seal()
        assert (seal, changed_rows(tmp_path, writer.old_roots, seal)) == (old, ())
    assert committed_bytes(tmp_path / "c") == before


def test_other_prompts_touch_the_text_alone(tmp_path):
    path, plan = tmp_path / "c", sample_plan()
    first = write_sample_cache(path)
    data = {name: (path / name).stat().st_mtime_ns for name in committed_bytes(path / "data.zarr")
            if (path / name).exists()}  # fmt: skip
    changed = parts(text={"prompts": ["an icon of {}"]})
    with create_or_resume(path, parts=changed, plan=plan, provenance={}) as writer:
        assert writer.missing_shards() == []
        assert not writer.text_is_current()
        writer.write_text({"names": ["x"]}, unit_rows(np.random.default_rng(5), 1, 16))
        with pytest.raises(UnsealedCacheError, match="never sealed"):
            open_cache(path)
        second = writer.seal()
    assert second.data_root == first.data_root
    assert second.merkle_root != first.merkle_root
    assert all((path / name).stat().st_mtime_ns == stamp for name, stamp in data.items())
    assert open_cache(path).text()[0] == {"names": ["x"]}
    assert open_cache(path).info.parts["text"] == {"prompts": ["an icon of {}"]}


def test_another_teacher_is_refused_with_the_difference(tmp_path):
    write_sample_cache(tmp_path / "c")
    other = parts(teacher={"name": "ViT-B-32:openai", "activation": "gelu"})
    with pytest.raises(StaleCacheError) as caught:
        create_or_resume(tmp_path / "c", parts=other, plan=sample_plan(), provenance={})
    assert "teacher.activation  cache: quick_gelu  wanted: gelu" in str(caught.value)
    assert "--out" in str(caught.value)
    assert write_sample_cache(tmp_path / "c")  # and the lease was given back


@pytest.mark.parametrize("part", [name for name in parts() if name != "text"])
def test_every_part_of_the_fingerprint_counts(tmp_path, part):
    plan = sample_plan(num_images=3)
    create_or_resume(tmp_path / "c", parts=parts(), plan=plan, provenance={}).__exit__(*[None] * 3)
    with pytest.raises(StaleCacheError, match=part):
        create_or_resume(tmp_path / "c", parts=parts(**{part: "changed"}), plan=plan, provenance={})


def test_another_plan_under_the_same_parts_is_refused(tmp_path):
    write_sample_cache(tmp_path / "c")
    with pytest.raises(StaleCacheError, match="planned with other"):
        create_or_resume(
            tmp_path / "c", parts=parts(), plan=sample_plan(num_images=41), provenance={}
        )


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CacheError, match="not a cache and not empty"):
        create_or_resume(tmp_path, parts=parts(), plan=sample_plan(), provenance={})
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unfinished_cache_says_what_is_missing_and_what_to_run(tmp_path):
    path, plan = tmp_path / "c", sample_plan()
    with pytest.raises(UnsealedCacheError, match=r"no cache at .*next: dkdetr cache-teacher"):
        open_cache(path)
    with create_or_resume(path, parts=parts(), plan=plan, provenance={}) as writer:
        rows, quarantined = shard_rows(plan, 0)
        writer.commit_shard(0, rows, quarantined=quarantined)
        with pytest.raises(UnsealedCacheError, match="shard 000001 was not committed"):
            writer.seal()
    with pytest.raises(UnsealedCacheError) as caught:
        open_cache(path)
    assert "2 of 3 shards are missing" in str(caught.value)
    assert f"dkdetr cache-teacher --split lvis_train --out {path}" in str(caught.value)
    assert "shard 000001 was not committed" in verify_cache(path).problems


def test_a_shard_is_committed_whole_or_not_at_all(tmp_path):
    path, plan = tmp_path / "c", sample_plan()
    create_or_resume(path, parts=parts(), plan=plan, provenance={}).__exit__(None, None, None)
    rows, quarantined = shard_rows(plan, 0)
    first = rows[0].image_id
    for wrong, message in [
        ((rows[1:], quarantined), rf"missing images \[{first}\]"),
        (([*rows, sample_rows(999, plan)], quarantined), r"foreign images \[999\]"),
        ((rows, {**quarantined, first: "x"}), rf"both good and quarantined \[{first}\]"),
        (([*rows, rows[0]], quarantined), "1 given twice"),
    ]:
        with pytest.raises(CacheError, match=message):
            commit_shard(path, 0, wrong[0], quarantined=wrong[1])
    with pytest.raises(CacheError, match="no shard 3"):
        commit_shard(path, 3, [])


def test_a_reader_refuses_an_unknown_image(sealed):
    with pytest.raises(KeyError, match="holds no image 4"):
        open_cache(sealed).rows(4)


def _sum_of_image(task):
    reader, image_id = task
    return float(reader.rows(image_id).region_embeddings.sum())


def test_several_processes_read_at_once(sealed):
    reader = open_cache(sealed)
    ids = [int(i) for i in reader.image_ids[::4]]
    here = [_sum_of_image((reader, i)) for i in ids]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(_sum_of_image, [(reader, i) for i in ids], chunksize=5)) == here


def test_a_row_of_another_image_is_not_given_out(tmp_path, monkeypatch):
    write_sample_cache(tmp_path / "c")
    reader = open_cache(tmp_path / "c")
    swapped = {i: reader.plan.row_of[i] for i in reader.plan.image_ids}
    first, second = reader.plan.image_ids[:2]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    monkeypatch.setitem(reader.plan.__dict__, "row_of", swapped)
    with pytest.raises(CorruptCacheError, match=f"belongs to image {second}"):
        reader.rows(first)
