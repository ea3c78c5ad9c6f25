"""The run of all benchmarks: complete, and honest about what fails."""

import functools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.__main__ import BENCHMARKS, ROOT, Benchmark, _run, new_page

FOLDER = Path(__file__).parents[1] / "benchmarks"
NOT_ALONE = {"__main__", "detectors", "machine", "made_up", "original_op", "peers", "recorded"}
OF_ITS_OWN = {"scale"}  # longer than the run of all allows


def test_every_benchmark_takes_part() -> None:
    there = {path.stem for path in FOLDER.glob("*.py")} - NOT_ALONE - OF_ITS_OWN
    assert there <= {each.module for each in BENCHMARKS}


def test_a_second_page_of_a_day_leaves_the_first_alone(tmp_path) -> None:
    for name in ("day-cpu.md", "day-cpu-2.md", "day-cpu-3.md"):
        path = new_page(tmp_path, "day-cpu")
        assert path.name == name
        path.touch()


def said_of(benchmark: Benchmark) -> tuple[list[str], int]:
    said: list[str] = []
    return said, _run(benchmark, "cpu", said.append)


def test_a_page_has_command_output_and_peers_and_a_failure_is_told() -> None:
    peers = "figures\n| a |\n|---|\n| 1 |\nAim: 2."
    said, code = said_of(Benchmark("matching", "M", "--tokens 64 --targets 2", peers=peers))
    page = "".join(said)
    assert code == 0
    assert "`python -m tests.benchmarks.matching --tokens 64 --targets 2`" in page
    assert "targets   cost" in page
    assert "figures\n\n| a |\n|---|\n| 1 |\n\nAim: 2." in page
    assert len(said) > 4  # line by line, not at the end
    said, code = said_of(Benchmark("matching", "M", "--tokens none"))
    assert code == 2
    assert "FAILED with exit code 2" in "".join(said)
    assert "invalid int value" in "".join(said)


def test_what_takes_too_long_is_ended_and_has_said_what_it_knew(monkeypatch) -> None:
    timers: list[LateTimer] = []

    def timer(*given: Any) -> LateTimer:
        timers.append(LateTimer(*given))
        return timers[-1]

    monkeypatch.setattr(threading, "Timer", timer)
    monkeypatch.setattr("tests.benchmarks.__main__.TIMEOUT_S", 0)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "16 images of 300 regions" in text:
            timers[0].run_out()

    code = _run(Benchmark("cache_reader", "R", "--images 16 --seconds 60"), "cpu", say)
    assert code == -signal.SIGKILL
    assert "exit code -9 (SIGKILL), not done after 0 s" in "".join(said)


def test_a_crash_says_where_it_was(monkeypatch) -> None:
    timers: list[LateTimer] = []
    monkeypatch.setattr(
        threading, "Timer", lambda *given: timers.append(LateTimer(*given)) or timers[-1]
    )
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "16 images of 300 regions" in text:
            timers[0].child.send_signal(signal.SIGSEGV)

    code = _run(Benchmark("cache_reader", "R", "--images 16 --seconds 60"), "cpu", say)
    page = "".join(said)
    assert code == -signal.SIGSEGV
    assert "exit code -11 (SIGSEGV)" in page
    assert "Fatal Python error: Segmentation fault" in page
    assert "cache_reader.py" in page.split("Fatal Python error")[1]


@pytest.fixture(autouse=True)
def _leftovers_go(monkeypatch, tmp_path: Path) -> None:
    """Who is killed removes no temporary files: those of a benchmark go with the test's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


class LateTimer:
    """A timer that runs out when it is told to, however fast or slow the machine is."""

    def __init__(self, _seconds: float, function: Callable[..., None], arguments: list) -> None:
        self.run_out = functools.partial(function, *arguments)
        self.child = arguments[0]

    def start(self) -> None:
        """Waits for `run_out`."""

    def cancel(self) -> None:
        """Has nothing to stop."""


def test_a_run_that_is_killed_leaves_its_lines(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--only", "cache_reader", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tests.benchmarks", *words]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("64 images"):
                break
        run.terminate()
    page = next(tmp_path.glob("*.md")).read_text()
    assert "64 images of 300 regions" in page
    assert page.endswith("STOPPED before its end\n```\n")
