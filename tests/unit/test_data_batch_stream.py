"""Waiting for loader processes: with a word after a while, until asked to stop, never for ever."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dkdetr.data.batch_stream import BatchStream, LoaderLostError
from tests.e2e.commands import ROOT


def ten_times(key: int) -> int:
    return 10 * key


def when_let_go(key: str) -> str:
    """Returns the key once a file of this name is there."""
    while not Path(key).exists():
        time.sleep(0.05)
    return key


_SILENT = """
import sys
from dkdetr.data.batch_stream import BatchStream
from tests.unit.test_data_batch_stream import when_let_go

if __name__ == "__main__":
    key = sys.argv[1]
    assert list(BatchStream(when_let_go, [key], workers=1, patience_s=1.0)) == [key]
"""


def test_silence_is_broken_and_the_batch_still_comes(tmp_path) -> None:
    """In a program of its own: the loader processes' stacks go to their server's stderr."""
    script, said = tmp_path / "silent.py", tmp_path / "said"
    script.write_text(_SILENT)
    with said.open("w") as stderr:
        program = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "go")], cwd=ROOT, stderr=stderr,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    # The loader process's own stack; it is asked for again and again.
    while "in when_let_go" not in said.read_text():
        assert program.poll() is None, said.read_text()
        time.sleep(0.05)
    (tmp_path / "go").touch()
    assert program.wait() == 0, said.read_text()
    assert "no batch for" in said.read_text()


def test_waiting_ends_when_asked_to_stop(tmp_path) -> None:
    go, asked = tmp_path / "go", []

    def should_stop() -> bool:
        asked.append(go.exists())
        if len(asked) > 2:
            go.touch()  # for the loader process, which must end too
        return go.exists()

    keys = [str(go)] * 3
    assert list(BatchStream(when_let_go, keys, workers=1, should_stop=should_stop)) == []
    assert asked == [False] * 3
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
        check=False,
    )  # fmt: skip
    assert done.returncode == 0
