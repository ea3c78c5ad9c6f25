"""A run's scores while it trains: the end of every so many epochs scored as `dkdetr eval` does it.

Training notices nothing: what is scored is a student of its own, and no number is drawn that a step
would draw (each is a function of its moment).
"""

import sys
import time
from pathlib import Path

from dkdetr.config import ExperimentConfig
from dkdetr.data.splits import load_split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.checkpoint import Progress, load_student
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.evaluate_run import (
    diary_values,
    refuse_other_names,
    tell_of_lost_images,
    validation_split,
)
from dkdetr.engine.interruption import StopFlag, end_on_sigterm
from dkdetr.engine.metric_log import read_metrics
from dkdetr.engine.run_diary import RunDiary
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.run_state import RunState
from dkdetr.errors import DataError, PreemptedError
from dkdetr.evaluation.compiled import ready_for_inference
from dkdetr.evaluation.detection_metrics import Metrics
from dkdetr.evaluation.evaluate import Evaluation, evaluate_student
from dkdetr.evaluation.gather import RankShare
from dkdetr.evaluation.ground_truth import ground_truth_of
from dkdetr.evaluation.protocols import GROUP_KEYS
from dkdetr.evaluation.scored_weights import ScoredWeights
from dkdetr.evaluation.table import format_percent
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import weights_hash


class EpochScores:
    """Knows what to score and when; what could be wrong with that is found before the first step.

    Args:
        every: epochs from one scoring to the next.
        split: its name; None: the validation split that belongs to the training split.
        train_split: the run's.
        data_root: where splits lie.
        vocabulary: the run's.
        config: the experiment.
        ranks: each detects on its share of the images, the first one scores.
        folder: the run's.

    Raises:
        UsageError: the training split does not say what to score on.
        MismatchError: the run's names are not the split's.
        DataError: pictures are not there, or masks to compare the student's with.
    """

    def __init__(
        self,
        every: int,
        split: str | None,
        train_split: str,
        data_root: Path,
        vocabulary: Vocabulary,
        config: ExperimentConfig,
        ranks: Ranks,
        folder: RunFolder,
    ) -> None:
        self._every, self._config = every, config
        self._vocabulary, self._ranks, self._folder = vocabulary, ranks, folder
        name = split or validation_split(train_split, option="--eval-split")
        self._split = load_split(name, data_root)
        remedy = "name another split (--eval-split), or score later (dkdetr eval --vocab)"
        refuse_other_names(vocabulary, self._split, remedy)
        self._split.require_images()
        if config.student.mask_head:
            ground_truth_of(self._split, with_masks=True)
        if ranks.is_first:
            tell_of_lost_images(self._split)

    def score_if_due(self, state: RunState, diary: RunDiary, stop: StopFlag) -> float:
        """Returns the seconds that it took; 0 where no epoch that is to be scored has just ended.

        A run that was stopped there, or while it was scored, is scored when it goes on.

        Raises:
            DataError: a picture cannot be read; the run was saved before.
            PreemptedError: SIGTERM came; the run was saved before.
            NonFiniteLossError: a weight is not finite.
        """
        at, began = state.progress, time.monotonic()
        if not self._is_due(at):
            return 0.0
        path = state.save()
        message = (
            f"stopped by SIGTERM while iteration {at.iteration} was scored; saved {path}; the same "
            "command scores it and goes on from there"
        )
        with end_on_sigterm(message):
            if self._ranks.any(stop.is_set):  # just before signals were to end this block
                raise PreemptedError(message)
            student = load_student(state.checkpoint())
            weights = self._weights(student, at)
            try:
                evaluation = self._score(student, weights)
            except DataError as error:
                raise DataError(
                    f"{error}. Training is saved ({path}): the same command goes on once that is "
                    "mended, or without --eval-every"
                ) from error
            self._ranks.wait()  # here, where a signal is answered, for the first one's scores
        if evaluation is not None:
            metrics = evaluation.metrics
            diary.write("eval", at.iteration, diary_values(metrics, weights, averaged=False))
            values = {key: format_percent(value) for key, value in metrics.values.items()}
            shown = ", ".join(f"{key} {values[key]}" for key in values if key in _told(metrics))
            print(f"after epoch {at.epoch}, {self._split.name}: {shown}", file=sys.stderr)
        return time.monotonic() - began

    def _is_due(self, at: Progress) -> bool:
        if at.batch > 0 or at.epoch == 0 or at.epoch % self._every > 0:
            return False
        told = self._ranks.is_first and (self._is_another_runs(at) or self._is_told(at))
        return not self._ranks.any(told)

    def _is_another_runs(self, at: Progress) -> bool:
        """Returns whether the run has taken no step of its own: a shared burn-in is scored once, in
        its own run."""
        return at.iteration == self._folder.read_provenance()["starts"][0]["iteration"]

    def _is_told(self, at: Progress) -> bool:
        return any(
            record.get("kind") == "eval"
            and record["iteration"] == at.iteration
            and record["split"] == self._split.name
            and not record["averaged"]
            and record.get("vocabulary_hash") == self._vocabulary.hash
            and record.get("precision") == self._config.optim.precision
            for record in read_metrics(self._folder.metrics)
        )

    def _weights(self, student: DKDETR, at: Progress) -> ScoredWeights:
        vocabulary, precision = self._vocabulary.hash, self._config.optim.precision
        return ScoredWeights(
            weights_hash(student), vocabulary, "own", precision, at.epoch, at.iteration
        )

    def _score(self, student: DKDETR, weights: ScoredWeights) -> Evaluation | None:
        ranks = self._ranks
        student.to(ranks.device)
        # Running statistics of plain `batch` norms are each rank's own; saved are the first one's.
        ranks.take_first(student.state_dict().values())
        precision = self._config.optim.precision
        return evaluate_student(
            ready_for_inference(student, ranks.device, precision),
            self._split,
            self._vocabulary,
            self._config,
            device=ranks.device,
            out_dir=self._folder.evaluation(self._split.name),
            share=RankShare(ranks.rank, ranks.world_size),
            weights=weights,
        )


def _told(metrics: Metrics) -> set[str]:
    """Returns which metrics are said on the terminal; all stand in the diary."""
    return {"AP", "AP50", *GROUP_KEYS[metrics.protocol]}
