import errno
import os
import stat

import pytest

from cache.durable import disk_errors, dump_checked_json, load_checked_json, write_atomic
from cache.layout import merkle_root
from cache.plan import Plan, make_plan
from cache.spec import (
    CacheError,
    CacheLockedError,
    CorruptCacheError,
    DiskFullError,
    StaleCacheError,
    UnsealedCacheError,
    diff_parts,
    fingerprint,
    split_text_parts,
)
from tests.cache_samples import parts


def test_exit_codes_are_the_documented_ones():
    codes = {
        UnsealedCacheError: 4,
        StaleCacheError: 4,
        CorruptCacheError: 5,
        DiskFullError: 6,
        CacheLockedError: 7,
    }
    assert {error: error.exit_code for error in codes} == codes


def test_the_fingerprint_ignores_the_order_of_keys_and_sees_every_leaf():
    table = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    assert fingerprint(table) == fingerprint({"d": "x", "a": {"c": [1, 2], "b": 1}})
    others = [
        {"a": {"b": 1, "c": [2, 1]}, "d": "x"},
        {"a": {"b": 2, "c": [1, 2]}, "d": "x"},
        {"a": {"b": 1, "c": [1, 2]}, "d": ""},
        {"a": {"b": 1, "c": [1, 2]}},
        {"a": {"b": True, "c": [1, 2]}, "d": "x"},
    ]
    assert len({fingerprint(other) for other in [table, *others]}) == 6


def test_the_fingerprint_is_sha256_of_canonical_json():
    # sha256 of the seven bytes {"a":1}
    wanted = "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert fingerprint({"a": 1}) == wanted


def test_text_has_a_fingerprint_of_its_own():
    image_parts, text = split_text_parts(parts())
    others, other_text = split_text_parts(parts(text={"prompts": ["{}"]}))
    assert fingerprint(image_parts) == fingerprint(others)
    assert fingerprint(text) != fingerprint(other_text)


def test_parts_that_are_missing_or_unknown_are_named():
    table = parts(colour="red")
    del table["crops"]
    with pytest.raises(CacheError, match=r"missing crops; unknown colour"):
        split_text_parts(table)


def test_a_difference_is_told_in_words():
    changed = parts(teacher={"name": "ViT-B-32:openai", "activation": "gelu"}, storage={})
    assert diff_parts(changed, parts()) == [
        "storage             cache: {}  wanted: (absent)",
        "storage.dtype       cache: (absent)  wanted: fp16",
        "teacher.activation  cache: gelu  wanted: quick_gelu",
        "teacher.name        cache: ViT-B-32:openai  wanted: ViT-B-32-quickgelu:openai",
    ]
    assert diff_parts(parts(), parts()) == []


def test_a_long_difference_is_cut_and_still_tells_the_two_apart():
    (line,) = diff_parts({"x": "a" * 90 + "1"}, {"x": "a" * 90 + "2"})
    assert len(line) < 150
    left, right = line.split("wanted:")
    assert left.split("#")[1] != right.split("#")[1]


@pytest.mark.parametrize(
    ("num_images", "size", "shards"),
    [(1, 16, 1), (16, 16, 1), (17, 16, 2), (257, 17, 16), (8192, 512, 16), (100_170, 512, 196)],
)
def test_shards_have_the_documented_size_and_cover_every_image_once(num_images, size, shards):
    plan = make_plan(
        range(num_images, 0, -1), max_regions=1, embed_dim=1, max_gt=0, storage="fp16",
        batch_layout={},
    )  # fmt: skip
    assert (plan.shard_size, plan.num_shards) == (size, shards)
    ids = [i for shard in range(plan.num_shards) for i in plan.shard_image_ids(shard)]
    assert ids == list(range(1, num_images + 1))


def test_a_plan_survives_json(tmp_path):
    plan = make_plan(
        [5, 3], max_regions=2, embed_dim=4, max_gt=1, storage="int8", batch_layout={"a": 1}
    )
    write_atomic(tmp_path / "plan.json", dump_checked_json(plan.to_dict()))
    assert Plan.from_dict(load_checked_json(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": ()}, "at least one image"),
        ({"image_ids": (1, 1)}, "sorted and unique"),
        ({"image_ids": (-1, 1)}, "negative"),
        ({"max_regions": 0}, "max_regions"),
        ({"max_gt": -1}, "max_gt"),
        ({"storage": "fp8"}, "fp8"),
    ],
)
def test_an_impossible_plan_is_refused(change, message):
    good = {
        "image_ids": (1, 2), "shard_size": 16, "max_regions": 1, "embed_dim": 1, "max_gt": 0,
        "storage": "fp16", "batch_layout": {},
    }  # fmt: skip
    with pytest.raises(CacheError, match=message):
        Plan(**{**good, **change})


def test_checked_json_refuses_every_changed_byte(tmp_path):
    file = tmp_path / "a.json"
    data = dump_checked_json({"name": "x", "number": 1.5, "list": [1, 2], "none": None})
    for at in range(len(data)):
        for bit in range(8):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            with pytest.raises(CorruptCacheError, match=r"a\.json"):
                load_checked_json(file)
    file.write_bytes(data)
    assert load_checked_json(file)["number"] == 1.5


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "a"
    write_atomic(file, b"old")

    def no_room(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cache.durable.os.fsync", no_room)
    with pytest.raises(DiskFullError, match="No space left"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced_stops_nobody(tmp_path, monkeypatch, number):
    def no_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("cache.durable.os.fsync", no_folders)
    if number == errno.EIO:  # the disk's own word is another matter
        with pytest.raises(OSError, match="error"):
            write_atomic(tmp_path / "a", b"new")
    else:
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_only_a_lack_of_room_becomes_a_disk_error():
    with pytest.raises(PermissionError), disk_errors("x"):
        raise PermissionError(errno.EACCES, "no")


def test_the_merkle_root_depends_on_names_and_hashes_and_not_on_their_order():
    leaves = {"a": "1", "b": "2", "c": "3"}
    root = merkle_root(leaves)
    assert root == merkle_root({"c": "3", "a": "1", "b": "2"})
    others = [{"a": "1", "b": "2"}, {"a": "2", "b": "1", "c": "3"}, {**leaves, "d": "4"}, {}]
    assert len({root, *map(merkle_root, others)}) == 5
