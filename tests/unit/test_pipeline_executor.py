"""What a Dask worker's name says, and whose error an error is."""

from typing import Any, Self

import pytest

from dkdetr.errors import UsageError
from pipeline import executor
from pipeline.executor import Executor, run_shards, worker_number


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("3", 3),  # LocalCluster's
        ("gpu-12", 12),
        ("node7.cluster-0", 0),
        ("tcp://10.0.0.1:40123", 0),  # nobody named it: that is a port
        ("10.0.0.1:40123", 0),
        ("alice", 0),
    ],
)
def test_a_number_at_the_end_of_a_workers_name_is_its_own(name: str, number: int) -> None:
    assert worker_number(name) == number


class _Missing:
    """A task on a cluster that fails for want of a file of its own."""

    key = "task"

    def result(self) -> None:
        raise FileNotFoundError(2, "No such file or directory", "plan.json")


class _Client:
    """A scheduler that answers."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def nthreads(self) -> dict[str, int]:
        return {"tcp://host:40123": 2}

    def map(self, _task: object, shards: list[int], **_: Any) -> list[_Missing]:
        return [_Missing() for _ in shards]


def test_a_task_s_missing_file_is_not_taken_for_a_missing_scheduler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor, "Client", _Client)
    monkeypatch.setattr(executor, "as_completed", iter)
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        list(run_shards(Executor(scheduler="tcp://host:8786"), lambda *_: None, "job", [0]))


class _Deserted(_Client):
    """A scheduler that answers and has no worker, now and, unless `come` is set, later."""

    come = False

    def nthreads(self) -> dict[str, int]:
        return {}

    def wait_for_workers(self, n_workers: int, timeout: float) -> None:
        assert (n_workers, timeout) == (1, 600)
        if not self.come:
            raise TimeoutError("only 0/1 workers arrived after 600")


@pytest.mark.parametrize("come", [False, True])
def test_a_scheduler_without_workers_is_waited_for_aloud_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, come: bool
) -> None:
    monkeypatch.setattr(executor, "Client", _Deserted)
    monkeypatch.setattr(executor, "as_completed", iter)
    monkeypatch.setattr(_Deserted, "come", come)
    said: list[str] = []
    run = run_shards(Executor(scheduler="host:8786"), lambda *_: None, "job", [0], said.append)
    if come:  # then the tasks are begun
        with pytest.raises(FileNotFoundError, match=r"plan\.json"):
            list(run)
    else:
        with pytest.raises(UsageError, match=r"at 'host:8786' had no worker for 10 minutes"):
            list(run)
    assert said == ["waiting for workers at host:8786"]
