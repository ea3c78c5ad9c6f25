"""Bit flips, cut and lost files, swapped rows: nothing wrong is read, and files are named."""

import random
import shutil

import numpy as np
import pytest

from cache.export import export_cache
from cache.neighbors import NeighborSettings, build_neighbors
from cache.spec import CacheError, CorruptCacheError, UnsealedCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from tests.cache_samples import committed_bytes, sample_plan, write_sample_cache


def _read_everything(path):
    """Reads all that a user of a sealed cache can reach."""
    reader = open_cache(path)
    for image_id in reader.image_ids:
        reader.rows(int(image_id))
    reader.text()
    reader.neighbors()


def _one_of_each_class(path):
    """Returns a cache's files by class: all shards of an array count as one class."""
    classes: dict[str, list] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and not name.startswith(".lock"):
            kind = "manifest" if name.startswith("manifest/") else name.split("/c/")[0]
            classes.setdefault(kind, []).append(file)
    return classes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sealed int8 cache with neighbour lists: it has every class of file there is."""
    path = tmp_path_factory.mktemp("whole") / "c"
    write_sample_cache(path, sample_plan(storage="int8"))
    build_neighbors(path, NeighborSettings(per_image=3, k=3))
    _read_everything(path)
    return path


def _assert_detected(path, file, *, sealed=True):
    """Reading fails by name (file, and shard where it belongs to one), and so does verifying."""
    name = str(file.relative_to(path))
    with pytest.raises(CacheError) as caught:
        _read_everything(path)
    try:
        problems = "\n".join(verify_cache(path).problems)
    except CorruptCacheError as error:  # no head to verify by
        problems = str(error)
    for text in (str(caught.value), problems):
        assert file.name in text, name
        if "/c/" in name:
            shard = int(name.split("/c/")[1].split("/")[0])
            assert f"shard {shard:06d}" in text, name
            assert name.split("data.zarr/")[1].split("/c/")[0] in text, name
        if name.startswith("manifest/"):
            assert f"shard {file.stem}" in text, name
    if sealed:
        assert isinstance(caught.value, CorruptCacheError), name


def _flip_bits(path, flips_per_class, seed):
    generator = random.Random(seed)
    flips = 0
    for files in _one_of_each_class(path).values():
        for _ in range(flips_per_class):
            file = generator.choice(files)
            data = file.read_bytes()
            changed = bytearray(data)
            at = generator.randrange(len(data))
            changed[at] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            _assert_detected(path, file)
            file.write_bytes(data)
            flips += 1
    _read_everything(path)
    return flips


def test_every_flipped_bit_is_found_and_its_file_named(whole):
    assert _flip_bits(whole, flips_per_class=2, seed=0) >= 60


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_found(whole):
    assert _flip_bits(whole, flips_per_class=30, seed=1) >= 1000


def _cut_files(path, cuts_per_class, seed):
    generator = random.Random(seed)
    cuts = 0
    for files in _one_of_each_class(path).values():
        for _ in range(cuts_per_class):
            file = generator.choice(files)
            data = file.read_bytes()
            file.write_bytes(data[: generator.randrange(len(data))])
            _assert_detected(path, file)
            file.write_bytes(data)
            cuts += 1
    _read_everything(path)
    return cuts


@pytest.mark.slow
def test_two_hundred_cut_files_are_found(whole):
    assert _cut_files(whole, cuts_per_class=6, seed=3) >= 200


def _read_export(path):
    """Reads all of an export; its manifests, which no row needs, too."""
    _read_everything(path)
    reader = open_cache(path)
    for shard in range(reader.plan.num_shards):
        reader.manifest(shard)


def _flip_export(exported, flips_per_file, seed):
    """Flips bits of every file of an export; returns how many, all of them found."""
    generator = random.Random(seed)
    flips = 0
    for file in sorted(each for each in exported.rglob("*") if each.is_file()):
        if file.name.startswith(".lock") or file.name == "provenance.json":
            continue
        data = file.read_bytes()
        for _ in range(flips_per_file if data else 0):
            changed = bytearray(data)
            changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(CacheError) as caught:
                _read_export(exported)
            assert file.name in str(caught.value)
            flips += 1
        file.write_bytes(data)
    _read_everything(exported)
    return flips


def test_flipped_bits_of_an_export_are_found_and_named(whole, tmp_path):
    export_cache(open_cache(whole), tmp_path / "e")
    assert _flip_export(tmp_path / "e", flips_per_file=2, seed=4) >= 50


@pytest.mark.slow
def test_three_hundred_flipped_bits_of_an_export_are_found(whole, tmp_path):
    export_cache(open_cache(whole), tmp_path / "e")
    assert _flip_export(tmp_path / "e", flips_per_file=12, seed=5) >= 300


def test_every_cut_or_deleted_file_is_found_and_named(whole):
    generator = random.Random(2)
    for files in _one_of_each_class(whole).values():
        file = generator.choice(files)
        data = file.read_bytes()
        file.write_bytes(data[: generator.randrange(len(data))])
        _assert_detected(whole, file)
        file.unlink()
        if file.name == "COMPLETE.json":
            with pytest.raises(UnsealedCacheError):
                open_cache(whole)
        elif str(file.relative_to(whole)) == "neighbors/manifest.json":
            assert open_cache(whole).neighbors() is None
        else:
            with pytest.raises(CacheError) as caught:
                _read_everything(whole)
            assert file.name in str(caught.value)
        file.write_bytes(data)
    _read_everything(whole)


def test_a_shard_changed_under_an_open_reader_is_still_noticed(tmp_path):
    path = tmp_path / "c"
    write_sample_cache(path)
    reader = open_cache(path)
    image_id = next(i for i in reader.image_ids.tolist() if reader.rows(i).num_regions)
    file = path / "data.zarr/region_embeddings/c/0/0/0"
    data = bytearray(file.read_bytes())
    for at in range(0, len(data), 50):
        data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=r"shard 000000: array region_embeddings"):
        reader.rows(image_id)
    file.unlink()
    with pytest.raises(CorruptCacheError, match="missing"):
        reader.rows(image_id)


@pytest.mark.parametrize(
    "name",
    [
        "data.zarr/region_embeddings/c/1/0/0",
        "data.zarr/boxes_xyxy/zarr.json",
        "manifest/000001.json",
        "text/embeddings.npy",
        "quarantine.jsonl",
        "plan.json",
        "COMPLETE.json",
        "provenance.json",
    ],
)
@pytest.mark.parametrize("harm", ["cut", "delete"])
def test_running_the_stage_again_mends_a_harmed_cache(tmp_path, clean, name, harm):
    path = tmp_path / "c"
    shutil.copytree(clean, path)
    file = path / name
    if harm == "delete":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    if name == "plan.json":
        # Its loss cannot be told from another plan: nothing is guessed.
        with pytest.raises(CorruptCacheError, match=r"plan\.json"):
            write_sample_cache(path)
        return
    write_sample_cache(path)
    assert committed_bytes(path) == committed_bytes(clean)
    assert verify_cache(path).good


def test_rows_that_were_swapped_by_hand_are_refused(tmp_path):
    """Even with hashes that fit: the ids stored with the rows tell."""
    path = tmp_path / "c"
    plan = sample_plan()
    from unittest.mock import patch

    from cache.arrays import blocks_of

    def swapped(images, plan):
        blocks = blocks_of(images, plan)
        return {name: np.roll(block, 1, axis=0) for name, block in blocks.items()}

    with patch("cache.writer.blocks_of", swapped):
        write_sample_cache(path, plan)
    with pytest.raises(CorruptCacheError, match="its row belongs to image"):
        open_cache(path).rows(plan.image_ids[0])
    assert any("belongs to image" in problem for problem in verify_cache(path).problems)
