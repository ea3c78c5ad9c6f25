"""Commands side by side in processes of their own, some after others."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dkdetr.engine.interruption import StopFlag

STOPPED = 75
"""The code of a command that SIGTERM ended and that the same command would resume."""

_POLL_S = 0.2
_SIGTERM_CODES = (STOPPED, -15, 143)


@dataclass(frozen=True)
class Job:
    """Commands (words after the program) that run one after another, all output in `log`.

    `needs` names a job that must have succeeded before.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended: 0, or the exit code of the command that failed and its last words."""

    code: int
    message: str = ""


@dataclass
class _Running:
    job: Job
    process: "subprocess.Popen[bytes]"
    log: BinaryIO
    begins: int
    """Bytes of the log that earlier attempts have left."""
    place: int
    command: int = 0


class Jobs:
    """Runs jobs in the order they are given, as many at once as there are places.

    Args:
        jobs: one that another needs stands before it.
        program: the words that start the program.
        places: one a process: what its environment has beside this process's.
        held: open files that the processes keep open, so that a lock outlives this one.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        program: Sequence[str],
        places: Sequence[Mapping[str, str]],
        held: Sequence[int] = (),
    ) -> None:
        self._waiting = list(jobs)
        self._program = tuple(program)
        self._places = places
        self._held = held
        self._running: list[_Running] = []
        self.outcomes: dict[str, Outcome] = {}

    @property
    def running(self) -> list[str]:
        """Returns the names of the jobs that run now."""
        return [each.job.name for each in self._running]

    def run(
        self, stop: StopFlag, *, watch: Callable[[], None], done: Callable[[Job, Outcome], None]
    ) -> None:
        """Returns when no job is left; once `stop` is set, when those that run have ended.

        Args:
            stop: set: processes are sent SIGTERM and nothing more is started.
            watch: called several times a second.
            done: called once for each job that ended or cannot start.
        """
        told = False
        try:
            while self._running or (self._waiting and not stop.is_set):
                if stop.is_set and not told:
                    self._terminate()
                    told = True
                if not stop.is_set:
                    self._start_ready(done)
                for each in list(self._running):
                    if each.process.poll() is not None:
                        self._next_command(each, stop, done)
                watch()
                time.sleep(_POLL_S)
        finally:
            self._terminate()
            for each in self._running:
                each.process.wait()
                each.log.close()

    def _start_ready(self, done: Callable[[Job, Outcome], None]) -> None:
        for job in list(self._waiting):
            need = self.outcomes.get(job.needs) if job.needs is not None else Outcome(0)
            if need is not None and need.code != 0:
                self._waiting.remove(job)
                message = f"'{job.needs}' before it failed: {need.message}"
                self._finish(job, Outcome(need.code, message), done)
            elif need is not None and len(self._running) < len(self._places):
                self._waiting.remove(job)
                self._start(job)

    def _start(self, job: Job) -> None:
        taken = {each.place for each in self._running}
        place = next(i for i in range(len(self._places)) if i not in taken)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
        begins = job.log.stat().st_size
        process = self._spawn(job.commands[0], log, place)
        self._running.append(_Running(job, process, log, begins, place))

    def _spawn(self, words: Sequence[str], log: BinaryIO, place: int) -> "subprocess.Popen[bytes]":
        log.write(f"$ dkdetr {' '.join(words)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [*self._program, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(self._places[place]),
            pass_fds=tuple(self._held),
        )

    def _next_command(
        self, each: _Running, stop: StopFlag, done: Callable[[Job, Outcome], None]
    ) -> None:
        code = each.process.returncode
        each.command += 1
        if code == 0 and each.command < len(each.job.commands) and not stop.is_set:
            each.process = self._spawn(each.job.commands[each.command], each.log, each.place)
            return
        self._running.remove(each)
        each.log.close()
        if code == 0 and each.command < len(each.job.commands):
            outcome = Outcome(STOPPED, "stopped between two commands")
        elif code in _SIGTERM_CODES:
            outcome = Outcome(STOPPED, "stopped by SIGTERM; the same command goes on")
        else:
            outcome = Outcome(code, _last_words(each.job.log, each.begins) if code else "")
        self._finish(each.job, outcome, done)

    def _finish(self, job: Job, outcome: Outcome, done: Callable[[Job, Outcome], None]) -> None:
        self.outcomes[job.name] = outcome
        done(job, outcome)

    def _terminate(self) -> None:
        for each in self._running:
            each.process.terminate()


def _last_words(log: Path, begins: int) -> str:
    """Returns the last line that names an error, else the last line, of a log from a byte on."""
    told = log.read_bytes()[begins:].decode("utf-8", errors="replace")
    lines = [line for line in told.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error [")]
    return (errors or lines or ["it said nothing"])[-1]
