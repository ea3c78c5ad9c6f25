"""Commands as a user types them: each in a process of its own, or in this one.

A process costs seconds of imports: it is for what only a process can show (a cold start, signals,
pipes and terminals, settings that stay behind). All else is called here.
"""

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

import cli

ROOT = Path(__file__).parents[2]
DKDETR = (sys.executable, "-c", "from cli import main; main()")


def run_command(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Returns the finished process; it sees this checkout and one thread."""
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False,
        timeout=500,
    )  # fmt: skip


def start_dkdetr(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """Returns a `dkdetr` command that is still running."""
    return subprocess.Popen(
        [*DKDETR, *words], cwd=cwd, env=environment(), stderr=subprocess.PIPE, text=True
    )


def dkdetr(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Returns the finished `dkdetr` command, whatever its exit code."""
    return run_command([*DKDETR, *words], cwd)


def succeed(*words: str, cwd: Path) -> str:
    """Returns what a `dkdetr` command printed; fails the test if it failed."""
    done = dkdetr(*words, cwd=cwd)
    assert done.returncode == 0, f"dkdetr {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def call(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Returns what a `dkdetr` command of this process came to, whatever its exit code."""
    # What is typed is kept in caches and runs: these words, not those of the test run.
    with contextlib.chdir(cwd), patch("sys.argv", ["dkdetr", *words]):
        done = CliRunner().invoke(cli.app, words, prog_name="dkdetr")
    error = done.exception
    escaped = error is not None and not isinstance(error, SystemExit)
    trace = "".join(traceback.format_exception(error)) if escaped else ""
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr + trace)


def call_well(*words: str, cwd: Path) -> str:
    """Returns what a `dkdetr` command of this process printed; fails the test if it failed."""
    done = call(*words, cwd=cwd)
    assert done.returncode == 0, f"dkdetr {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def exit_code(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Returns what `main` of this process ends with, in this folder; the test captures output."""
    monkeypatch.setattr("sys.argv", ["dkdetr", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def environment() -> dict[str, str]:
    """Returns the environment of a command: this checkout, one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
