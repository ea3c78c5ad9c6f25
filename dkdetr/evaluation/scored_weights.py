"""What the scores of a `metrics.json`, or an `agreement.json`, are of: one set of weights, at one
moment of its training, asked with one vocabulary, in one precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dkdetr.config import Precision

WEIGHTS_KEY = "weights_xxh3_128"
"""Of `metrics.json` and `agreement.json`; absent where a results file alone was scored, and in
files of before."""

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

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "ScoredWeights | None":
        """Returns what `as_json` gave among other keys; None of a file that does not say it all."""
        if not {WEIGHTS_KEY, "vocabulary_hash", "words", "precision"} <= said.keys():
            return None
        return cls(
            said[WEIGHTS_KEY],
            said["vocabulary_hash"],
            said["words"],
            said["precision"],
            epoch=said.get("epoch"),
            iteration=said.get("iteration"),
        )


def strange_words(said: Mapping[str, Any], own_hash: str | None) -> str | None:
    """Returns what words scores were asked with, where these are neither the student's own nor the
    names of a split that has others; None: they are.

    Args:
        said: of a `metrics.json`.
        own_hash: of the student's vocabulary; None: unknown.
    """
    words = said.get("words")
    if words is None:
        return "of words that they do not name"
    if words == "clean":
        return "of names put right (--clean-names)"
    changed = own_hash is not None and said.get("vocabulary_hash") != own_hash
    if words not in USUAL_WORDS or (words == "own" and changed):
        return "of other words than the student's own"
    return None


def strange_precision(said: Mapping[str, Any], own: Precision) -> str | None:
    """Returns the precision of scores in words, where it is not the student's own; None: it is."""
    precision = said.get("precision")
    if precision == own:
        return None
    return f"of precision {precision}, where the student's own is {own}"
