"""Kills at commit points and at random moments, second writers: nothing is lost or doubled."""

import random
import shutil
import signal

import pytest

from cache.spec import UnsealedCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from tests.cache_samples import committed_bytes, sample_plan, shard_rows

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


_FIFTY_POINTS = [
    *(f"create.before_file:{hit}" for hit in range(1, 16, 2)),
    *(f"atomic.before_rename:{hit}" for hit in range(1, 65, 4)),
    *(f"commit.before_write:{hit}" for hit in (1, 2, 3)),
    *(f"commit.after_file:{hit}" for hit in range(1, 40, 4)),
    *(f"commit.before_manifest:{hit}" for hit in (1, 2, 3)),
    *(f"commit.after_manifest:{hit}" for hit in (1, 2, 3)),
    "text.before_write:1",
    "text.before_manifest:1",
    "seal.after_quarantine:1",
    "seal.before_complete:1",
    "seal.after_complete:1",
    "atomic.before_rename:2",
    "atomic.before_rename:22",
]


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


@pytest.mark.slow
def test_fifty_kills_at_named_points_cost_nothing(tmp_path, clean, run_writer):
    assert len(_FIFTY_POINTS) >= 50
    for number, point in enumerate(_FIFTY_POINTS):
        path = tmp_path / f"c{number}"
        assert run_writer(path, point) == -signal.SIGKILL, point
        assert run_writer(path) == 0
        assert committed_bytes(path) == committed_bytes(clean), point
        shutil.rmtree(path)


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


def test_a_second_writer_ends_with_exit_code_7(tmp_path, run_writer):
    from cache.writer import create_or_resume
    from tests.cache_samples import parts

    path, plan = tmp_path / "c", sample_plan()
    with create_or_resume(path, parts=parts(), plan=plan, provenance={}) as writer:
        assert run_writer(path) == 7
        rows, quarantined = shard_rows(plan, 0)
        writer.commit_shard(0, rows, quarantined=quarantined)
    assert run_writer(path) == 0
