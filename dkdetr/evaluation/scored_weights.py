"""What the scores of a `metrics.json` are of: one set of weights, at one moment of its training,
asked with one vocabulary, in one precision."""

from dataclasses import dataclass
from typing import Any, Literal

from dkdetr.config import Precision

WEIGHTS_KEY = "weights_xxh3_128"
"""Of `metrics.json`; absent where a results file alone was scored, and in files of before."""

Words = Literal["own", "split", "clean", "other"]
"""Whose words were asked: the student's own; the split's names as published, which its own are not;
those put right (`--clean-names`); others (`--vocab`)."""
USUAL_WORDS: tuple[Words, ...] = ("own", "split")
"""What `dkdetr eval` asks without options: scores of these compare along a run."""


@dataclass(frozen=True)
class ScoredWeights:
    """The weights' hash (`student_file.weights_hash`), and the whole epochs and steps behind them;
    the hash of the vocabulary, whose it is, and the precision that was asked for.

    `epoch` and `iteration` are None for a student file, which does not say.
    """

    xxh3_128: str
    vocabulary_hash: str
    words: Words
    precision: Precision
    epoch: int | None = None
    iteration: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the keys of `metrics.json` and of `eval --json`."""
        at = {WEIGHTS_KEY: self.xxh3_128, "epoch": self.epoch, "iteration": self.iteration}
        return at | self.asked()

    def asked(self) -> dict[str, str]:
        """Returns what the weights were asked with, which a line of the diary says too."""
        return {
            "words": self.words,
            "vocabulary_hash": self.vocabulary_hash,
            "precision": self.precision,
        }
