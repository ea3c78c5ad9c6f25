"""Runs shards: in this process, on a local Dask cluster, or on one that runs already.

Dask is a plain task runner here: a task is a shard's number, and a worker builds its teacher and
proposer once. The only file that imports Dask.
"""

import re
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from dask import config as dask_config
from distributed import Client, KilledWorker, LocalCluster, as_completed, get_worker

from dkdetr.errors import DkdetrError, UsageError

Result = TypeVar("Result")

_RETRIES = 2
_CONNECT_TIMEOUT_S = 20
_WORKERS_TIMEOUT_S = 600
"""A queue may start them later; no longer than this, for a cluster without any says nothing."""


@dataclass(frozen=True)
class Executor:
    """Where shards are made.

    `workers` starts that many processes on this machine; `scheduler` joins a running cluster;
    with neither, everything happens in this process.
    """

    workers: int = 0
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers}: give 0 (this process) or more")
        if self.workers and self.scheduler:
            raise UsageError("give --workers (a cluster of its own) or --scheduler, not both")

    @property
    def in_process(self) -> bool:
        """True if no other process takes part."""
        return not self.workers and self.scheduler is None


def run_shards(
    executor: Executor,
    task: Callable[[Any, int, int], Result | Future[Result]],
    job: Hashable,
    shards: Sequence[int],
    say: Callable[[str], None] = lambda _: None,
) -> Generator[tuple[int, Result], None, None]:
    """Yields (shard, result) as shards are finished.

    Args:
        executor: where.
        task: `task(job, shard, worker_number)`, a function of a module (workers import it). It
            must be idempotent: a shard is run again, up to twice, if its worker dies. In this
            process it may return a Future: then the next shard is begun before that is waited for.
        job: all that a worker needs to know, small and picklable.
        shards: what to run.
        say: told in a line what is waited for.

    Raises:
        Exception: whatever `task` raised first, as itself; shards not yet begun are dropped.
        UsageError: no scheduler at that address, or none of its workers came in ten minutes.
    """
    if executor.in_process:
        yield from _run_here(task, job, shards)
        return
    with _client(executor) as client:
        futures = client.map(
            _run_one, shards, task=task, job=job, pure=False, retries=_RETRIES, batch_size=64
        )
        if executor.scheduler is not None:
            # After `map`: a cluster that scales itself starts workers for tasks alone.
            _await_worker(client, executor.scheduler, say)
        shard_of = {future.key: shard for future, shard in zip(futures, shards, strict=True)}
        for future in as_completed(futures):
            try:
                result = future.result()
            except KilledWorker:
                client.cancel(futures)
                raise DkdetrError(
                    f"shard {shard_of[future.key]:06d} was given up: every worker that took it "
                    "died, most likely for want of memory; use fewer --workers, or none to see why"
                ) from None
            if isinstance(result, _Refusal):
                client.cancel(futures)
                raise result.error
            yield shard_of[future.key], result
            future.release()


def _run_here(
    task: Callable[[Any, int, int], Result | Future[Result]], job: Any, shards: Sequence[int]
) -> Iterator[tuple[int, Result]]:
    """Yields (shard, result); one result at most is still to come while the next is made."""
    unfinished: tuple[int, Result | Future[Result]] | None = None
    for shard in shards:
        made = task(job, shard, 0)
        if unfinished is not None:
            yield unfinished[0], _finished(unfinished[1])
        unfinished = shard, made
    if unfinished is not None:
        yield unfinished[0], _finished(unfinished[1])


def _finished(result: Result | Future[Result]) -> Result:
    return cast("Future[Result]", result).result() if isinstance(result, Future) else result


@dataclass(frozen=True)
class _Refusal:
    """An error whose message is for the user: it comes back as a value, and is not retried."""

    error: Exception


def _run_one(shard: int, *, task: Callable[[Any, int, int], Result], job: Any) -> Result | _Refusal:
    try:
        return task(job, shard, worker_number(str(get_worker().name)))
    except ValueError as error:
        if not hasattr(error, "exit_code"):
            raise
        return _Refusal(error)


def worker_number(name: str) -> int:
    """Returns the number at the end of a worker's name, by which it takes one of its GPUs.

    `dask worker --nworkers 8 --name gpu` calls its workers gpu-0 to gpu-7. One without a name is
    called by its address, whose end is a port: 0.
    """
    found = re.fullmatch(r"(?:[^:/]*[^:/\d])?(\d+)", name)
    return int(found[1]) if found else 0


@contextmanager
def _client(executor: Executor) -> Iterator[Client]:
    # spawn: a forked worker would inherit open CUDA contexts and zarr's threads.
    settings = {
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.worker.daemon": False,
        "distributed.admin.log-format": "%(name)s - %(levelname)s - %(message)s",
        "logging.distributed": "error",
    }
    with dask_config.set(settings):
        if executor.scheduler is not None:
            with _joined(executor.scheduler) as client:
                yield client
            return
        with (
            LocalCluster(
                n_workers=executor.workers,
                # One writes a shard while the other embeds the next (pipeline.shard_worker).
                threads_per_worker=2,
                processes=True,
                host="127.0.0.1",
                dashboard_address=cast("Any", None),  # off
                # A worker's memory is its teacher's; Dask's guess would pause or kill it.
                memory_limit=0,
                silence_logs=40,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client


def _joined(scheduler: str) -> Client:
    """Returns a client; later OSErrors are the tasks' own."""
    try:
        return Client(scheduler, timeout=_CONNECT_TIMEOUT_S)
    except OSError as error:
        raise UsageError(
            f"no Dask scheduler answers at '{scheduler}' ({error}); start one with `dask "
            "scheduler` and workers with `dask worker --nthreads 2` (one embeds, one writes), or "
            "use --workers N"
        ) from None


def _await_worker(client: Client, scheduler: str, say: Callable[[str], None]) -> None:
    """Returns once the scheduler has a worker: tasks without one would wait for ever in silence."""
    if client.nthreads():
        return
    say(f"waiting for workers at {scheduler}")
    try:
        client.wait_for_workers(1, timeout=_WORKERS_TIMEOUT_S)
    except TimeoutError:
        raise UsageError(
            f"the Dask scheduler at '{scheduler}' had no worker for {_WORKERS_TIMEOUT_S // 60} "
            f"minutes: start some with `dask worker {scheduler} --nthreads 2` and type the same "
            "command again, or use --workers N"
        ) from None
