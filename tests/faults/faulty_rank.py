"""`dkdetr ...` with a fault in rank 1, at its fourth step: FAULT is raise, kill, stall or speak."""

import os
import signal
import sys
import time

import torch

from cli import main
from dkdetr.engine.step import TrainingStep
from dkdetr.errors import DataError

FAULTY_STEP = 3


LAST_WORD = "rank 1 breaks now"


def _break(fault: str) -> None:
    print(LAST_WORD, file=sys.stderr, flush=True)
    if fault == "raise":
        raise DataError("picture 7 is broken")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while fault == "stall":
        time.sleep(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fault = sys.argv.pop(1)
    real = TrainingStep.__call__

    def spoiled(self, group, *, epoch, iteration):
        if os.environ["RANK"] == "1" and iteration == FAULTY_STEP:
            _break(fault)
        if fault == "slow":
            time.sleep(0.3)
        return real(self, group, epoch=epoch, iteration=iteration)

    TrainingStep.__call__ = spoiled
    main()
