"""A few optimisation steps of a float64 student on four images, split over ranks and micro-batches.

As a script (under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT): PARTS DROPOUT RELATIONS NORM
OUT; the first rank writes the weights it ends with.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from dkdetr.engine.distributed import Ranks, join_ranks
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.step import TrainingStep
from dkdetr.engine.student_setup import wrap_for_ranks
from dkdetr.structures import ImageBatch, TeacherRegions, TrainingBatch
from dkdetr.student.detector import DKDETR
from tests.tiny_student import (
    image_batch,
    targets,
    teacher_regions,
    text_embeddings,
    tiny_config,
    tiny_student,
)

STEPS = 3
SIZES = ((64, 96), (96, 64), (96, 96), (64, 64))


def whole_batch(seed: int, dtype: torch.dtype = torch.float64) -> TrainingBatch:
    """Four images with as different numbers of boxes and regions as can be."""
    return TrainingBatch(
        images=image_batch(SIZES, padded_hw=(96, 96), seed=seed, dtype=dtype),
        targets=targets((2, 1, 5, 0), seed=seed, dtype=dtype),
        regions=teacher_regions((3, 2, 4, 1), seed=seed, dtype=dtype),
    )


def part_of(batch: TrainingBatch, part: int, parts: int) -> TrainingBatch:
    size = len(batch.targets) // parts
    own = slice(part * size, (part + 1) * size)
    images, regions = batch.images, batch.regions
    assert regions is not None
    return TrainingBatch(
        images=ImageBatch(
            images.pixels[own],
            images.padding_mask[own],
            images.image_sizes_hw[own],
            images.original_sizes_hw[own],
            images.image_ids[own],
        ),
        targets=batch.targets[own],
        regions=TeacherRegions(
            regions.boxes_cxcywh[own], regions.embeddings[own], regions.valid[own]
        ),
    )


def _step_of(
    ranks: Ranks, *, dropout: float, relations: tuple[str, ...], dumps: Path,
    norm: str = "frozen", alignment: Literal["cached", "iou"] = "cached",
) -> tuple[DKDETR, TrainingStep]:  # fmt: skip
    config = tiny_config(dropout=dropout, backbone={"norm": norm})
    rkd = replace(config.kd.rkd, relations=relations)
    kd = replace(config.kd, rkd=rkd, alignment=alignment, align_iou=0.0)  # random boxes meet, too
    config = replace(config, kd=kd, optim=replace(config.optim, warmup_iterations=0))
    student = tiny_student(config, dtype=torch.float64)
    return student, TrainingStep(
        wrap_for_ranks(student, ranks).train(),
        make_optimizer(student, config.optim),
        text_embeddings(torch.float64),
        config,
        ranks,
        precision=torch.float32,  # no autocast: everything stays as wide as the weights
        dumps=dumps,
    )


def losses_of(
    group: Sequence[TrainingBatch], *, alignment: Literal["cached", "iou"], dumps: Path
) -> dict[str, float]:
    """Returns the loss parts of a fresh student's step."""
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    _, step = _step_of(ranks, dropout=0.0, relations=("image",), dumps=dumps, alignment=alignment)
    return {name: loss.item() for name, loss in step(group, epoch=0, iteration=0).parts.items()}


def weights_after(
    ranks: Ranks, micro_batches: int, *, dropout: float, relations: tuple[str, ...], dumps: Path,
    norm: str = "frozen",
) -> dict[str, Tensor]:  # fmt: skip
    student, step = _step_of(ranks, dropout=dropout, relations=relations, dumps=dumps, norm=norm)
    parts = ranks.world_size * micro_batches
    for iteration in range(STEPS):
        batch = whole_batch(iteration)
        first = ranks.rank * micro_batches
        group = [part_of(batch, first + number, parts) for number in range(micro_batches)]
        step(group, epoch=0, iteration=iteration)
    return {name: value.contiguous() for name, value in student.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts, dropout, out = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[5])
    relations, norm = tuple(sys.argv[3].split(",")), sys.argv[4]
    with join_ranks("cpu", timeout_s=500) as ranks:
        micro_batches = parts // ranks.world_size
        weights = weights_after(
            ranks, micro_batches, dropout=dropout, relations=relations, dumps=out.parent, norm=norm
        )
        if ranks.is_first:
            save_file(weights, out)
