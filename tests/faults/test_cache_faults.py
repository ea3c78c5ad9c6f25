"""Kills, bit flips, lost files and full disks: nothing is lost, nothing wrong is read."""

import errno
import json
import random
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from cache.neighbors import NeighborSettings, build_neighbors
from cache.spec import CacheError, CorruptCacheError, DiskFullError, UnsealedCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from tests.cache_samples import committed_bytes, sample_plan, shard_rows, write_sample_cache

_POINTS = [
    "create.before_file:1",
    "create.before_file:9",
    "atomic.before_rename:2",
    "atomic.before_rename:22",
    "commit.before_write:1",
    "commit.before_write:3",
    "commit.after_file:17",
    "commit.before_manifest:1",
    "commit.before_manifest:3",
    "commit.after_manifest:2",
    "text.before_write:1",
    "text.before_manifest:1",
    "seal.after_quarantine:1",
    "seal.before_complete:1",
    "seal.after_complete:1",
]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("clean") / "c"
    write_sample_cache(path)
    return path


@pytest.fixture(scope="module")
def run_writer():
    """Yields `run(path, fault="", kill_after_s=0.0)`, which returns how the writer ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.cache_killer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(path, fault="", kill_after_s=0.0) -> int:
        trial = {"path": str(path), "fault": fault, "kill_after_s": kill_after_s}
        process.stdin.write(json.dumps(trial) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.stdout.close()
    assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("point", _POINTS)
def test_a_kill_at_a_commit_point_costs_nothing(tmp_path, clean, run_writer, point):
    path = tmp_path / "c"
    assert run_writer(path, point) == -signal.SIGKILL
    if point != "seal.after_complete:1":
        with pytest.raises(UnsealedCacheError):
            open_cache(path)
    assert run_writer(path) == 0
    assert committed_bytes(path) == committed_bytes(clean)
    assert verify_cache(path).good


def _kill_at_random(path, clean, run_writer, kills, seed):
    """Kills writers at random moments until one gets through, `kills` times in all at least."""
    generator = random.Random(seed)
    done = 0
    while done < kills:
        shutil.rmtree(path, ignore_errors=True)
        while done < kills and run_writer(path, kill_after_s=generator.uniform(0.002, 0.4)):
            done += 1
        assert run_writer(path) == 0
        assert committed_bytes(path) == committed_bytes(clean)


def test_kills_at_random_moments_cost_nothing(tmp_path, clean, run_writer):
    _kill_at_random(tmp_path / "c", clean, run_writer, kills=12, seed=0)


@pytest.mark.slow
def test_two_hundred_kills_at_random_moments_cost_nothing(tmp_path, clean, run_writer):
    _kill_at_random(tmp_path / "c", clean, run_writer, kills=200, seed=1)


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


def test_a_second_writer_ends_with_exit_code_7(tmp_path, run_writer):
    from cache.writer import create_or_resume
    from tests.cache_samples import parts

    path, plan = tmp_path / "c", sample_plan()
    with create_or_resume(path, parts=parts(), plan=plan, provenance={}) as writer:
        assert run_writer(path) == 7
        rows, quarantined = shard_rows(plan, 0)
        writer.commit_shard(0, rows, quarantined=quarantined)
    assert run_writer(path) == 0


@pytest.mark.parametrize("limit", [600, 1500, 2500, 3000])
def test_no_room_ends_with_one_error_and_what_was_committed_stays(tmp_path, clean, limit):
    path = tmp_path / "c"
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DiskFullError, match="no room to write") as caught:
            write_sample_cache(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert caught.value.exit_code == 6
    assert caught.value.__cause__.errno == errno.EFBIG
    write_sample_cache(path)
    assert committed_bytes(path) == committed_bytes(clean)


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
