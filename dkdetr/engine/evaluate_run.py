"""Scores a run: finds its checkpoint, the split and the vocabulary that fits it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dkdetr.config import ExperimentConfig, Precision
from dkdetr.data.clean_names import with_clean_names
from dkdetr.data.splits import Split, load_split
from dkdetr.data.vocabulary import Vocabulary, load_vocabulary
from dkdetr.engine.distributed import Ranks, join_ranks, num_ranks
from dkdetr.engine.interruption import end_on_sigterm
from dkdetr.engine.metric_log import add_record
from dkdetr.engine.run_folder import RunFolder, require_newest_run, split_folder_name
from dkdetr.engine.subject import Subject, load_subject
from dkdetr.errors import MismatchError, UsageError
from dkdetr.evaluation.compiled import ready_for_inference
from dkdetr.evaluation.detection_metrics import Evaluator, Metrics
from dkdetr.evaluation.evaluate import Evaluation, evaluate_student, score_predictions
from dkdetr.evaluation.gather import RankShare
from dkdetr.evaluation.scored_weights import ScoredWeights, Words
from dkdetr.evaluation.table import print_metrics

VocabularyBuilder = Callable[[Split, str, tuple[str, ...]], Vocabulary]
"""Builds a split's vocabulary with a teacher (its specification) and prompt templates."""


@dataclass(frozen=True)
class EvalRequest:
    """What to score.

    `run` is a run folder or a checkpoint, None for the newest run below `runs`; `split` None for
    the validation split that belongs to the run's training split; `vocabulary` None for the
    checkpoint's own where its names are the split's.
    """

    run: Path | None
    split: str | None
    vocabulary: Path | None
    data_root: Path
    device: str = "auto"
    evaluator: Evaluator = "fast"
    clean_names: bool = False
    """Builds the vocabulary of names put right (`dkdetr.data.clean_names`)."""
    precision: Precision | None = None
    """None: the run's own, `optim.precision`."""
    compiled: bool = False
    """Detects through torch.compile."""
    batch_size: int | None = None
    """Images at once; None: the run's own, `eval.batch_size`."""
    averaged: bool = False
    """Scores the run's average of its weights; the files lie in `eval/SPLIT-ema/`."""


@dataclass(frozen=True)
class Scored:
    """What was scored on what, and the result."""

    subject: Path
    split: str
    evaluation: Evaluation
    weights: ScoredWeights | None = None
    """None: a results file, whose weights nobody knows."""

    def print_table(self) -> None:
        """Prints the metrics by group, remarks and the paths of the files."""
        print_metrics([(str(self.subject), self.evaluation.metrics)])
        for note in self.evaluation.metrics.notes:
            print(f"note: {note}")
        for name, path in self.evaluation.paths.items():
            print(f"{name}: {path}")

    def as_json(self) -> dict[str, Any]:
        """Returns the metrics and where the files lie."""
        paths = {name: str(path) for name, path in self.evaluation.paths.items()}
        described = {"subject": str(self.subject), "split": self.split, "files": paths}
        weights = {} if self.weights is None else self.weights.as_json()
        return described | weights | self.evaluation.metrics.as_json()


def evaluate_run(
    request: EvalRequest, build_vocabulary: VocabularyBuilder | None = None
) -> Scored | None:
    """Returns a run's metrics on a split; the files lie in the run's `eval/SPLIT/`.

    The run's diary has a line of them, `kind` eval, at the step of the weights that were scored.
    Under torchrun every rank detects on its share of the images; all but the first return None.

    Args:
        request: what to score.
        build_vocabulary: used where the checkpoint's names are not the split's and no vocabulary
            file is given; CLIP stays out of this package.

    Raises:
        MismatchError: no vocabulary fits the split.
        PreemptedError: SIGTERM came.
    """
    message = "stopped by SIGTERM: nothing was changed; the same command evaluates from the start"
    with end_on_sigterm(message), join_ranks(request.device) as ranks:
        return _evaluate(request, build_vocabulary, ranks)


def _evaluate(
    request: EvalRequest, build_vocabulary: VocabularyBuilder | None, ranks: Ranks
) -> Scored | None:
    run = request.run or require_newest_run("name one, or train: dkdetr train --cache CACHE")
    given = load_vocabulary(request.vocabulary) if request.vocabulary else None
    subject = load_subject(run, given, averaged=request.averaged)
    split = load_split(request.split or validation_split(subject.train_split), request.data_root)
    if ranks.is_first:
        tell_of_lost_images(split)
    vocabulary = given or subject.vocabulary
    if given is None:
        named = with_clean_names(split) if request.clean_names else split
        vocabulary = _fitting_vocabulary(subject, named, build_vocabulary)
    elif request.clean_names:
        raise UsageError("--clean-names builds a vocabulary, --vocab brings one: give one of them")
    else:
        given.require_space_of(subject.vocabulary, f"'{request.vocabulary}' was")
    if subject.provenance.get("random_teacher") and ranks.is_first:
        print("RANDOM TEACHER: this student learned from random embeddings", file=sys.stderr)
    config = with_precision(subject.config, request.precision)
    config = with_batch_size(config, request.batch_size)
    student = ready_for_inference(
        subject.student.to(ranks.device),
        ranks.device,
        config.optim.precision,
        compiled=request.compiled,
    )
    words = words_of(vocabulary, subject.vocabulary, split, cleaned=request.clean_names)
    weights = subject.scored(vocabulary, words, config.optim.precision)
    evaluation = evaluate_student(
        student,
        split,
        vocabulary,
        config,
        device=ranks.device,
        out_dir=RunFolder(subject.folder).evaluation(split.name, averaged=request.averaged),
        evaluator=request.evaluator,
        share=RankShare(ranks.rank, ranks.world_size),
        weights=weights,
    )
    if evaluation is None:
        return None
    run, at = RunFolder(subject.folder), subject.progress
    if at is not None and run.metrics.is_file():  # else a student file, or a checkpoint alone
        values = diary_values(evaluation.metrics, weights, averaged=request.averaged)
        add_record(run.metrics, "eval", at.iteration, values)
    return Scored(subject.path, split.name, evaluation, weights)


def diary_values(
    metrics: Metrics, weights: ScoredWeights, *, averaged: bool
) -> dict[str, float | str | None]:
    """Returns what a line of the diary says of scores; None: the split has nothing to measure."""
    described = metrics.as_json()
    numbers = {key: described[key] for key in metrics.values}
    return {
        "split": metrics.split,
        "averaged": averaged,
        "epoch": weights.epoch,
        **weights.asked(),
        **numbers,
    }


def with_precision(config: ExperimentConfig, precision: Precision | None) -> ExperimentConfig:
    """Returns the settings with another precision; None: as they are."""
    if precision is None:
        return config
    return replace(config, optim=replace(config.optim, precision=precision))


def with_batch_size(config: ExperimentConfig, batch_size: int | None) -> ExperimentConfig:
    """Returns the settings with so many images at once; None leaves them as they are."""
    if batch_size is None:
        return config
    return replace(config, eval=replace(config.eval, batch_size=batch_size))


def evaluate_predictions(predictions: Path, request: EvalRequest) -> Scored:
    """Returns the metrics of anybody's COCO results json; the files lie beside it.

    Raises:
        UsageError: no split is named, or there are several ranks.
        PreemptedError: SIGTERM came.
    """
    if num_ranks() > 1:
        raise UsageError("scoring a file takes one process: start it without torchrun")
    if request.split is None:
        raise UsageError("--predictions wants --split: a results file does not name its split")
    split = load_split(request.split, request.data_root)
    tell_of_lost_images(split)
    out_dir = predictions.parent / f"{predictions.stem}-{split_folder_name(split.name)}"
    with end_on_sigterm("stopped by SIGTERM: the same command scores from the start"):
        evaluation = score_predictions(
            predictions, split, out_dir=out_dir, evaluator=request.evaluator
        )
    return Scored(subject=predictions, split=split.name, evaluation=evaluation)


def tell_of_lost_images(split: Split) -> None:
    """Says on stderr that a split of OV-COCO is scored on fewer images than its file has."""
    if split.is_train and split.protocol == "ovcoco":
        print(
            f"'{split.name}' counts as a training split: images without a base object are left "
            "out, those with novel objects alone among them, so AP50 of novel names compares with "
            "no other; a split is for scoring if its annotation file, or that one's folder, is "
            "called val or test",
            file=sys.stderr,
        )


def validation_split(train_split: str | None, option: str = "--split") -> str:
    """Returns the name of the split that belongs to a training split; `option` names one instead.

    Raises:
        UsageError: the split is a user's own folder, whose validation part only they know.
    """
    if train_split is None:
        raise UsageError(f"which split? This student's file does not say: give {option}")
    if train_split.endswith("_train"):
        return train_split.removesuffix("_train") + "_val"
    raise UsageError(f"which split? '{train_split}' does not say what to score on: give {option}")


def has_names_of(vocabulary: Vocabulary, split: Split) -> bool:
    """Returns whether a vocabulary has the split's names, each for the same category."""
    wanted = {category.category_id: category.name for category in split.categories}
    return wanted == dict(zip(vocabulary.category_ids, vocabulary.names, strict=True))


def refuse_other_names(vocabulary: Vocabulary, split: Split, remedy: str) -> None:
    """Returns if a training on these names can be scored on a split along the way.

    Raises:
        MismatchError: it has others; ends with `remedy`.
    """
    if not has_names_of(vocabulary, split):
        raise MismatchError(
            f"the {len(vocabulary)} names of the run's cache are not those of '{split.name}', and "
            f"--eval-every scores with these: {remedy}"
        )


def words_of(asked: Vocabulary, own: Vocabulary, split: Split, *, cleaned: bool) -> Words:
    """Returns whose words a student of the vocabulary `own` was asked with.

    A split with other names than the student's (transfer) is asked for its own; `cleaned` says that
    names put right were asked for.
    """
    if asked.hash == own.hash:
        return "own"
    if has_names_of(asked, split) and not has_names_of(own, split) and asked.prompts == own.prompts:
        return "split"
    return "clean" if cleaned else "other"


def _fitting_vocabulary(
    subject: Subject, split: Split, build_vocabulary: VocabularyBuilder | None
) -> Vocabulary:
    own = subject.vocabulary
    if has_names_of(own, split):
        return own
    spec = subject.provenance.get("teacher_spec")
    if build_vocabulary is None or spec is None:
        raise MismatchError(
            f"the checkpoint's {len(own)} names are not those of '{split.name}'; give a vocabulary "
            f"of {own.teacher} with --vocab"
        )
    built = build_vocabulary(split, spec, own.prompts)
    built.require_space_of(
        own,
        f"with '{spec}' as it is now the names of '{split.name}' were",
        "give a vocabulary of the second with --vocab",
    )
    return built
