"""Whose scores a `metrics.json` holds: one set of weights, at one moment of its training."""

from dataclasses import dataclass
from typing import Any

WEIGHTS_KEY = "weights_xxh3_128"
"""Of `metrics.json`; absent where a results file alone was scored, and in files of before."""


@dataclass(frozen=True)
class ScoredWeights:
    """The weights' hash (`student_file.weights_hash`), and the whole epochs and steps behind them.

    `epoch` and `iteration` are None for a student file, which does not say.
    """

    xxh3_128: str
    epoch: int | None = None
    iteration: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the keys of `metrics.json` and of `eval --json`."""
        return {WEIGHTS_KEY: self.xxh3_128, "epoch": self.epoch, "iteration": self.iteration}
