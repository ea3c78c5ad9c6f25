"""Forks `dkdetr train` processes and sends each a SIGTERM after a while.

Its standard input holds JSON lines `{"words", "steps_file", "after_s", "after_steps"}`; it answers
each with the exit code. `steps_file` gets one byte for every step that was finished. Forking here
is safe: no thread runs yet, and no file is open.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import cli
import dkdetr.engine.smoke
import dkdetr.engine.start  # noqa: F401  imported here, so that no trial waits for it
from dkdetr.engine.interruption import stop_on_sigterm
from dkdetr.engine.step import TrainingStep


def _train(words: list[str], steps_file: str) -> None:
    steps = os.open(steps_file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    real = TrainingStep.__call__

    def counted(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        os.write(steps, b".")
        return result

    TrainingStep.__call__ = counted
    sys.argv = ["dkdetr", "train", *words]
    cli.main()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _trial(words: list[str], steps_file: str, after_s: float, after_steps: int) -> int:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with stop_on_sigterm():  # a command's first deed, before its imports
                os.write(tell, b"r")
                _train(words, steps_file)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    os.read(ready, 1)
    while _size(Path(steps_file)) < after_steps and not _has_ended(pid):
        time.sleep(0.001)
    time.sleep(after_s)
    os.kill(pid, signal.SIGTERM)
    os.close(ready)
    os.close(tell)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(_trial(**json.loads(line)), flush=True)
