"""Two writers at once, a disk of any size that fills up, and what is no reason to refuse."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache.lock import _GUARD_WAIT_S
from cache.spec import CacheLockedError, DiskFullError
from cache.store import open_cache
from cache.verify import verify_cache
from cache.writer import create_or_resume
from tests.cache_samples import (
    committed_bytes,
    parts,
    sample_plan,
    shard_rows,
    unit_rows,
    write_sample_cache,
)


def _compete(path, barrier, results):
    """One of two writers that start together; whoever wins holds on until the other has failed."""
    import numpy as np

    plan = sample_plan()
    barrier.wait()
    started = time.process_time()
    try:
        writer = create_or_resume(path, parts=parts(), plan=plan, provenance={"host": "h"})
    except CacheLockedError as error:
        # What it may wait for, and its own work: a busy machine's seconds are not counted.
        results.put((error.exit_code, _GUARD_WAIT_S + time.process_time() - started))
        barrier.wait()
        return
    with writer:
        barrier.wait()
        for shard in writer.missing_shards():
            rows, quarantined = shard_rows(plan, shard)
            writer.commit_shard(shard, rows, quarantined=quarantined)
        writer.write_text({"names": ["cat", "dog"]}, unit_rows(np.random.default_rng(0), 2, 16))
        writer.seal()
    results.put((0, 0.0))


def _rounds(tmp_path, count):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.test_cache_writers_and_disks"])
    write_sample_cache(tmp_path / "clean")
    wanted = committed_bytes(tmp_path / "clean")
    for number in range(count):
        path = tmp_path / f"c{number}"
        barrier, results = context.Barrier(2, timeout=500), context.Queue()
        both = [context.Process(target=_compete, args=(path, barrier, results)) for _ in range(2)]
        for process in both:
            process.start()
        outcomes = sorted(results.get() for _ in both)
        for process in both:
            process.join()
        assert [code for code, _ in outcomes] == [0, 7]
        assert outcomes[1][1] < 2.0
        assert committed_bytes(path) == wanted
        shutil.rmtree(path)
    return count


def test_of_two_writers_exactly_one_writes(tmp_path):
    assert _rounds(tmp_path, 3) == 3


@pytest.mark.slow
def test_fifty_rounds_of_two_writers(tmp_path):
    assert _rounds(tmp_path, 50) == 50


def _fill_up(path, limit, wanted):
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write_sample_cache(path)
        full = False
    except DiskFullError as error:
        full = error.exit_code == 6 and "no room to write" in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    write_sample_cache(path)
    assert committed_bytes(path) == wanted
    shutil.rmtree(path)
    return full


def _limits(tmp_path, count):
    """Returns how many limits of a file's size stopped a writer; none of them lost anything."""
    write_sample_cache(tmp_path / "clean")
    wanted = committed_bytes(tmp_path / "clean")
    largest = max(len(data) for data in wanted.values())
    sizes = [100 + step * largest // count for step in range(count)]
    return sum(_fill_up(tmp_path / "c", size, wanted) for size in sizes)


def test_a_limit_of_a_files_size_loses_nothing(tmp_path):
    assert _limits(tmp_path, 5) >= 4


@pytest.mark.slow
def test_thirty_limits_of_a_files_size_lose_nothing(tmp_path):
    assert _limits(tmp_path, 30) >= 28


_ON_SMALL_DISKS = """
import subprocess, sys
from pathlib import Path
from cache.spec import DiskFullError
from tests.cache_samples import committed_bytes, write_sample_cache
disk, clean, first, last, steps = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
wanted = committed_bytes(clean)
full = 0
for step in range(steps):
    size = first + step * (last - first) // (steps - 1)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk], check=True)
    try:
        write_sample_cache(disk / "c")
    except DiskFullError as error:
        assert error.exit_code == 6 and not list((disk / "c").rglob("*.partial"))
        full += 1
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    write_sample_cache(disk / "c")
    assert committed_bytes(disk / "c") == wanted, size
    subprocess.run(["umount", disk], check=True)
print(full)
"""


@pytest.mark.slow
def test_thirty_full_disks_lose_nothing_and_go_on_when_enlarged(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a disk of his own")
    write_sample_cache(tmp_path / "clean")
    (tmp_path / "disk").mkdir()
    used = sum(-(-len(data) // 4096) * 4 for data in committed_bytes(tmp_path / "clean").values())
    sizes = [str(used // 20), str(used), "30"]
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", _ON_SMALL_DISKS, tmp_path / "disk",
         tmp_path / "clean", *sizes],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 25


def test_host_path_and_workers_are_no_reason_to_refuse(tmp_path):
    first = tmp_path / "c"
    root = write_sample_cache(first).merkle_root
    for number in range(20):
        place = tmp_path / f"moved {number}" / "ünicode" / "c"
        place.parent.mkdir(parents=True)
        first.rename(place)
        provenance = {"host": f"host{number}", "device": f"cuda:{number}", "workers": number}
        with create_or_resume(
            place, parts=parts(), plan=sample_plan(), provenance=provenance
        ) as writer:
            assert writer.sealed
            assert writer.missing_shards() == []
        assert open_cache(place).info.merkle_root == root
        first = place
    assert verify_cache(first).good
    read_only = Path(first)
    for file in read_only.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    readers = [open_cache(read_only) for _ in range(8)]
    assert len({reader.rows(3).objectness.tobytes() for reader in readers}) == 1
    for file in read_only.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
