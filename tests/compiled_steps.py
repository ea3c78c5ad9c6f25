"""Steps of students from the same weights: compiled or not, in half precision or not.

For processes of their own, because torch.compile cannot look through the shape checks of tests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tiny_student import text_embeddings, tiny_student
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from dkdetr.config import ExperimentConfig
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.step import TrainingStep
from dkdetr.engine.student_setup import wrap_for_ranks
from dkdetr.structures import TrainingBatch
from dkdetr.student.detector import DKDETR

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@dataclass
class CountedGraphs:
    """AOTAutograd without a code generator, as a backend that counts what it is given."""

    num_graphs: int = 0
    _compile: Callable[..., Any] = field(default_factory=lambda: lookup_backend("aot_eager"))

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.num_graphs += 1
        return self._compile(graph, inputs)


class Learner:
    """A tiny student that takes training steps; its gradients are not clipped.

    Args:
        config: the experiment.
        precision: of its forward passes.
        ranks: in DDP where there are several.
        graphs: compiles the student; None: it is eager.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        precision: torch.dtype,
        *,
        ranks: Ranks = ALONE,
        graphs: CountedGraphs | None = None,
    ) -> None:
        # A clipped gradient would not show by what it was multiplied.
        config = replace(config, optim=replace(config.optim, clip_norm=1e9))
        self.student: DKDETR = tiny_student(config).train()
        if graphs is not None:
            self.student.compile(backend=graphs, fullgraph=True)
        self._step = TrainingStep(
            wrap_for_ranks(self.student, ranks),
            make_optimizer(self.student, config.optim),
            text_embeddings(),
            config,
            ranks,
            precision=precision,
            dumps=Path("nonfinite"),
        )

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Takes another's weights and running statistics."""
        self.student.load_state_dict(dict(weights))

    def step(self, batch: TrainingBatch, number: int) -> tuple[float, Tensor]:
        """Returns the loss of a step and its gradient, in one row."""
        result = self._step([batch], epoch=40, iteration=10_000 + number)
        rows = [each.grad.flatten() for each in self.student.parameters() if each.grad is not None]
        return result.parts["total"].item(), torch.cat(rows)


def distance(one: Tensor, other: Tensor) -> float:
    """How long the difference is beside the other."""
    return ((one - other).norm() / other.norm()).item()
