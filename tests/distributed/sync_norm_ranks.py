"""What each rank does in `test_sync_norm.py`: started by torchrun, writes one JSON file a rank.

python -m torch.distributed.run --nproc-per-node 2 tests/distributed/sync_norm_ranks.py OUT_FOLDER
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from norm_kernels import stand_in_kernels
from step_options import option_config, training_batch
from tiny_student import loss_of, text_embeddings, tiny_student
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dkdetr.engine.distributed import Ranks, join_ranks
from dkdetr.engine.student_setup import wrap_for_ranks
from dkdetr.student import sync_norm
from dkdetr.student.sync_norm import SyncBatchNorm2d

CHANNELS, STEPS = 5, 3
SIZES = ((2, 6, 4), (1, 3, 7), (3, 1, 1))
"""Images, height and width on each rank."""


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        result = {
            "plain": differences(ranks, lambda norm: norm),
            "compiled": differences(
                ranks, lambda norm: torch.compile(norm, backend="aot_eager", fullgraph=True)
            ),
            "kernels": differences(ranks, by_kernels),
            "half": half_precision(ranks),
            "student": compiled_student(ranks),
            "wrapped": wrapped_student(ranks),
        }
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(result))


def inputs(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's maps and what its loss weighs their results with; channels far from zero."""
    torch.manual_seed(100 * step + rank)
    images, height, width = SIZES[rank]
    shape = (images, CHANNELS, height, width)
    spread = torch.tensor([1.0, 3.0, 0.01, 10.0, 1.0], dtype=torch.float64)[:, None, None]
    offset = torch.tensor([0.0, -2.0, 1.0, 300.0, rank], dtype=torch.float64)[:, None, None]
    maps = spread * torch.randn(shape, dtype=torch.float64) + offset
    return maps, torch.randn(shape, dtype=torch.float64)


def weighted(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    torch.manual_seed(5)
    for parameter in norm.parameters():
        parameter.data.normal_()
    return norm.double().train()


def as_row(maps: Tensor) -> Tensor:
    """All pixels in one row, so that maps of different sizes can stand beside one another."""
    return maps.transpose(0, 1).reshape(1, CHANNELS, 1, -1)


def differences(ranks: Ranks, around: Callable[[nn.BatchNorm2d], Any]) -> dict[str, float]:
    """The greatest differences from torch's batch norm of everything in one process."""
    ours, theirs = weighted(SyncBatchNorm2d(CHANNELS)), weighted(nn.BatchNorm2d(CHANNELS))
    called, found = around(ours), dict.fromkeys(("output", "input", "parameters", "buffers"), 0.0)

    def note(name: str, one: Tensor, other: Tensor) -> None:
        found[name] = max(found[name], (one - other).abs().max().item())

    for step in range(STEPS):
        all_inputs = [inputs(step, rank) for rank in range(ranks.world_size)]
        maps, weights = all_inputs[ranks.rank]
        maps.requires_grad_()
        own = called(maps)
        ours.zero_grad()
        (own.sin() * weights).sum().backward()
        joined = torch.cat([as_row(each.detach()) for each, _ in all_inputs], dim=-1)
        joined.requires_grad_()
        wanted = theirs(joined)
        theirs.zero_grad()
        row = torch.cat([as_row(each) for _, each in all_inputs], dim=-1)
        (wanted.sin() * row).sum().backward()
        counts = [as_row(each).shape[-1] for each, _ in all_inputs]
        assert joined.grad is not None
        assert maps.grad is not None
        note("output", as_row(own), wanted.split(counts, dim=-1)[ranks.rank])
        note("input", as_row(maps.grad), joined.grad.split(counts, dim=-1)[ranks.rank])
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            note("parameters", ranks.mean(one.grad) * ranks.world_size, other.grad)
        for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            note("buffers", one, other)
    return found


def by_kernels(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """What the norm does on a GPU, with formulas in the kernels' places from here on."""
    stand_in_kernels(setattr)

    def called(maps: Tensor) -> Tensor:
        norm.num_batches_tracked.add_(1)
        return sync_norm.by_kernels(norm, maps)

    return called


def half_precision(ranks: Ranks) -> dict[str, object]:
    """Statistics of bfloat16 maps that need more digits than it has."""
    norm = SyncBatchNorm2d(CHANNELS).train()
    norm.momentum = 1.0
    rounded = [inputs(0, rank)[0].bfloat16() for rank in range(ranks.world_size)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = norm(rounded[ranks.rank])
    row = torch.cat([as_row(each.double()) for each in rounded], dim=-1)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = (norm.running_mean.double() / row.mean((0, 2, 3)) - 1).abs().max()
    variance = (norm.running_var.double() / row.var((0, 2, 3)) - 1).abs().max()
    return {"type": str(result.dtype), "mean": mean.item(), "variance": variance.item()}


def compiled_student(ranks: Ranks) -> dict[str, object]:
    """Graph breaks of a whole student within DDP, and how far its gradients are from eager ones."""
    config = option_config("cached")
    backbone = replace(config.student.backbone, norm="sync_batch", frozen_stages=1)
    config = replace(config, student=replace(config.student, backbone=backbone))
    batch = training_batch(config, seed=ranks.rank)
    gradients, buffers = [], []
    for compiled in (False, True):
        student = tiny_student(config).train()
        if compiled:
            student.compile(backend="aot_eager", fullgraph=True)
        output = wrap_for_ranks(student, ranks)(batch.images, text_embeddings(), batch.regions)
        loss_of(output, batch.targets, batch.regions, config).total.backward()
        gradients.append([each.grad for each in student.trunk.backbone.parameters()])
        buffers.append(list(student.buffers()))
    pairs = [
        (one, other)
        for eager, other_way in (gradients, buffers)
        for one, other in zip(eager, other_way, strict=True)
        if one is not None
    ]
    scale = max(one.abs().max().item() for one, _ in pairs)
    return {
        "breaks": sum(counters["graph_break"].values()),
        "difference": max((one - other).abs().max().item() for one, other in pairs) / scale,
        "buffers": torch.cat([each.double().flatten() for each in buffers[1]]).tolist(),
    }


def wrapped_student(ranks: Ranks) -> dict[str, object]:
    """What DDP does to buffers, and how many pieces of memory its gradients lie in."""
    config = option_config("cached")  # plain batch norm
    student = tiny_student(config).train()
    first = next(student.buffers())
    first.fill_(ranks.rank)
    module = wrap_for_ranks(student, ranks)
    at_start = first[0].item()
    batch = training_batch(config, seed=ranks.rank)
    # Plain batch norm of this rank's pictures alone, by another student.
    alone = tiny_student(config).train()
    next(alone.buffers()).fill_(0)
    for _ in range(2):
        output = module(batch.images, text_embeddings(), batch.regions)
        student.zero_grad()
        loss_of(output, batch.targets, batch.regions, config).total.backward()
        alone(batch.images, text_embeddings(), batch.regions)
    moved = zip(student.buffers(), alone.buffers(), strict=True)
    return {
        "at_start": at_start,
        "own": all(torch.equal(one, other) for one, other in moved),
        "gradients": sum(each.grad is not None for each in student.parameters()),
        "pieces": len(
            {
                each.grad.untyped_storage().data_ptr()
                for each in student.parameters()
                if each.grad is not None
            }
        ),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
