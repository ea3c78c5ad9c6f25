"""What each rank of `test_compiled_ranks.py` does: started by torchrun, writes one JSON file.

python -m torch.distributed.run --nproc-per-node 2 tests/distributed/compiled_ranks.py OUT_FOLDER
"""

import hashlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compiled_steps import CountedGraphs, Learner, distance
from step_options import option_config
from torch import distributed
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from dkdetr.config import ExperimentConfig
from dkdetr.engine.distributed import Ranks, join_ranks
from tests.distributed.grouped_steps import part_of, whole_batch

STEPS = 3
BUCKET_BYTES = 2**17
"""A fifth of the tiny student: DDP exchanges it in pieces, at whose borders the graph is cut."""


def main(out: Path) -> None:
    torch.set_num_threads(1)
    small = partial(DistributedDataParallel, bucket_cap_mb=BUCKET_BYTES / 2**20)
    with (
        join_ranks("cpu") as ranks,
        patch("dkdetr.engine.student_setup.DistributedDataParallel", small),
        patch.object(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", BUCKET_BYTES),
    ):
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(steps(ranks)))


def steps(ranks: Ranks) -> list[dict[str, Any]]:
    """What each step's gradient is far from, and how many graphs there are after it.

    All begin each step with the same weights: AdamW's first steps have the gradients' signs alone
    and would carry roundings on.
    """
    graphs = CountedGraphs()
    compiled = Learner(settings("sync_batch"), torch.bfloat16, ranks=ranks, graphs=graphs)
    eager = Learner(settings("sync_batch"), torch.bfloat16, ranks=ranks)
    # In one process, with a norm that does not ask the other rank.
    joined, wide = (Learner(settings("batch"), t) for t in (torch.bfloat16, torch.float32))
    found: list[dict[str, Any]] = []
    for number in range(STEPS):
        start = {name: value.clone() for name, value in eager.student.state_dict().items()}
        for learner in (compiled, joined, wide):
            learner.start_from(start)
        batch = whole_batch(number, torch.float32)
        own = part_of(batch, ranks.rank, ranks.world_size)
        loss, gradient = compiled.step(own, number)
        eager_loss, eager_gradient = eager.step(own, number)
        _, joined_gradient = joined.step(batch, number)
        _, wide_gradient = wide.step(batch, number)
        row = {
            "gradient": hashlib.sha256(gradient.numpy().tobytes()).hexdigest(),
            "losses": (loss, eager_loss),
            "to_eager": distance(gradient, eager_gradient),
            "to_joined": distance(gradient, joined_gradient),
            "half_to_float32": distance(joined_gradient, wide_gradient),
            "compiled": graphs.num_graphs,
            "traced": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        }
        found.append(row)
    return found


def settings(norm: str) -> ExperimentConfig:
    """Without relations of the batch: those are a rank's own."""
    config = option_config("cached")
    backbone = replace(config.student.backbone, norm=norm, frozen_stages=1)
    relations = replace(config.kd.rkd, relations=("image",))
    return replace(
        config,
        student=replace(config.student, backbone=backbone),
        kd=replace(config.kd, rkd=relations),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
