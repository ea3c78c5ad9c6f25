"""A sealed cache to compare with, and writers in processes of their own that can be killed."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cache_samples import write_sample_cache
from tests.e2e.commands import ROOT


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("clean") / "c"
    write_sample_cache(path)
    return path


@contextmanager
def _trials(module: str, place: str) -> Iterator[Callable[..., int]]:
    """Yields `run(path, fault="", kill_after_s=0.0)`: a trial in a fork of a warm process."""
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(path, fault="", kill_after_s=0.0) -> int:
        trial = {place: str(path), "fault": fault, "kill_after_s": kill_after_s}
        process.stdin.write(json.dumps(trial) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0


@pytest.fixture(scope="module")
def run_writer():
    """A writer of the sample cache; the answer is how it ended."""
    with _trials("tests.faults.cache_killer", "path") as run:
        yield run


@pytest.fixture(scope="module")
def saver():
    """Saves checkpoints one after another; the answer is the last iteration that was saved."""
    with _trials("tests.faults.checkpoint_killer", "folder") as run:
        yield run
