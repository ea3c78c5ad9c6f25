"""A cache made with relative words: workers and later commands may run in any folder."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache.layout import load_provenance, write_provenance
from cache.store import open_cache
from dkdetr.data.splits import load_split
from pipeline import build
from pipeline.build import cache_teacher
from pipeline.executor import Executor
from pipeline.online_teacher import teacher_of_cache
from pipeline.repair import repair_cache
from pipeline.request import CacheRequest
from pipeline.shard_worker import ShardJob, tools_of

RELATIVE = {
    "split": "ovcoco:world/images:world/train.json",
    "teacher": "tiny-cache-clip:teacher",
    "proposals": "file:world/proposals.json",
}


@pytest.fixture
def home(world: Path, teacher_spec: str, tmp_path: Path) -> Path:
    """A folder with all that a cache is made of."""
    shutil.copytree(world, tmp_path / "home/world")
    shutil.copytree(teacher_spec.partition(":")[2], tmp_path / "home/teacher")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "home"


def _damage(cache: Path) -> None:
    (cache / "manifest/000001.json").unlink()


def test_relative_words_are_found_from_another_folder(
    request_: CacheRequest, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[ShardJob] = []
    run = build.run_shards

    def remember(
        executor: Executor, task: Any, job: ShardJob, shards: list[int], *more: Any
    ) -> Iterator[Any]:
        jobs.append(job)
        yield from run(executor, task, job, shards, *more)

    monkeypatch.setattr(build, "run_shards", remember)
    by_paths = cache_teacher(request_)
    monkeypatch.chdir(home)
    made = cache_teacher(replace(request_, out=Path("cache"), **RELATIVE))  # type: ignore[arg-type]
    assert made.merkle_root == by_paths.merkle_root
    assert made.path == Path("cache")  # told as it was typed

    monkeypatch.chdir(tmp_path / "elsewhere")
    cache = home / "cache"
    assert tools_of(jobs[1], 0).plan.num_images == 35  # a worker that was started here
    info = open_cache(cache).info
    assert len(load_split(info.split, Path("data")).images) == 35
    assert teacher_of_cache(cache, "cpu").identity == info.teacher
    _damage(cache)
    assert repair_cache(cache).same_bytes


def test_a_cache_that_recorded_relative_words_is_repaired_where_it_was_made(
    request_: CacheRequest, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    cache_teacher(replace(request_, out=Path("cache"), **RELATIVE))  # type: ignore[arg-type]
    provenance = load_provenance(Path("cache"))
    old = {**provenance, "request": provenance["request"] | RELATIVE, "split": RELATIVE["split"]}
    write_provenance(Path("cache"), old | {"teacher_spec": RELATIVE["teacher"]})
    assert teacher_of_cache(Path("cache"), "cpu").identity == open_cache("cache").info.teacher
    _damage(Path("cache"))
    assert repair_cache(Path("cache")).same_bytes
    assert load_provenance(Path("cache"))["split"] == provenance["split"]  # and mended by it
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert teacher_of_cache(home / "cache", "cpu").teacher
