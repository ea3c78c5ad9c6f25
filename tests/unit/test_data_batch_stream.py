"""Waiting for loader processes: with a word after a while, until asked to stop, never for ever."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from dkdetr.data.batch_stream import BatchStream, LoaderLostError
from tests.e2e.commands import ROOT


def ten_times(key: int) -> int:
    return 10 * key


def slowly(key: int) -> int:
    time.sleep(3.5)
    return key


_SILENT = """
from dkdetr.data.batch_stream import BatchStream
from tests.unit.test_data_batch_stream import slowly

if __name__ == "__main__":
    assert list(BatchStream(slowly, [4], workers=1, patience_s=1.0)) == [4]
"""


def test_silence_is_broken_and_the_batch_still_comes(tmp_path) -> None:
    """In a program of its own: the loader processes' stacks go to their server's stderr."""
    script = tmp_path / "silent.py"
    script.write_text(_SILENT)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=90, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no batch for" in done.stderr
    assert "in slowly" in done.stderr  # the loader process's own stack


def test_waiting_ends_when_asked_to_stop() -> None:
    asked = []

    def should_stop() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 2

    assert list(BatchStream(slowly, [1, 2, 3], workers=1, should_stop=should_stop)) == []
    assert list(BatchStream(ten_times, [1, 2], workers=0, should_stop=lambda: True)) == []


def test_a_killed_loader_process_is_named() -> None:
    stream = iter(BatchStream(ten_times, list(range(200)), workers=1))
    assert next(stream) == 0
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(LoaderLostError, match=r"lower data\.workers"):
        list(stream)


def test_a_sigterm_for_all_does_not_end_the_loader_processes() -> None:
    stream = iter(BatchStream(ten_times, list(range(200)), workers=1))
    assert next(stream) == 0
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
    assert list(stream) == [10 * key for key in range(1, 200)]


_LEFT_OPEN = """
import time
from dkdetr.data.batch_stream import BatchStream
from tests.unit.test_data_batch_stream import ten_times

if __name__ == "__main__":
    left_open = iter(BatchStream(ten_times, list(range(500)), workers=1))
    next(left_open)
"""


def test_a_stream_that_nobody_closed_does_not_keep_the_program_alive(tmp_path) -> None:
    script = tmp_path / "left_open.py"
    script.write_text(_LEFT_OPEN)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0
