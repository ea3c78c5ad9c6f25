"""What is scored or shared: a run, one of its checkpoints, or a student file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkdetr.config import ExperimentConfig, Precision
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.checkpoint import Progress, load_student, open_checkpoint
from dkdetr.engine.run_folder import RunFolder
from dkdetr.errors import MismatchError, UsageError
from dkdetr.evaluation.scored_weights import ScoredWeights, Words
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import STUDENT_SUFFIX, build_from_file, load_student_file, weights_hash


@dataclass(frozen=True)
class Subject:
    """A student and what belongs to it.

    `train_split` and `progress`, of its training, are None where the file does not say; `folder` is
    where results go; `brings_vocabulary` is False where the vocabulary is the caller's.
    """

    path: Path
    student: DKDETR
    config: ExperimentConfig
    vocabulary: Vocabulary
    train_split: str | None
    provenance: Mapping[str, Any]
    folder: Path
    brings_vocabulary: bool = True
    progress: Progress | None = None

    def scored(self, vocabulary: Vocabulary, words: Words, precision: Precision) -> ScoredWeights:
        """Returns what figures are of that these weights give when asked in this way."""
        at = self.progress
        return ScoredWeights(
            weights_hash(self.student),
            vocabulary.hash,
            words,
            precision,
            epoch=None if at is None else at.epoch,
            iteration=None if at is None else at.iteration,
        )


def load_subject(
    place: Path,
    vocabulary: Vocabulary | Callable[[], Vocabulary] | None = None,
    *,
    averaged: bool = False,
) -> Subject:
    """Returns the student of a run folder, a `.pt` checkpoint or a `.safetensors` student file.

    Args:
        place: the folder or the file.
        vocabulary: taken, or made, where a student file brings none of its own.
        averaged: with the run's average of its weights (`optim.ema_decay`), not the last ones.

    Raises:
        DataError: there is nothing.
        CorruptArtefactError: it is damaged or something else.
        UsageError: an average is asked for and there is none.
        MismatchError: the file holds no whole student, one of another teacher's width, or no
            vocabulary and none is given.
    """
    if place.suffix == STUDENT_SUFFIX:
        if averaged:
            raise UsageError(f"'{place}' holds one set of weights: leave --ema out")
        return _from_file(place, vocabulary)
    path, checkpoint = open_checkpoint(place)
    run = RunFolder.of_checkpoint(path)
    return Subject(
        path=path,
        student=load_student(checkpoint, averaged=averaged),
        config=checkpoint.config,
        vocabulary=checkpoint.vocabulary,
        train_split=checkpoint.cache_split,
        provenance=run.read_provenance(),
        folder=run.path,
        progress=checkpoint.progress,
    )


def _from_file(path: Path, vocabulary: Vocabulary | Callable[[], Vocabulary] | None) -> Subject:
    file = load_student_file(path)
    known = file.vocabulary or (vocabulary() if callable(vocabulary) else vocabulary)
    if known is None:
        raise MismatchError(
            f"'{path}' brings no vocabulary: say whose words it understands, by a vocabulary of "
            "its teacher (--vocab FILE, made by `dkdetr vocab build`) or, to predict, by words and "
            "that teacher (-c WORDS --teacher SPEC)"
        )
    return Subject(
        path=path,
        student=build_from_file(path, file, text_dim=known.embed_dim),
        config=file.config,
        vocabulary=known,
        train_split=file.provenance.get("train_split"),
        provenance=file.provenance,
        folder=path.with_suffix(""),
        brings_vocabulary=file.vocabulary is not None,
    )
