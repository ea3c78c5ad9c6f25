"""Which rank died is read from the job's store and from the kernel."""

import os
import subprocess
import sys
from collections.abc import Iterator
from threading import Event

import pytest
from torch.distributed import HashStore

from dkdetr.engine import roll_call
from dkdetr.engine.roll_call import RollCall


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two that wait, in place of ranks 1 and 2."""
    started = [
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)
    ]
    yield started
    for each in started:
        each.kill()
        each.communicate()


@pytest.fixture
def ranks(processes, monkeypatch) -> list[RollCall]:
    """Three, the first of them this process."""
    store = HashStore()
    found = [RollCall(store, 0, 3)]
    for rank, process in enumerate(processes, start=1):
        with monkeypatch.context() as patched:
            patched.setattr(roll_call.os, "getpid", lambda process=process: process.pid)
            found.append(RollCall(store, rank, 3))
    return found


def test_one_that_was_killed_is_named_by_its_process(ranks, processes) -> None:
    processes[0].kill()  # and nobody has asked yet how it ended
    assert ranks[0].who_died() == f"rank 1, whose process {processes[0].pid} is gone"
    processes[0].wait()
    assert ranks[0].who_died() == f"rank 1, whose process {processes[0].pid} is gone"


def test_one_with_an_error_is_named_with_it_and_one_that_lost_it_too_is_not(
    ranks, processes
) -> None:
    ranks[1].leave("DataError: picture 7 is broken")
    ranks[2].leave("")
    for process in processes:
        process.kill()
    told = "rank 1, which ended with DataError: picture 7 is broken"
    assert ranks[0].who_died() == told


def test_one_that_was_stopped_is_named_where_nobody_else_is(ranks, processes) -> None:
    ranks[1].leave("PreemptedError: stopped by SIGTERM")
    assert ranks[0].who_died() == "rank 1, which ended with PreemptedError: stopped by SIGTERM"
    processes[1].kill()
    assert ranks[0].who_died() == f"rank 2, whose process {processes[1].pid} is gone"


def test_where_all_are_there_or_elsewhere_nobody_is_named(ranks, processes, monkeypatch) -> None:
    monkeypatch.setattr(roll_call, "_PATIENCE_MS", 1)
    assert ranks[0].who_died() == ""
    processes[0].kill()
    monkeypatch.setattr(roll_call.platform, "node", lambda: "another machine")
    assert RollCall(HashStore(), 0, 3).who_died() == ""
    elsewhere = RollCall(ranks[0]._store, 0, 3)
    assert elsewhere.who_died() == ""


def test_what_an_earlier_start_of_the_same_rank_ended_with_is_not_told(
    ranks, processes, monkeypatch
) -> None:
    """torchrun's store outlives the ranks that it starts anew."""
    ranks[1].leave("DataError: picture 7 is broken")
    monkeypatch.setattr(roll_call.os, "getpid", lambda: processes[0].pid)
    RollCall(ranks[0]._store, 1, 3)
    processes[0].kill()
    assert ranks[0].who_died() == f"rank 1, whose process {processes[0].pid} is gone"


def test_a_machine_of_the_same_name_is_another(ranks, processes, monkeypatch) -> None:
    """Hosts often share a name, and all have the first process namespace's number."""
    monkeypatch.setattr(roll_call, "_PATIENCE_MS", 1)
    processes[0].kill()
    monkeypatch.setattr(roll_call, "_boot", lambda: "another")
    assert RollCall(ranks[0]._store, 0, 3).who_died() == ""


def test_an_error_with_a_files_name_that_is_no_utf_8_is_told(ranks) -> None:
    ranks[1].leave("DataError: picture \udcff.jpg is broken")
    told = "rank 1, which ended with DataError: picture \\udcff.jpg is broken"
    assert ranks[0].who_died() == told


def test_where_processes_have_no_handles_nobody_is_named(ranks, processes, monkeypatch) -> None:
    monkeypatch.setattr(roll_call, "_PATIENCE_MS", 1)
    monkeypatch.delattr(os, "pidfd_open")  # as on macOS
    processes[0].kill()
    processes[0].wait()
    assert ranks[0].who_died() == ""


class SilentStore(HashStore):
    """As a client of one whose machine went silent: what is sent is sent, no answer comes."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = Event()

    def clone(self) -> "SilentStore":
        return self

    def check(self, keys: list[str]) -> bool:
        self.ended.wait()
        return False


def test_a_store_that_answers_nobody_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(roll_call, "_STORE_PATIENCE_S", 0.05)
    store = SilentStore()
    roll = RollCall(store, 0, 2)
    roll.leave("DataError: nobody hears it")
    assert roll.who_died() == ""
    store.ended.set()
