"""One cache read from everywhere: Zarr, an export, shared memory, and behind fsspec's URLs."""

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cache import export, resident
from cache.export import export_cache
from cache.location import RemotePath, cache_path, local_folder, member
from cache.neighbors import NeighborSettings, build_neighbors
from cache.resident import load_resident, sweep_resident
from cache.spec import CacheError, CorruptCacheError, StaleCacheError, UnsealedCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from cache.writer import create_or_resume
from pipeline.inspect import verify_and_report
from tests.cache_samples import QUARANTINED, parts, sample_plan, write_sample_cache

_FIELDS = (
    "boxes_xyxy", "objectness", "max_base_iou", "region_embeddings", "image_embedding",
    "gt_boxes_xyxy", "gt_category_ids", "gt_embeddings", "image_size_hw",
)  # fmt: skip


@pytest.fixture(scope="module", params=["fp16", "int8"])
def sealed(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("sealed") / "c"
    write_sample_cache(path, sample_plan(storage=request.param))
    build_neighbors(path, NeighborSettings(per_image=3, k=3))
    return path


@pytest.fixture(scope="module")
def exported(sealed, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "e"
    assert export_cache(open_cache(sealed), out)
    return out


def _sent(value):
    """Returns what a loader process gets of a value."""
    return ForkingPickler.loads(ForkingPickler.dumps(value))


def _assert_equal(ours, theirs):
    assert ours.image_ids.tolist() == theirs.image_ids.tolist()
    assert ours.quarantined == theirs.quarantined
    assert ours.info.merkle_root == theirs.info.merkle_root
    assert ours.info.parts == theirs.info.parts
    np.testing.assert_array_equal(ours.text()[1], theirs.text()[1])
    np.testing.assert_array_equal(ours.neighbors().indices, theirs.neighbors().indices)
    for image_id in ours.image_ids.tolist():
        a, b = ours.rows(image_id), theirs.rows(image_id)
        for name in _FIELDS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_an_export_reads_as_its_cache_and_is_whole(sealed, exported):
    _assert_equal(open_cache(sealed), open_cache(exported))
    report = verify_cache(exported)
    assert report.good
    assert (report.num_images, report.num_quarantined) == (40, len(QUARANTINED))
    assert not (exported / "data.zarr").exists()
    assert not list(exported.rglob("*.partial"))
    copy = _sent(open_cache(exported))
    assert copy.is_export


def test_regions_are_the_rows_with_embeddings_on_demand(sealed, exported):
    for reader in (open_cache(sealed), open_cache(exported)):
        for image_id in reader.image_ids.tolist():
            rows, found = reader.rows(image_id), reader.regions(image_id)
            np.testing.assert_array_equal(found.boxes_xyxy, rows.boxes_xyxy)
            np.testing.assert_array_equal(found.max_base_iou, rows.max_base_iou)
            assert found.image_size_hw == rows.image_size_hw
            some = np.arange(rows.num_regions)[::2]
            np.testing.assert_array_equal(found.embeddings(some), rows.region_embeddings[some])


def test_an_export_takes_no_room_for_padding(sealed, exported):
    reader = open_cache(sealed)
    size = (exported / "mapped/boxes_xyxy.npy").stat().st_size
    assert size == 128 + 16 * reader.info.num_regions
    plain = np.load(exported / "mapped/boxes_xyxy.npy", allow_pickle=False)
    assert plain.shape == (reader.info.num_regions, 4)


def test_exporting_again_does_nothing_and_mends_what_was_harmed(sealed, exported, tmp_path):
    out = tmp_path / "e"
    shutil.copytree(exported, out)
    assert not export_cache(open_cache(sealed), out)
    file = out / "mapped/objectness.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert export_cache(open_cache(sealed), out)
    assert file.read_bytes() == good


@pytest.mark.parametrize(
    "name",
    ["text/embeddings.npy", "plan.json", "provenance.json", "manifest/000000.json",
     "neighbors/sims.npy", "neighbors/manifest.json", "COMPLETE.json"],
)  # fmt: skip
@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_a_harmed_copy_is_copied_again_and_nothing_is_mapped_anew(
    sealed, exported, tmp_path, monkeypatch, name, harm
):
    out = tmp_path / "e"
    shutil.copytree(exported, out)
    file = out / name
    good = file.read_bytes()
    file.unlink() if harm == "delete" else file.write_bytes(good[:-3] + b"?" + good[-2:])
    monkeypatch.setattr("cache.export.write_flat", None)
    assert export_cache(open_cache(sealed), out)
    assert file.read_bytes() == good
    assert verify_cache(out).good
    assert not export_cache(open_cache(sealed), out)


def test_lists_that_came_later_or_went_are_exported_too(sealed, exported, tmp_path, monkeypatch):
    cache, out = tmp_path / "c", tmp_path / "e"
    shutil.copytree(sealed, cache)
    shutil.copytree(exported, out)
    monkeypatch.setattr("cache.export.write_flat", None)
    build_neighbors(cache, NeighborSettings(per_image=2, k=2))
    write = export._write_record

    def stop_before_the_end(out, record, *, finished):
        if finished:
            raise KeyboardInterrupt
        write(out, record, finished=False)

    with monkeypatch.context() as patch:
        patch.setattr(export, "_write_record", stop_before_the_end)
        with pytest.raises(KeyboardInterrupt):
            export_cache(open_cache(cache), out)
    with pytest.raises(UnsealedCacheError, match="not finished"):
        open_cache(out)
    assert export_cache(open_cache(cache), out)
    assert open_cache(out).neighbors().indices.shape[1] == 2
    shutil.rmtree(cache / "neighbors")
    assert export_cache(open_cache(cache), out)
    assert open_cache(out).neighbors() is None
    assert not export_cache(open_cache(cache), out)
    build_neighbors(cache, NeighborSettings(per_image=3, k=3))
    file = cache / "neighbors/sims.npy"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CorruptCacheError, match="cache neighbors"):
        export_cache(open_cache(cache), out)
    assert open_cache(out).neighbors() is None  # the export stands as it was


def test_an_export_is_refused_where_it_cannot_be_meant(sealed, exported, tmp_path):
    with pytest.raises(CacheError, match="an export already"):
        export_cache(open_cache(exported), tmp_path / "x")
    with pytest.raises(CacheError, match="is an export of a cache"):
        create_or_resume(exported, parts=parts(), plan=sample_plan(), provenance={})
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CacheError, match=r"holds 'thesis\.tex'"):
        export_cache(open_cache(sealed), tmp_path)


def test_an_unfinished_export_and_one_of_another_cache_are_refused(exported, tmp_path, monkeypatch):
    other = tmp_path / "other"
    write_sample_cache(other, text_seed=1)
    out = tmp_path / "e"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cache.export.write_flat", stop)
    with pytest.raises(KeyboardInterrupt):
        export_cache(open_cache(other), out)
    monkeypatch.undo()
    for look in (open_cache, verify_cache):
        with pytest.raises(UnsealedCacheError, match="dkdetr cache export"):
            look(out)
    assert export_cache(open_cache(other), out)
    shutil.copy(exported / "EXPORT.json", out / "EXPORT.json")
    with pytest.raises(StaleCacheError, match=r"merkle_root  export: \w+  seal: \w+"):
        open_cache(out)


@pytest.fixture
def memory(tmp_path):
    folder = tmp_path / "memory"
    folder.mkdir()
    return folder


def test_resident_regions_are_the_selectable_ones(sealed, memory):
    reader = open_cache(sealed)
    with load_resident(reader, max_base_iou=0.5, memory=memory) as ours:
        assert len(list(memory.iterdir())) == 3
        for image_id in reader.image_ids.tolist():
            all_of_them, found = reader.regions(image_id), ours.regions(image_id)
            keep = np.flatnonzero(all_of_them.max_base_iou < 0.5)
            np.testing.assert_array_equal(found.boxes_xyxy, all_of_them.boxes_xyxy[keep])
            np.testing.assert_array_equal(
                found.embeddings(slice(None)), all_of_them.embeddings(keep)
            )
        with pytest.raises(KeyError):
            ours.regions(4)
    assert list(memory.iterdir()) == []


def test_the_last_reader_frees_the_memory_and_a_dead_ones_is_swept(sealed, exported, memory):
    reader = open_cache(exported)
    first = load_resident(reader, max_base_iou=0.5, memory=memory)
    second = load_resident(reader, max_base_iou=0.5, memory=memory)
    first.close()
    assert second.regions(int(reader.image_ids[0])).image_id == reader.image_ids[0]
    assert sweep_resident(memory) == 0
    copy = _sent(second)
    second.close()
    assert list(memory.iterdir()) == []
    assert copy.regions(int(reader.image_ids[3])).image_id == reader.image_ids[3]
    dead = load_resident(reader, max_base_iou=0.7, memory=memory)
    dead._finalizer.detach()[2][1].close()  # what the kernel does for a killed process
    assert len(list(memory.iterdir())) == 3
    assert sweep_resident(memory) == 1
    assert list(memory.iterdir()) == []
    (memory / f"dkdetr-{os.getuid()}-{'a' * 24}-0.5.guard").touch()  # killed one moment later
    assert sweep_resident(memory) == 1
    assert list(memory.iterdir()) == []


def _boxes_in_memory(task):
    reader, memory = task
    with load_resident(reader, max_base_iou=0.5, memory=memory) as ours:
        return sum(len(ours.regions(i).boxes_xyxy) for i in reader.image_ids.tolist())


def test_processes_of_a_machine_load_once_and_agree(sealed, memory):
    reader = open_cache(sealed)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        counts = set(pool.map(_boxes_in_memory, [(reader, memory)] * 6))
    assert len(counts) == 1
    assert list(memory.iterdir()) == []


def test_what_does_not_fit_into_memory_is_refused_with_what_to_do(sealed, memory, monkeypatch):
    monkeypatch.setattr(resident, "_free_memory", lambda: 1000)
    with pytest.raises(CacheError, match=r"data\.cache_mode=stored"):
        load_resident(open_cache(sealed), max_base_iou=0.5, memory=memory)
    assert list(memory.iterdir()) == []
    with pytest.raises(CacheError, match="lacks"):
        load_resident(open_cache(sealed), max_base_iou=0.5, memory=memory / "none")


@pytest.fixture(params=["memory", "file"])
def url(request, sealed, tmp_path):
    if request.param == "file":
        shutil.copytree(sealed, tmp_path / "far")
        yield f"file://{tmp_path / 'far'}"
        return
    files = fsspec.filesystem("memory")
    files.put(str(sealed), "/far", recursive=True)
    yield "memory://far"
    files.rm("/far", recursive=True)


def test_a_cache_is_read_from_a_url(sealed, url):
    ours = open_cache(url)
    _assert_equal(ours, open_cache(sealed))
    assert ours.info.bytes_on_disk == open_cache(sealed).info.bytes_on_disk
    assert verify_cache(url).good
    image_id = int(ours.image_ids[0])
    copy = _sent(ours)
    np.testing.assert_array_equal(copy.rows(image_id).boxes_xyxy, ours.rows(image_id).boxes_xyxy)


def test_a_cache_opens_beside_a_writer_and_walks_no_folder(sealed, monkeypatch):
    def vanished(_):
        raise FileNotFoundError(2, "No such file or directory", "x.partial")

    with monkeypatch.context() as patch:
        patch.setattr("cache.store.total_size", vanished)
        reader = open_cache(sealed)
    total = reader.info.bytes_on_disk
    walk = os.walk

    def renamed_meanwhile(path):
        for folder, folders, names in walk(path):
            yield folder, folders, [*names, "COMPLETE.json.ab12.partial"]

    monkeypatch.setattr(os, "walk", renamed_meanwhile)
    assert reader.info.bytes_on_disk == total


def test_a_fault_behind_a_url_is_found_and_named(url):
    place = cache_path(url) / "data.zarr/boxes_xyxy/c/1/0/0"
    files, path = place._files()
    good = place.read_bytes()
    files.pipe_file(path, good[:100] + bytes([good[100] ^ 4]) + good[101:])
    reader = open_cache(url)
    mends = rf"FOLDER --shard 1, on the folder that {url} was copied from"
    with pytest.raises(CorruptCacheError, match=rf"shard 000001.*boxes_xyxy.*{mends}"):
        reader.rows(int(reader.image_ids[20]))
    with pytest.raises(CorruptCacheError, match=f"repair FOLDER, on the folder that {url} was"):
        verify_and_report(cache_path(url), Path("data")).raise_problems()
    files.rm_file(path)
    assert any("boxes_xyxy" in line for line in verify_cache(url).problems)


def test_urls_are_for_reading_and_unknown_ones_are_named():
    with pytest.raises(UnsealedCacheError, match="no cache at memory://nowhere"):
        open_cache("memory://nowhere")
    with pytest.raises(CacheError, match=r"nosuch://x.* cannot be opened"):
        open_cache("nosuch://x")
    with pytest.raises(CacheError, match="and not train; copy it"):
        local_folder("memory://x", to="train")
    assert cache_path("memory://a/b") == RemotePath("memory://a/b/")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "a\\b", "a\0b", "", "./a"])
def test_no_name_in_a_cache_leads_out_of_it(tmp_path, name):
    with pytest.raises(CorruptCacheError, match="not its own"):
        member(tmp_path, name)
