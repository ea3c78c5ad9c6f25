"""Tests in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT


def pass_in_interpreter(*files: Path) -> None:
    """Runs test files in a process of their own; fails unless they pass."""
    pytest.importorskip("triton")
    done = subprocess.run(
        # Without the shape checks of conftest.py, which torch.compile cannot look through.
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest",
         *map(str, files)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d+ passed", done.stdout)
