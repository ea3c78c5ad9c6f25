"""Stage 1 under lost workers, failing ranks and SIGTERM: nothing lost, nothing twice, no hang."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cache.store import open_cache
from cache.verify import verify_cache
from dkdetr.errors import PreemptedError
from pipeline import build
from pipeline.build import cache_teacher
from pipeline.executor import Executor
from pipeline.request import CacheRequest
from tests.distributed.test_fit_ranks import TORCHRUN, fit_words
from tests.e2e.commands import DKDETR, dkdetr, environment
from tests.e2e.small_coco import write_coco_folder
from tests.e2e.tiny_stage_one import tiny_request, write_tiny_teacher, write_world
from tests.faults.ends_of_jobs import end_after, start_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheRequest, str]:
    """A request, and the Merkle root of its cache made in one undisturbed process."""
    folder = tmp_path_factory.mktemp("stage-one-faults")
    write_world(folder)
    request = tiny_request(folder, write_tiny_teacher(folder), folder / "cache")
    return request, cache_teacher(request).merkle_root


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_root(
    workers: int, made: tuple[CacheRequest, str], tmp_path: Path
) -> None:
    request, root = made
    other = replace(request, out=tmp_path / "c", executor=Executor(workers=workers))
    assert cache_teacher(other).merkle_root == root


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_killed_worker_loses_and_doubles_nothing(
    finished: int,
    made: tuple[CacheRequest, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request, root = made
    out = tmp_path / "c"
    run = build.run_shards
    killed: list[int] = []

    def kill_a_worker(executor: Executor, *given: Any) -> Iterator[Any]:
        results = run(executor, *given)
        for count, item in enumerate(results):
            if count == finished:
                killed.append(_kill_one_worker())
            yield item

    monkeypatch.setattr(build, "run_shards", kill_a_worker)
    summary = cache_teacher(replace(request, out=out, executor=Executor(workers=2)))
    assert killed
    assert summary.merkle_root == root
    report = verify_cache(out)
    assert report.good
    assert report.num_images == summary.num_images == 35


def _kill_one_worker() -> int:
    """Kills one of the worker processes that this test's own cluster has started."""
    ours = psutil.Process().children(recursive=True)
    workers = [each for each in ours if "spawn_main" in " ".join(each.cmdline())]
    os.kill(workers[0].pid, signal.SIGKILL)
    return workers[0].pid


def test_sigterm_ends_a_cluster_of_our_own_too(
    made: tuple[CacheRequest, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, root = made
    stopped = replace(request, out=tmp_path / "cache", executor=Executor(workers=2))
    run = build.run_shards

    def terminate_after_one(*args: Any) -> Iterator[Any]:
        for item in run(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            yield item

    monkeypatch.setattr(build, "run_shards", terminate_after_one)
    with pytest.raises(PreemptedError):
        cache_teacher(stopped)
    monkeypatch.undo()
    resumed = cache_teacher(replace(stopped, executor=Executor()))
    assert resumed.num_made < resumed.num_shards
    assert resumed.merkle_root == root


def test_a_scheduler_that_runs_already_gives_the_same_root(
    made: tuple[CacheRequest, str], tmp_path: Path
) -> None:
    request, root = made
    where = tmp_path / "scheduler.json"
    dask = (sys.executable, "-m", "dask")
    started = [
        subprocess.Popen(words, env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL)
        for words in (
            [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
             "--scheduler-file", str(where)],
            [*dask, "worker", "--scheduler-file", str(where), "--nthreads", "1", "--no-dashboard",
             "--name", "7"],
        )
    ]  # fmt: skip
    try:
        while not where.is_file() or not where.stat().st_size:
            assert [each.poll() for each in started] == [None, None]
            time.sleep(0.1)
        address = str(json.loads(where.read_text())["address"])
        other = replace(request, out=tmp_path / "c", executor=Executor(scheduler=address))
        assert cache_teacher(other).merkle_root == root
        # The cluster is not ours: it is still there.
        assert [each.poll() for each in started] == [None, None]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def test_the_command_answers_sigterm_with_75(
    made: tuple[CacheRequest, str], tmp_path: Path
) -> None:
    request, _ = made
    words = (
        "cache-teacher", "--split", request.split, "--out", "c", "--teacher", request.teacher,
        "--proposals", request.proposals, "--prompts", "vild63", "--keep", "5", "--device", "cpu",
    )  # fmt: skip
    said = ""
    with subprocess.Popen(
        [*DKDETR, *words], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if line.startswith("teacher "):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 75, said
    assert "error [75]: stopped by SIGTERM" in said
    assert dkdetr(*words, cwd=tmp_path).returncode == 0
    assert open_cache(tmp_path / "c").info.num_images == 35


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit-faults")
    write_coco_folder(folder, "train2017", num_images=12, seed=3)
    return folder


def test_an_error_of_the_first_rank_ends_the_others(folder: Path) -> None:
    picture = folder / "train2017" / "000005.jpg"
    picture.rename(folder / "away.jpg")
    try:
        job = start_job([*TORCHRUN, *DKDETR, *fit_words("three")], folder, folder / "said")
        said = end_after(job, folder / "said", "000005.jpg", patience_s=60)
    finally:
        (folder / "away.jpg").rename(picture)
    assert job.returncode != 0
    assert said.count("error [3]") == 1


def test_sigterm_to_all_ranks_keeps_the_state_and_the_same_command_goes_on(folder: Path) -> None:
    words = fit_words("four", "--only-proposals", epochs=40)
    process = subprocess.Popen(
        [*TORCHRUN, *DKDETR, *words], cwd=folder, env=environment(), stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    state = folder / "four" / "proposals" / "fit_state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode != 0
    assert "stopped by SIGTERM at step" in said, said
    assert state.exists()
    resumed = dkdetr(*words, cwd=folder)  # on one process
    assert resumed.returncode == 0, resumed.stderr
    assert not state.exists()
