"""What the trainings of the shipped weights share: their options, the descent and the log."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How weights are made; `crops` is how many regions are drawn beforehand."""

    steps: int
    batch_size: int
    crops: int
    lr: float
    seed: int
    bf16: bool


def asset_parser(
    description: str | None, *, out: Path, batch_size: int, seed: int
) -> argparse.ArgumentParser:
    """Returns a parser of `--out` and of what makes a `Recipe`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--crops", type=int, default=48000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--bf16", action="store_true", help="faster where the processor has it")
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Returns the recipe that an `asset_parser` has read."""
    return Recipe(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        crops=arguments.crops,
        lr=arguments.lr,
        seed=arguments.seed,
        bf16=arguments.bf16,
    )


class Descent:
    """AdamW with a one-cycle rate; weights decay, biases and norms do not."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, *, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self._model = model
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=betas)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            max_lr=recipe.lr,
            total_steps=recipe.steps,
            pct_start=0.1,
            cycle_momentum=False,
        )
        self._recent: float | None = None

    def step(self, loss: Tensor) -> float:
        """Returns the losses' running mean; the weights have moved down this one's gradient."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        value = loss.item()
        self._recent = value if self._recent is None else 0.95 * self._recent + 0.05 * value
        return self._recent


def write_log(path: Path, log: Mapping[str, Any]) -> None:
    """Writes and prints what a training was told and what came of it."""
    text = json.dumps(log, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
