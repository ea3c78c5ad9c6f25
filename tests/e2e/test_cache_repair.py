"""`cache repair` on a cache that stage 1 made: the teacher makes the same bytes again."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cache.export import export_cache
from cache.layout import load_provenance, write_provenance
from cache.neighbors import NeighborSettings
from cache.spec import CorruptCacheError, StaleCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from cli import app
from dkdetr.errors import DataError, UsageError
from dkdetr.experiment_file import load_experiment
from dkdetr.student.build import build_trunk
from pipeline import repair, shard_worker
from pipeline.build import cache_teacher
from pipeline.crops import CropRule
from pipeline.inspect import describe_cache
from pipeline.neighbor_stage import add_neighbors, ensure_neighbors, recorded_settings
from pipeline.proposal_network import save_network
from pipeline.repair import repair_cache
from pipeline.request import recorded_request
from tests.cache_samples import committed_bytes
from tests.e2e.tiny_stage_one import one_pixel_changed


@pytest.fixture
def cache(request_):
    cache_teacher(replace(request_, storage="int8"))
    return request_.out


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def test_damaged_shards_and_files_are_made_again_to_the_same_bytes(cache, monkeypatch):
    before = committed_bytes(cache)
    _flip(cache / "data.zarr/region_embeddings/c/1/0/0")
    (cache / "data.zarr/gt/boxes_xyxy/c/2/0").unlink()
    _flip(cache / "plan.json")
    _flip(cache / "text/embeddings.npy")
    with pytest.raises(CorruptCacheError, match=r"plan\.json has changed"):
        open_cache(cache)
    made: list[int] = []
    commit = repair.cache_teacher

    def counted(request, say, remaking):
        summary = commit(request, say, remaking)
        made.append(summary.num_made)
        return summary

    monkeypatch.setattr(repair, "cache_teacher", counted)
    said: list[str] = []
    summary = repair_cache(cache, say=said.append)
    assert made == [2]
    assert summary.same_bytes
    assert set(summary.repaired) == {
        "shard 000001", "shard 000002", "plan.json", "text/manifest.json",
    }  # fmt: skip
    assert committed_bytes(cache) == before
    assert verify_cache(cache).good
    assert repair_cache(cache).lines() == [f"{cache}: nothing is damaged"]


def test_the_command_line_repairs_one_shard_and_tells(cache, teacher_spec):
    before = committed_bytes(cache)
    _flip(cache / "data.zarr/objectness/c/0/0")
    runner = CliRunner()
    result = runner.invoke(app, ["cache", "verify", str(cache)])
    assert result.exit_code == 5
    assert f"dkdetr cache repair {cache}" in result.output
    result = runner.invoke(app, ["cache", "repair", str(cache), "--shard", "0"])
    assert result.exit_code == 0, result.output
    assert "repaired  shard 000000" in result.output
    assert committed_bytes(cache) == before
    result = runner.invoke(app, ["cache", "info", str(cache)])
    assert "1 - cosine = " in result.output
    weights = (Path(teacher_spec.partition(":")[2]) / "w.safetensors").read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    assert f"teacher_weights: file w.safetensors, sha256 {sha256}\n" in result.output
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert describe_cache(cache).as_json()["bytes_on_disk"] == size
    export = cache.with_name("export")
    assert runner.invoke(app, ["cache", "export", str(cache), str(export)]).exit_code == 0
    result = runner.invoke(app, ["cache", "diff", f"file://{cache}", str(export)])
    assert "same Merkle root" in result.output
    assert runner.invoke(app, ["cache", "verify", str(export)]).exit_code == 0


def test_what_was_never_sealed_is_finished_by_repair(cache):
    before = committed_bytes(cache)
    for name in ("COMPLETE.json", "manifest/000002.json", "text/manifest.json"):
        (cache / name).unlink()
    result = CliRunner().invoke(app, ["cache", "verify", str(cache)])
    assert result.exit_code == 4, result.output
    assert f"next: dkdetr cache repair {cache}" in result.output.replace("\n", "")
    summary = repair_cache(cache)
    assert summary.repaired == ("shard 000002", "COMPLETE.json", "text/manifest.json")
    assert "no seal to compare" in summary.lines()[-1]
    assert committed_bytes(cache) == before


@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_what_was_never_sealed_and_lost_its_plan_is_made_anew_by_repair(cache, request_, harm):
    """In the batches that its head remembers: the device would settle others."""
    before = committed_bytes(cache)
    (cache / "COMPLETE.json").unlink()
    _flip(cache / "plan.json") if harm == "flip" else (cache / "plan.json").unlink()
    provenance = load_provenance(cache)
    provenance["request"]["crop_batch"] = None
    write_provenance(cache, provenance)
    with pytest.raises(CorruptCacheError, match="next: dkdetr cache repair"):
        cache_teacher(replace(request_, storage="int8"))
    summary = repair_cache(cache)
    assert len(summary.repaired) == 3 + 2  # every shard, the plan, the seal
    assert committed_bytes(cache) == before


@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_a_lost_provenance_is_brought_back_by_the_cache_s_own_command(cache, request_, harm):
    before = committed_bytes(cache)
    file = cache / "provenance.json"
    _flip(file) if harm == "flip" else file.unlink()
    _flip(cache / "plan.json")
    (cache / "manifest/000001.json").unlink()
    with pytest.raises(CorruptCacheError, match=r"own cache-teacher.*shard 000001, plan\.json"):
        repair_cache(cache)
    assert cache_teacher(replace(request_, storage="int8")).num_made == 1
    assert committed_bytes(cache) == before
    assert repair_cache(cache).repaired == ()


def test_damaged_lists_alone_are_built_again_as_they_were(cache, monkeypatch):
    made_with = NeighborSettings(per_image=3, k=2)
    ensure_neighbors(cache, made_with)
    before = (cache / "neighbors/sims.npy").read_bytes()
    _flip(cache / "neighbors/sims.npy")
    monkeypatch.setattr(repair, "cache_teacher", None)  # no teacher and no pictures are asked for
    assert repair_cache(cache).repaired == ("neighbour lists",)
    assert (cache / "neighbors/sims.npy").read_bytes() == before
    assert add_neighbors(cache) == ()  # as stage 1 does when its command is run again
    assert recorded_settings(cache) == made_with


def test_a_cache_with_flipped_views_is_repaired_and_exported(request_):
    crops = CropRule(views="orig,flip")
    cache_teacher(replace(request_, crops=crops, neighbors=True))
    cache = request_.out
    before = committed_bytes(cache)
    _flip(cache / "data.zarr/flipped_embeddings/c/1/0/0")
    _flip(cache / "neighbors/sims.npy")
    assert set(repair_cache(cache).repaired) == {"shard 000001", "neighbour lists"}
    assert committed_bytes(cache) == before
    assert recorded_request(load_provenance(cache)["request"], cache).neighbors
    reader, export = open_cache(cache), cache.with_name("flips")
    export_cache(reader, export)
    copy = open_cache(export)
    for image_id in reader.image_ids.tolist():
        ours, theirs = (each.rows(image_id).flipped_embeddings for each in (reader, copy))
        assert ours is not None
        assert theirs is not None
        assert np.array_equal(ours, theirs, equal_nan=True)
    _flip(next(iter(sorted((export / "mapped").glob("*.npy")))))
    result = CliRunner().invoke(app, ["cache", "verify", str(export)])
    assert result.exit_code == 5
    assert f"dkdetr cache export CACHE {export}" in result.output


def test_changed_pictures_are_no_repair(cache, request_, tmp_path):
    shutil.copytree(cache, tmp_path / "copy")
    (cache / "manifest/000001.json").unlink()
    _, images, _ = request_.split.split(":")
    picture = min(Path(images).glob("*.png"))
    message = r"images\.content_xxh3_128  cache: \w+  wanted"
    with one_pixel_changed(picture), pytest.raises(StaleCacheError, match=message):
        repair_cache(cache)
    assert repair_cache(cache).same_bytes  # its goal is remembered


def test_a_lost_network_that_cannot_be_trained_is_told_before_anything_is_taken_out(
    cache, monkeypatch
):
    provenance = load_provenance(cache)
    recorded = {"proposals": "fit", "experiment": "trial", "overrides": ["compute.micro_batches=3"]}
    write_provenance(cache, provenance | {"request": provenance["request"] | recorded})
    _flip(cache / "data.zarr/objectness/c/1/0")
    before = committed_bytes(cache)
    monkeypatch.setattr("pipeline.build.load_teacher", None)
    with pytest.raises(UsageError, match=r"do not divide by 3 micro-batches"):
        repair_cache(cache)
    assert committed_bytes(cache) == before
    # A network that is there is reused, in however many parts it was trained; not a broken one.
    network = cache / "proposals/network.safetensors"
    network.parent.mkdir(exist_ok=True)
    network.touch()
    before = committed_bytes(cache)
    with pytest.raises(UsageError, match=r"do not divide by 3 micro-batches"):
        repair_cache(cache)
    assert committed_bytes(cache) == before
    config = load_experiment("trial", ["student.backbone.weights=random"]).config.student
    save_network(network, build_trunk(config), config, {})
    before = committed_bytes(cache)
    with pytest.raises(TypeError, match="not callable"):  # it came as far as the teacher
        repair_cache(cache)
    assert committed_bytes(cache) == before


def test_a_cache_that_does_not_know_its_making_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="cache-teacher command again"):
        recorded_request(None, tmp_path)


@pytest.fixture
def two_pictures_lost(world):
    files = [next(world.rglob(name)) for name in ("020.png", "033.png")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(b"")
    yield
    for file, data in zip(files, before, strict=True):
        file.write_bytes(data)


@pytest.mark.usefixtures("two_pictures_lost")
def test_what_a_later_limit_would_refuse_is_repaired_all_the_same(request_):
    root = cache_teacher(replace(request_, max_bad=0.5)).merkle_root
    with pytest.raises(DataError, match="max-bad"):
        cache_teacher(request_)
    (request_.out / "manifest/000001.json").unlink()
    assert repair_cache(request_.out).merkle_root == root
    assert open_cache(request_.out).info.merkle_root == root


def test_a_repair_that_its_own_command_finishes_says_if_the_rows_came_out_otherwise(
    request_, monkeypatch
):
    old = cache_teacher(request_).merkle_root
    (request_.out / "provenance.json").unlink()
    (request_.out / "manifest/000001.json").unlink()
    with pytest.raises(CorruptCacheError, match="run its own cache-teacher"):
        repair_cache(request_.out)
    write = shard_worker.commit_shard

    def otherwise(path, shard, rows, **more):
        halved = [replace(row, objectness=row.objectness / 2) for row in rows]
        return write(path, shard, halved, **more)

    monkeypatch.setattr(shard_worker, "commit_shard", otherwise)
    summary = cache_teacher(request_)
    assert any(f"was {old} and is {summary.merkle_root}" in note for note in summary.notes), (
        summary.notes
    )
