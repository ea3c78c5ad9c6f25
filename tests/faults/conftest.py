"""A sealed cache to compare with, and a writer in a process of its own that can be killed."""

import json
import subprocess
import sys

import pytest

from tests.cache_samples import write_sample_cache


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("clean") / "c"
    write_sample_cache(path)
    return path


@pytest.fixture(scope="module")
def run_writer():
    """Yields `run(path, fault="", kill_after_s=0.0)`, which returns how the writer ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.cache_killer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(path, fault="", kill_after_s=0.0) -> int:
        trial = {"path": str(path), "fault": fault, "kill_after_s": kill_after_s}
        process.stdin.write(json.dumps(trial) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.stdout.close()
    assert process.wait(timeout=30) == 0
