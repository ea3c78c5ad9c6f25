"""`cache-teacher` from files on a disk to a sealed cache, with a tiny CLIP and few pictures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache.rows import ImageRows
from cache.spec import DiskFullError, StaleCacheError
from cache.store import open_cache
from dkdetr.data.image_files import read_image
from dkdetr.errors import DataError, MismatchError, UsageError
from pipeline import build, shard_worker
from pipeline import price as price_module
from pipeline.build import cache_teacher
from pipeline.calibrate import price_cache
from pipeline.crops import CropRule
from pipeline.executor import Executor
from pipeline.request import CacheRequest
from pipeline.teacher import load_teacher
from tests.e2e.tiny_stage_one import (
    NUM_IMAGES,
    TINY_CLIP,
    one_pixel_changed,
    tiny_request,
)


def test_a_sealed_cache_holds_what_the_teacher_says(
    request_: CacheRequest, teacher_spec: str, world: Path
) -> None:
    summary = cache_teacher(replace(request_, neighbors=True))
    assert summary.num_images == NUM_IMAGES
    assert summary.num_made == summary.num_shards == 3
    assert summary.num_regions == 3 * (NUM_IMAGES - 1)  # duplicates go, picture 7 has none
    assert not summary.random_teacher
    base, novel = summary.recall
    assert (base.group, base.num_objects, novel.num_objects) == ("base", 70, 35)
    assert base.shares[5] == pytest.approx(34 / 35)
    assert novel.shares[5] == pytest.approx(34 / 35)

    reader = open_cache(request_.out)
    rows = reader.rows(12)
    assert rows.objectness.tolist() == pytest.approx([0.9, 0.8, 0.7])
    # The first two proposals are base objects, the third the novel one.
    assert rows.max_base_iou.tolist() == pytest.approx([1, 1, 0])
    assert rows.gt_category_ids.tolist() == [3, 5]
    teacher = load_teacher(teacher_spec)
    picture = read_image(world / "images" / "012.png", expected_hw=(62, 80))
    expected = teacher.encode_regions(picture, rows.boxes_xyxy)
    cosine = (rows.region_embeddings * expected).sum(1)
    assert (cosine > 0.999).all()  # stored as float16
    truth = teacher.encode_regions(picture, rows.gt_boxes_xyxy)
    assert ((rows.gt_embeddings * truth).sum(1) > 0.999).all()
    whole = teacher.encode_regions(
        picture, np.array([[0, 0, 80, 62]], dtype=np.float32), CropRule(scales=(1.0,))
    )
    assert float((rows.image_embedding * whole[0]).sum()) > 0.999
    assert reader.rows(7).num_regions == 0

    metadata, embeddings = reader.text()
    assert metadata["names"] == ["square", "disc", "cross"]
    assert metadata["is_base"] == [True, True, False]
    expected = teacher.encode_texts(
        ["a photo of a square.", "a photo of a disc.", "a photo of a cross."]
    )
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    assert reader.neighbors() is not None
    assert reader.info.provenance["uses_novel_names"] == "unknown"


# Dask's own clock: a busy disk that takes more than a second for a folder.
@pytest.mark.filterwarnings("default:Creating scratch directories is taking:UserWarning")
def test_workers_and_dask_change_no_byte(request_: CacheRequest, tmp_path: Path) -> None:
    alone = cache_teacher(request_)
    two = cache_teacher(replace(request_, out=tmp_path / "two", executor=Executor(workers=2)))
    assert two.num_made == 3
    assert two.merkle_root == alone.merkle_root
    assert two.num_regions == alone.num_regions


def test_resume_makes_only_what_is_missing_and_the_same_bytes(
    request_: CacheRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build.run_shards

    def stop_after_one(*args: object):
        for count, item in enumerate(made(*args)):  # type: ignore[arg-type]
            if count == 0:  # the second shard is embedded by now, and being written
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(build, "run_shards", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(request_)
    monkeypatch.undo()
    said: list[str] = []
    resumed = cache_teacher(request_, said.append)
    assert 1 <= resumed.num_made <= 2
    assert any("shards verified" in line for line in said)
    whole = cache_teacher(replace(request_, out=tmp_path / "whole"))
    assert whole.merkle_root == resumed.merkle_root
    again = cache_teacher(request_)
    assert again.num_made == 0
    assert again.merkle_root == resumed.merkle_root


def test_a_shard_that_cannot_be_written_ends_the_command_and_loses_no_other(
    request_: CacheRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cache_teacher(replace(request_, out=tmp_path / "whole"))
    write = shard_worker.commit_shard

    def second_finds_no_room(path: Path, shard: int, *given: object, **more: object) -> object:
        if shard == 1:
            raise DiskFullError("no room")
        return write(path, shard, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_worker, "commit_shard", second_finds_no_room)
    with pytest.raises(DiskFullError, match="no room"):
        cache_teacher(request_)
    monkeypatch.undo()
    resumed = cache_teacher(request_)
    assert 1 <= resumed.num_made <= 2
    assert resumed.merkle_root == whole.merkle_root


def test_a_shard_made_again_to_other_bytes_is_sealed_and_told(
    request_: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = cache_teacher(request_).merkle_root
    (request_.out / "data.zarr/objectness/c/1/0").unlink()
    write = shard_worker.commit_shard

    def otherwise(path: Path, shard: int, rows: list[ImageRows], **more: Any) -> object:
        changed = [replace(each, objectness=each.objectness / 2) for each in rows]
        return write(path, shard, changed, **more)

    monkeypatch.setattr(shard_worker, "commit_shard", otherwise)
    said: list[str] = []
    summary = cache_teacher(request_, said.append)
    assert (summary.num_made, summary.merkle_root != old) == (1, True)
    assert open_cache(request_.out).rows(20).num_regions == 3
    assert f"was {old} and is {summary.merkle_root}" in "".join(summary.notes)
    assert summary.notes[-1] in said


def test_the_fused_encoder_and_the_device_s_decoder_are_recorded_and_near(
    request_: CacheRequest, tmp_path: Path
) -> None:
    said: list[str] = []
    usual = cache_teacher(request_, said.append)
    assert any(line.startswith("encoder busy") for line in said)
    fused = cache_teacher(
        replace(request_, out=tmp_path / "fused", encoder="fused", decoder="torchvision")
    )
    assert usual.merkle_root != fused.merkle_root
    one, two = open_cache(request_.out), open_cache(tmp_path / "fused")
    assert "encoder" not in one.info.parts["teacher"]
    assert two.info.parts["teacher"]["encoder"] == "fused ViT"
    assert two.info.parts["images"]["decoder"].startswith("torchvision")
    for image_id in one.image_ids.tolist():
        ours, theirs = (each.rows(image_id).region_embeddings for each in (one, two))
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
    with pytest.raises(StaleCacheError, match=r"teacher\.encoder"):
        cache_teacher(replace(request_, encoder="fused"))


def test_other_prompts_embed_no_crop_again(request_: CacheRequest) -> None:
    cache_teacher(request_)
    changed = cache_teacher(replace(request_, prompts="clip7"))
    assert changed.num_made == 0
    metadata, _ = open_cache(request_.out).text()
    assert len(metadata["prompts"]) == 7


def test_another_teacher_or_picture_is_refused_in_words(
    request_: CacheRequest, tmp_path: Path, world: Path
) -> None:
    cache_teacher(request_)
    with pytest.raises(StaleCacheError, match=r"crops\.mode"):
        cache_teacher(replace(request_, crops=CropRule("clip_center")))
    model = load_teacher(request_.teacher)._model
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    state["visual.proj"][0, 0] += 0.5
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "tiny-cache-clip.json").write_text(json.dumps(TINY_CLIP))
    with pytest.raises(StaleCacheError, match=r"teacher\.weights_sha256") as caught:
        cache_teacher(replace(request_, teacher=f"tiny-cache-clip:{tmp_path}"))
    assert caught.value.exit_code == 4
    picture = world / "images" / "003.png"
    with one_pixel_changed(picture), pytest.raises(StaleCacheError, match=r"images\.content"):
        cache_teacher(request_)


def test_a_cache_is_finished_by_the_way_of_cutting_that_began_it(
    request_: CacheRequest, teacher_spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ways differ by grey levels, which the canary would let pass."""
    cache_teacher(request_)
    teacher = load_teacher(teacher_spec)
    job = build._job(request_, "", teacher, "", "", "auto", 64, CropRule())
    with pytest.raises(MismatchError, match="crops are cut here by 'torchvision"):
        shard_worker.tools_of(replace(job, resampling="another way"), 0)
    monkeypatch.setattr("pipeline.teacher_model.resampling_on", lambda _device: "another way")
    with pytest.raises(StaleCacheError, match=r"teacher\.resampling"):
        cache_teacher(request_)


def test_a_teacher_that_embeds_otherwise_is_caught_by_the_canary(
    request_: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_teacher(request_)
    monkeypatch.setattr(
        "pipeline.teacher_model.cut_windows",
        lambda image, windows, look: torch.full((len(windows), 3, *look.size_hw), 7).byte(),
    )
    with pytest.raises(MismatchError, match="canary cosine"):
        cache_teacher(request_)


def test_a_truncated_picture_is_set_aside_and_named(request_: CacheRequest, world: Path) -> None:
    paths = [world / "images" / f"{number:03d}.png" for number in (20, 33)]
    before = [path.read_bytes() for path in paths]
    try:
        paths[0].write_bytes(before[0][: len(before[0]) // 2])
        summary = cache_teacher(request_)
        assert list(summary.quarantined) == [20]
        assert "020.png" in summary.quarantined[20]
        assert str(world) not in summary.quarantined[20]
        assert open_cache(request_.out).rows(20).num_regions == 0
        paths[1].write_bytes(b"")
        other = replace(request_, out=request_.out.with_name("other"))
        for _ in range(2):  # all shards are committed by now, and yet it does not seal
            with pytest.raises(DataError, match=r"020\.png.*033\.png.*higher --max-bad") as caught:
                cache_teacher(other)
            assert caught.value.exit_code == 3
        paths[1].write_bytes(before[1])
        with pytest.raises(StaleCacheError, match=r"images\.content"):  # fetched again
            cache_teacher(other)
        paths[1].write_bytes(b"")
        assert list(cache_teacher(replace(other, max_bad=0.05)).quarantined) == [20, 33]
    finally:
        for path, data in zip(paths, before, strict=True):
            path.write_bytes(data)


def test_the_price_is_known_before_the_purchase(
    request_: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    price = price_cache(request_)
    assert not request_.out.exists()
    assert price.num_images == NUM_IMAGES
    assert price.max_crops == NUM_IMAGES * (5 * 2 + 1) + 70 * 2
    summary = cache_teacher(request_)
    assert summary.bytes_on_disk < 3 * price.bytes_needed + 100_000
    monkeypatch.setattr(
        price_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})
    )
    with pytest.raises(DiskFullError, match="--keep") as caught:
        price_cache(replace(request_, out=request_.out.with_name("other")))
    assert caught.value.exit_code == 6


def test_a_missing_scheduler_or_file_is_one_clear_error(
    request_: CacheRequest, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.executor._CONNECT_TIMEOUT_S", 1)
    with pytest.raises(UsageError, match="no Dask scheduler"):
        cache_teacher(replace(request_, executor=Executor(scheduler="tcp://127.0.0.1:9")))
    (world / "proposals.json").rename(world / "elsewhere.json")
    try:
        with pytest.raises(DataError, match=r"proposals\.json"):
            cache_teacher(request_)
    finally:
        (world / "elsewhere.json").rename(world / "proposals.json")


def test_proposals_of_another_split_are_refused(request_: CacheRequest, tmp_path: Path) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps([{"image_id": 999, "bbox": [1, 1, 5, 5], "score": 0.5}]))
    with pytest.raises(DataError, match="belongs to another split"):
        cache_teacher(replace(request_, proposals=f"file:{path}"))
    with pytest.raises(UsageError, match="none of fit"):
        cache_teacher(replace(request_, proposals="selective-search"))
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(UsageError, match="state the order"):
        cache_teacher(replace(request_, proposals=f"file:{tmp_path / 'x.pkl'}"))


def test_novel_boxes_change_nothing_in_the_cache(
    request_: CacheRequest, world: Path, tmp_path: Path
) -> None:
    cache_teacher(request_)
    document = json.loads((world / "train.json").read_text())
    document["annotations"] = [
        entry for entry in document["annotations"] if entry["category_id"] != 9
    ]
    (tmp_path / "train.json").write_text(json.dumps(document))
    split = f"ovcoco:{world / 'images'}:{tmp_path / 'train.json'}"
    other = replace(request_, split=split, out=tmp_path / "other")
    cache_teacher(other)
    first, second = open_cache(request_.out), open_cache(other.out)
    assert first.info.fingerprint == second.info.fingerprint
    for image_id in first.image_ids.tolist():
        ours, theirs = first.rows(image_id), second.rows(image_id)
        np.testing.assert_array_equal(ours.region_embeddings, theirs.region_embeddings)
        np.testing.assert_array_equal(ours.max_base_iou, theirs.max_base_iou)


def test_moved_pictures_leave_the_cache_as_it_is_and_findable(
    request_: CacheRequest, teacher_spec: str, world: Path, tmp_path: Path
) -> None:
    made = cache_teacher(request_)
    before = (request_.out / "CACHE.json").read_bytes()
    assert str(world).encode() not in before
    moved = tmp_path / "elsewhere"
    shutil.copytree(world, moved)
    again = cache_teacher(tiny_request(moved, teacher_spec, request_.out))
    assert again.num_made == 0
    assert again.merkle_root == made.merkle_root
    assert (request_.out / "CACHE.json").read_bytes() == before
    # Readers look for the pictures where they were seen last.
    assert open_cache(request_.out).info.split == tiny_request(moved, "", request_.out).split


def test_words_are_checked_before_the_data_is_read(
    request_: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the data set was read")

    monkeypatch.setattr(build, "load_split", never)
    wrong = {
        "proposals": "file:/nowhere.json", "teacher": "ViT-B-33:random", "prompts": "haiku",
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises((DataError, UsageError)):
            cache_teacher(replace(request_, **{name: value}))
