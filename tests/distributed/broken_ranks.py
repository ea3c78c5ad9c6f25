"""What each rank of `test_broken_ranks.py` does: started by torchrun, writes one JSON file.

python -m torch.distributed.run --nproc-per-node 2 tests/distributed/broken_ranks.py OUT_FOLDER
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from step_options import option_config, training_batch
from tiny_student import text_embeddings, tiny_student

from dkdetr.engine.distributed import Ranks, join_ranks
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.step import TrainingStep
from dkdetr.engine.student_setup import wrap_for_ranks
from dkdetr.errors import NonFiniteLossError, PeerFailedError
from dkdetr.structures import TrainingBatch
from dkdetr.student.detector import DKDETR

Spoil = Callable[[DKDETR, TrainingBatch, Ranks], None]


def pixel(value: float) -> Spoil:
    """On the second rank alone."""

    def spoil(_student: DKDETR, batch: TrainingBatch, ranks: Ranks) -> None:
        if ranks.rank == 1:
            batch.images.pixels[0, :, :40, :40] = value

    return spoil


def weight(student: DKDETR, _batch: TrainingBatch, _ranks: Ranks) -> None:
    student.trunk.level_embeddings.data[0, 0] = math.nan


def gradient(student: DKDETR, _batch: TrainingBatch, ranks: Ranks) -> None:
    if ranks.rank == 1:
        student.trunk.level_embeddings.register_hook(lambda gradient: gradient * math.nan)


BREAKS: dict[str, tuple[Spoil, bool]] = {
    "pixel": (pixel(math.nan), False),
    "overflow": (pixel(3e38), False),
    "overflow, compiled": (pixel(3e38), True),
    "weight": (weight, False),
    "gradient": (gradient, False),
}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        said = {name: said_of(*how, ranks, out) for name, how in BREAKS.items()}
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(said))


def said_of(spoil: Spoil, compiled: bool, ranks: Ranks, out: Path) -> dict[str, str]:
    """The error of a step on pictures 10 and 11 on the second rank, 0 and 1 on the first."""
    config = option_config("cached")
    backbone = replace(config.student.backbone, norm="sync_batch")
    config = replace(config, student=replace(config.student, backbone=backbone))
    student = tiny_student(config).train()
    if compiled:
        student.compile(backend="eager")
    batch = training_batch(config, seed=ranks.rank)
    ids = tuple(10 * ranks.rank + number for number in batch.images.image_ids)
    batch = replace(batch, images=replace(batch.images, image_ids=ids))
    spoil(student, batch, ranks)
    step = TrainingStep(
        wrap_for_ranks(student, ranks),
        make_optimizer(student, config.optim),
        text_embeddings(),
        config,
        ranks,
        precision=torch.float32,
        dumps=out,
    )
    try:
        step([batch], epoch=40, iteration=10_000)
    except (NonFiniteLossError, PeerFailedError) as error:
        return {"error": type(error).__name__, "words": str(error)}
    return {"error": "", "words": ""}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
