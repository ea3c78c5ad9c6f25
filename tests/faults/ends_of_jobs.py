"""How soon a job of several ranks ends after one of them: counted from that rank's last word."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.commands import environment


def start_job(command: Sequence[str], cwd: Path, said: Path) -> subprocess.Popen[bytes]:
    """Returns a job in a session of its own; what it says goes to the file `said`."""
    with said.open("wb") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=environment(), stdout=file, stderr=file, start_new_session=True
        )


def end_after(
    job: subprocess.Popen[bytes], said: Path, last_word: str, *, patience_s: float
) -> str:
    """Returns all that the job said; fails if it outlives a rank's last word by `patience_s`.

    Start-up and the work before that word count for nothing: a busy machine may take its time.
    """
    while last_word not in said.read_text():
        assert job.poll() is None or last_word in said.read_text(), said.read_text()
        time.sleep(0.05)
    try:
        job.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise AssertionError(f"still there after {patience_s} s\n{said.read_text()}") from None
    return said.read_text()
