"""Several processes on one GPU at the same time, by NVIDIA's multi-process service (MPS).

Without it processes take turns: a small student leaves most of a large GPU idle in its turn. The
service is the user's own: it wants no root and changes no setting of the GPU, and ends with the
ablation that started it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_CONTROL = "nvidia-cuda-mps-control"
_PIPES, _LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_PATIENCE_S = 60.0
_TRIAL = "import sys, torch; torch.ones(1, device=sys.argv[1]).add_(1).item()"


@contextmanager
def side_by_side_on_gpus(device: str) -> Iterator[Mapping[str, str]]:
    """Yields what the environment of processes that share GPUs must have.

    A service that runs already is used. One of our own is tried out by a small process on `device`
    before rows are trusted to it; where it does not work a line on stderr says why, and rows take
    turns.
    """
    control = shutil.which(_CONTROL)
    if control is None:
        _say(f"there is no {_CONTROL} here")
        yield {}
    elif _servers(control, dict(os.environ)) is not None:
        yield {}
    else:
        with _own_service(control, device) as environment:
            yield environment


@contextmanager
def _own_service(control: str, device: str) -> Iterator[Mapping[str, str]]:
    # In the folder for temporary files: a socket's path may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dkdetr-mps-"))
    added = {_PIPES: str(folder), _LOGS: str(folder)}
    environment = dict(os.environ) | added
    # It serves every GPU, under the numbers that rows know them by.
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        problem = _start(control, environment) or _problem_of(
            [sys.executable, "-c", _TRIAL, device], dict(os.environ) | added
        )
        # CUDA goes on without the service where it cannot reach it, and says nothing.
        if problem is None and not _servers(control, environment):
            problem = "a process that was to try the service went by without it"
        if problem is not None:
            _say(problem)
        yield added if problem is None else {}
    finally:
        with suppress(subprocess.TimeoutExpired):
            _ask(control, "quit", environment)
        shutil.rmtree(folder, ignore_errors=True)


def _start(control: str, environment: Mapping[str, str]) -> str | None:
    """Starts the service; returns why it did not.

    It is born with SIGTERM and SIGHUP blocked: a batch system sends them to every process of the
    job, and rows need their GPU until they have saved themselves.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        return _problem_of([control, "-d"], environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _servers(control: str, environment: Mapping[str, str]) -> list[str] | None:
    """Returns the servers that clients have made a service start; None if there is no service."""
    try:
        answer = _ask(control, "get_server_list", environment)
    except subprocess.TimeoutExpired:
        return None
    return answer.stdout.decode().split() if answer.returncode == 0 else None


def _ask(
    control: str, question: str, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [control],
        input=f"{question}\n".encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        timeout=_PATIENCE_S,
        check=False,
    )


def _problem_of(command: list[str], environment: Mapping[str, str]) -> str | None:
    """Returns why a command failed, in its last words; None if it did not."""
    name = Path(command[0]).name
    with tempfile.TemporaryFile() as output:  # no pipe: the service would hold it open for good
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=_PATIENCE_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{name} did not come to an end in {_PATIENCE_S:.0f} s"
        output.seek(0)
        words = output.read().decode("utf-8", errors="replace").strip().splitlines()
    if code == 0:
        return None
    return f"{name} ended with {code}: {words[-1] if words else 'it said nothing'}"


def _say(problem: str) -> None:
    print(f"rows on one GPU take turns, which is slower: {problem}", file=sys.stderr)
