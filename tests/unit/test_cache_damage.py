"""Damage of every class of file is found, taken out of the commit, and made again byte by byte."""

import pytest

from cache.damage import find_damage, finish_repair, uncommit
from cache.diff import diff_caches
from cache.neighbors import NeighborSettings, build_neighbors
from cache.spec import CacheError, CorruptCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from tests.cache_samples import (
    QUARANTINED,
    committed_bytes,
    parts,
    sample_plan,
    sample_rows,
    unit_rows,
    write_sample_cache,
)

_EACH = [
    "data.zarr/region_embeddings/c/1/0/0",
    "data.zarr/gt/embeddings/c/2/0",
    "data.zarr/zarr.json",
    "manifest/000001.json",
    "CACHE.json",
    "plan.json",
    "quarantine.jsonl",
    "text/manifest.json",
    "text/embeddings.npy",
    "COMPLETE.json",
    "provenance.json",
]


@pytest.fixture
def cache(tmp_path):
    write_sample_cache(tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("name", _EACH)
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_what_is_damaged_is_found_and_made_again_to_the_same_bytes(cache, name, harm):
    before = committed_bytes(cache)
    file = cache / name
    data = file.read_bytes()
    if harm == "delete":
        file.unlink()
    else:
        flipped = bytes([data[len(data) // 2] ^ 8])
        half = len(data) // 2
        file.write_bytes(data[:half] + (flipped + data[half + 1 :] if harm == "flip" else b""))
    damage = find_damage(cache)
    assert damage.any
    expected = {1} if "/1" in name or "000001" in name else {2} if "/2/" in name else set()
    assert set(damage.shards) == expected
    uncommit(damage)
    seal = write_sample_cache(cache)
    finish_repair(damage, seal.merkle_root)
    assert committed_bytes(cache) == before
    assert not find_damage(cache).any


def test_what_a_kill_left_unmade_is_damage_as_verify_says(cache):
    before = committed_bytes(cache)
    (cache / "COMPLETE.json").unlink()
    report = verify_cache(cache)
    assert (report.unfinished, report.good) == (True, False)
    assert find_damage(cache).lines() == ["COMPLETE.json"]
    (cache / "text/manifest.json").unlink()
    assert find_damage(cache).lines() == ["COMPLETE.json", "text/manifest.json"]
    (cache / "manifest/000001.json").unlink()
    report = verify_cache(cache)
    assert report.unfinished
    assert len(report.problems) == 2
    damage = find_damage(cache)
    assert damage.lines() == ["shard 000001", "COMPLETE.json", "text/manifest.json"]
    uncommit(damage)
    finish_repair(damage, write_sample_cache(cache).merkle_root)
    assert committed_bytes(cache) == before
    (cache / "manifest/000001.json").unlink()
    assert not verify_cache(cache).unfinished  # it was sealed: this is a loss
    (cache / "COMPLETE.json").unlink()
    file = cache / "data.zarr/objectness/c/0/0"
    file.write_bytes(file.read_bytes()[:-1])
    assert not verify_cache(cache).unfinished


@pytest.mark.parametrize("harm", ["cut", "delete"])
def test_an_unsealed_cache_without_its_plan_is_made_anew(cache, harm):
    """Neither plan nor seal: rows that nobody can place go with it, and the command goes on."""
    before = committed_bytes(cache)
    (cache / "COMPLETE.json").unlink()
    (cache / "manifest/000001.json").unlink()  # shards may be committed in any order
    file = cache / "plan.json"
    file.write_bytes(file.read_bytes()[:-9])
    if harm == "delete":
        file.unlink()
    with pytest.raises(CorruptCacheError):
        write_sample_cache(cache)
    damage = find_damage(cache)
    assert damage.shards == (0, 2)
    uncommit(damage)
    finish_repair(damage, write_sample_cache(cache).merkle_root)
    assert committed_bytes(cache) == before


def test_a_repair_of_one_shard_looks_at_no_other(cache):
    for shard in (0, 1):
        file = cache / f"data.zarr/boxes_xyxy/c/{shard}/0/0"
        file.write_bytes(file.read_bytes()[:-1])
    assert find_damage(cache, shards=[1]).shards == (1,)
    assert find_damage(cache).shards == (0, 1)
    with pytest.raises(CacheError, match="no shard 3"):
        find_damage(cache, shards=[3])
    with pytest.raises(CacheError, match="no cache at"):
        find_damage(cache / "nowhere")


def test_a_repair_cut_short_still_knows_its_goal_and_other_bytes_are_an_error(cache):
    root = open_cache(cache).info.merkle_root
    (cache / "manifest/000000.json").unlink()
    uncommit(find_damage(cache))
    again = find_damage(cache)
    assert again.old_root == root
    with pytest.raises(CorruptCacheError, match="not to the same bytes"):
        finish_repair(again, "another")


def test_what_a_killed_repair_left_without_head_and_seal_is_still_a_cache_to_repair(cache):
    root = open_cache(cache).info.merkle_root
    (cache / "CACHE.json").unlink()
    uncommit(find_damage(cache))
    assert not (cache / "COMPLETE.json").exists()
    again = find_damage(cache)
    assert again.old_root == root
    assert {"CACHE.json", "COMPLETE.json"} <= set(again.files)


def test_damaged_neighbour_lists_are_named(cache):
    build_neighbors(cache, NeighborSettings(per_image=3, k=3))
    file = cache / "neighbors/sims.npy"
    file.write_bytes(file.read_bytes()[:-2])
    damage = find_damage(cache)
    assert damage.neighbors
    uncommit(damage)
    assert find_damage(cache).neighbors  # who builds them anew reads how they were made


def test_a_diff_names_fields_and_rows(cache, tmp_path):
    assert diff_caches(open_cache(cache), open_cache(cache)).lines() == [
        "the two caches hold the same bytes (same Merkle root)"
    ]
    from dataclasses import replace

    from cache.writer import create_or_resume

    plan = sample_plan(num_images=41)
    changed = parts(teacher={"name": "ViT-B-32:openai", "activation": "gelu"})
    turned = int(plan.image_ids[5])
    with create_or_resume(tmp_path / "d", parts=changed, plan=plan, provenance={}) as writer:
        for shard in writer.missing_shards():
            rows = [sample_rows(i, plan) for i in plan.shard_image_ids(shard)]
            rows = [
                replace(r, image_embedding=-r.image_embedding) if r.image_id == turned else r
                for r in rows
            ]
            writer.commit_shard(shard, rows)
        writer.write_text({"names": ["cat", "dog"]}, unit_rows_of_text())
        writer.seal()
    found = diff_caches(open_cache(cache), open_cache(tmp_path / "d"))
    assert any(
        line.startswith("teacher.activation") and "first: quick_gelu  second: gelu" in line
        for line in found.parts
    )
    assert found.only_in_first == ()
    assert found.only_in_second == (plan.image_ids[-1],)
    assert found.quarantined_in_one == tuple(QUARANTINED)
    (array,) = found.arrays
    assert (array.name, array.num_images, array.first_image) == ("image_embedding", 1, turned)
    assert array.worst == pytest.approx(-1)
    assert any("image_embedding: differs in 1 images" in line for line in found.lines())


def unit_rows_of_text():
    import numpy as np

    return unit_rows(np.random.default_rng(0), 2, 16)
