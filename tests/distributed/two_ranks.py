"""Runs a program on two gloo ranks, which leave what they found as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.commands import ROOT


def found_by_two_ranks(program: str, out: Path) -> list[Any]:
    """Returns what `tests/distributed/PROGRAM OUT` leaves in rank0.json and rank1.json."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = str(ROOT / "tests" / "distributed" / program)
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", path, str(out)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
