"""What two ranks do in `test_kd_across_ranks.py`: started by torchrun, writes one JSON file a rank.

python -m torch.distributed.run --nproc-per-node 2 tests/distributed/kd_ranks.py OUT_FOLDER
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from step_options import OPTIONS, FakeTeacher, option_config, teacher_side, training_batch
from tiny_student import (
    image_batch,
    targets,
    teacher_regions,
    text_embeddings,
    tiny_config,
    tiny_student,
)
from torch.nn.parallel import DistributedDataParallel

from dkdetr.config import ExperimentConfig, RelationalKDConfig
from dkdetr.engine.distributed import Ranks, join_ranks
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.step import TrainingStep
from dkdetr.losses.criterion import Criterion, Normalisers
from dkdetr.structures import ImageBatch, TeacherRegions

F64 = torch.float64
SIZES = ((64, 96), (96, 64), (80, 80), (96, 96))
RELATIONS = {
    "gathered": RelationalKDConfig(gather=True),
    "gathered, cross only, reverse": RelationalKDConfig(
        gather=True, cross_only=True, reverse=True, include_self=False
    ),
}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        result = {
            "gather": {name: compare(name, ranks) for name in RELATIONS},
            "votes": ranks.vote(ranks.rank == 0, ranks.rank == 1, False),
            "options": {name: train_unevenly(name, ranks) for name in OPTIONS},
        }
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(result))


def compare(name: str, ranks: Ranks) -> dict[str, float]:
    """The greatest differences between two ranks' mean and one process, of loss and gradients."""
    config = tiny_config(backbone={"norm": "frozen"})
    config = replace(config, kd=replace(config.kd, rkd=RELATIONS[name], layers="all"))
    alone, report = loss_on(slice(0, 4), config, None)
    mine, shared = loss_on(slice(2 * ranks.rank, 2 * ranks.rank + 2), config, ranks)
    value = ranks.mean(shared.detach())
    differences = [
        (gradient - other).abs().max().item() for gradient, other in zip(mine, alone, strict=True)
    ]
    return {
        "loss": abs(value.item() - report.item()),
        "gradient": max(differences),
        "largest_gradient": max(gradient.abs().max().item() for gradient in alone),
    }


def loss_on(
    mine: slice, config: ExperimentConfig, ranks: Ranks | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    student = tiny_student(config, dtype=F64)
    module = student if ranks is None else DistributedDataParallel(student)
    images = image_batch(SIZES, dtype=F64)
    some = ImageBatch(
        images.pixels[mine], images.padding_mask[mine], images.image_sizes_hw[mine],
        images.original_sizes_hw[mine], images.image_ids[mine],
    )  # fmt: skip
    everything = teacher_regions((3, 0, 4, 1), dtype=F64)
    regions = TeacherRegions(
        everything.boxes_cxcywh[mine], everything.embeddings[mine], everything.valid[mine]
    )
    wanted = targets((2, 1, 0, 2), dtype=F64)
    shares = 1 if ranks is None else ranks.world_size
    normalisers = Normalisers(
        num_boxes=torch.tensor(5.0, dtype=F64) / shares,
        num_regions=torch.tensor(8.0, dtype=F64) / shares,
    )
    criterion = Criterion(config.detection, config.kd, across_ranks=ranks)
    output = module(some, text_embeddings(F64), regions)
    total = criterion(output, wanted[mine], regions, normalisers).total
    total.backward()
    return [weight.grad for weight in student.parameters() if weight.grad is not None], total


def train_unevenly(name: str, ranks: Ranks) -> dict[str, object]:
    """Three steps in which one rank has neither boxes nor regions, in turns."""
    config = option_config(name)
    student = tiny_student(config).train()
    step = TrainingStep(
        DistributedDataParallel(student),
        make_optimizer(student, config.optim),
        text_embeddings(),
        config,
        ranks,
        precision=torch.float32,
        dumps=Path("nonfinite"),
        teacher=teacher_side(config, FakeTeacher()),
    )
    finite = True
    for number in range(3):
        empty = number == 2 or number == ranks.rank
        batch = training_batch(
            config,
            counts=(0, 0) if empty else (2, 1),
            filled=(0, 0) if empty else (4, 3),
            seed=10 * number + ranks.rank,
        )
        result = step([batch], epoch=40, iteration=10_000 + number)
        finite &= all(bool(value.isfinite()) for value in result.parts.values())
    weights = torch.cat([weight.detach().flatten() for weight in student.parameters()])
    return {"finite": finite, "weights": weights.double().sum().item()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
