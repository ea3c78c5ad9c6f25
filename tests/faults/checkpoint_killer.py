"""Forks processes that save one checkpoint after the other, until they are killed.

Its standard input holds JSON lines `{"folder", "fault", "kill_after_s"}`; it answers each with the
last iteration whose save had returned, -1 for none.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.checkpoint import Checkpoint, Progress, load_latest, save_checkpoint
from dkdetr.experiment_file import config_from_dict

SIZE = 40_000


def numbered(iteration: int) -> Checkpoint:
    """A checkpoint whose content says which it is."""
    vocabulary = Vocabulary(
        names=("cat",),
        category_ids=(3,),
        is_base=(True,),
        frequencies=("",),
        prompts=("{}",),
        teacher="none",
        embeddings=np.eye(1, 4, dtype=np.float32),
    )
    return Checkpoint(
        student={"weight": torch.full((SIZE,), float(iteration))},
        average={},
        optimizer={"state": {}, "param_groups": []},
        step={},
        progress=Progress(epoch=0, batch=0, iteration=iteration),
        config=config_from_dict({"name": "killed"}),
        vocabulary=vocabulary,
        cache_fingerprint="f",
        cache_split="lvis_train",
    )


def _save_until_killed(folder: Path, report: int) -> None:
    found = load_latest(folder)
    iteration = 0 if found is None else found[1].progress.iteration
    while True:
        iteration += 1
        save_checkpoint(folder, numbered(iteration))
        os.write(report, iteration.to_bytes(4, "big"))


def _trial(folder: str, fault: str, kill_after_s: float) -> int:
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.environ["DKDETR_FAULT"] = fault
        try:
            _save_until_killed(Path(folder), writes)
        finally:
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        reported = b""
        if kill_after_s:
            # Counted from a save that returned: a slow machine must not kill them all too early.
            reported = pipe.read(4)
            time.sleep(kill_after_s)
            os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        reported += pipe.read()
    return int.from_bytes(reported[-4:], "big") if reported else -1


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(_trial(**json.loads(line)), flush=True)
