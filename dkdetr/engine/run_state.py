"""What changes with every step, as one thing: trained on, saved, found again."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.optim import AdamW

from cache.store import CacheInfo
from dkdetr.config import ExperimentConfig
from dkdetr.data.splits import Split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.burn_in import BURN_IN_FILE, averaged_start, check_burn_in, take_over
from dkdetr.engine.checkpoint import (
    Checkpoint,
    Progress,
    load_latest,
    open_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.initial_weights import leak_lines, start_from_file
from dkdetr.engine.optim import load_optimizer, make_optimizer
from dkdetr.engine.pairing import TeacherSide
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.step import StepResult, TrainingStep
from dkdetr.engine.student_setup import prepare_student, wrap_for_ranks
from dkdetr.engine.weight_average import WeightAverage
from dkdetr.errors import NonFiniteLossError
from dkdetr.precision import training_type
from dkdetr.structures import LoadedBatch
from dkdetr.student.attention_backend import use_backend
from dkdetr.student.build import build_student
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import StudentFile, load_student_file


class RunState:
    """Student, optimiser, scaler, average and progress of a run.

    Args:
        config: the experiment.
        split: what is trained on; `start` may not have seen its novel boxes.
        vocabulary: of the cache.
        cache: what checkpoints say of where they come from.
        ranks: this process among the job's.
        folder: the run's.
        teacher: what the settings' options want of the teacher and the training set.
        start: what the file `student.weights` holds, where a run begins with it. One that goes on
            wants neither it nor the backbone's weights: its checkpoint has all.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        split: Split,
        vocabulary: Vocabulary,
        cache: CacheInfo,
        ranks: Ranks,
        folder: RunFolder,
        teacher: TeacherSide,
        start: StudentFile | None,
    ) -> None:
        self._config, self._vocabulary, self._cache = config, vocabulary, cache
        self._ranks, self._folder = ranks, folder
        latest = load_latest(folder.checkpoints)
        self._found = None if latest is None else latest[1]
        torch.manual_seed(config.seed)
        self.student: DKDETR = build_student(
            config, text_dim=vocabulary.embed_dim, load_weights=self._found is None
        )
        for line in self._begun_from(start, split):
            if ranks.is_first:
                print(line, file=sys.stderr)
        self.student.to(ranks.device)
        use_backend(self.student, config.ops.backend, ranks.device)
        prepare_student(self.student, config.compute)
        self._optimizer: AdamW = make_optimizer(self.student, config.optim)
        self.text_embeddings = torch.from_numpy(vocabulary.base().embeddings.copy())
        self.text_embeddings = self.text_embeddings.to(ranks.device)
        self._step = TrainingStep(
            self.student,
            self._optimizer,
            self.text_embeddings,
            config,
            ranks,
            precision=training_type(config.optim.precision, ranks.device),
            dumps=folder.dumps,
            teacher=teacher,
        )
        decay = config.optim.ema_decay
        self._average = WeightAverage(self.student, decay) if decay > 0 else None
        self.progress = Progress(epoch=0, batch=0, iteration=0)
        self._wrapped = False
        self._saved_at = -1

    def restore(self, start_from: Path | None) -> None:
        """Goes on from the run's newest checkpoint, else from the burn-in `start_from`.

        Raises:
            MismatchError: the burn-in does not fit this run.
        """
        checkpoint, self._found = self._found, None
        if checkpoint is not None:
            self.student.load_state_dict(dict(checkpoint.student))
            load_optimizer(self._optimizer, checkpoint.optimizer)
            if self._average is not None:
                self._average.load_state_dict(checkpoint.average)
            self._saved_at = checkpoint.progress.iteration
        elif start_from is not None:
            _, checkpoint = open_checkpoint(start_from)
            check_burn_in(checkpoint, self._config, self._vocabulary)
            if self._average is not None:
                self._average.load_state_dict(averaged_start(checkpoint, self.student))
            take_over(checkpoint, self.student, self._optimizer)
        else:
            return
        self._step.load_state_dict(checkpoint.step)
        self.progress = checkpoint.progress

    def _begun_from(self, start: StudentFile | None, split: Split) -> Sequence[str]:
        """Fills a student that begins from a file; returns what a user should know, in lines."""
        if self._found is not None:
            seen = self._folder.read_provenance().get("saw_boxes_of")
            return leak_lines("what this run began from", seen, split)
        weights = self._config.student.weights
        if weights is None:
            return ()
        path = Path(weights)
        # Not read yet, where the run has checkpoints and none of them is whole.
        return start_from_file(self.student, path, start or load_student_file(path), split)

    def train_on(self, group: list[LoadedBatch], *, epoch_length: int) -> StepResult:
        """Returns the figures of a step on a batch's micro-batches; progress has moved."""
        self._enter_epoch()
        now = self.progress
        result = self._step(group, epoch=now.epoch, iteration=now.iteration)
        if self._average is not None and not result.skipped:
            self._average.update(self.student, now.iteration)
        last = now.batch + 1 == epoch_length
        self.progress = Progress(
            epoch=now.epoch + last,
            batch=0 if last else now.batch + 1,
            iteration=now.iteration + 1,
        )
        return result

    def save(self) -> Path:
        """Returns the checkpoint of this moment; written by the first rank, waited for by all.

        Raises:
            NonFiniteLossError: a weight is not finite; such a checkpoint is never written.
        """
        path = self._folder.checkpoints / f"step_{self.progress.iteration:08d}.pt"
        if self._saved_at != self.progress.iteration:
            self._saved_at = self.progress.iteration
            if self._ranks.is_first:
                save_checkpoint(self._folder.checkpoints, self.checkpoint())
            self._ranks.wait()
        return path

    def keep_burn_in(self) -> None:
        """Saves the checkpoint that ablations share, once, where burn-in has just ended."""
        kd, at = self._config.kd, self.progress
        edge = (kd.start_epoch, 0)
        at_edge = kd.has_start and kd.start_epoch > 0 and (at.epoch, at.batch) == edge
        path = self._folder.checkpoints / BURN_IN_FILE
        if at_edge and self._ranks.is_first and not path.with_suffix(".json").is_file():
            write_checkpoint(path, self.checkpoint())

    def checkpoint(self) -> Checkpoint:
        """Returns what a checkpoint of this moment holds: tensors are the run's own, no copies.

        Raises:
            NonFiniteLossError: a weight is not finite.
        """
        state = self.student.state_dict()
        bad = [name for name, value in state.items() if not value.isfinite().all()]
        if bad:
            raise NonFiniteLossError(
                f"{bad[0]} and {len(bad) - 1} further tensors of the student are not finite at "
                f"iteration {self.progress.iteration}; nothing was saved, the checkpoint before "
                "stands. Lower optim.lr"
            )
        return Checkpoint(
            student=state,
            average={} if self._average is None else self._average.state_dict(),
            optimizer=self._optimizer.state_dict(),
            step=self._step.state_dict(),
            progress=self.progress,
            config=self._config,
            vocabulary=self._vocabulary,
            cache_fingerprint=self._cache.fingerprint,
            cache_split=self._cache.split,
        )

    def _enter_epoch(self) -> None:
        """Wraps the student for several ranks, anew where distillation sets in.

        DDP wants a gradient for every parameter at every step, and the KD parameters have none
        during burn-in.
        """
        kd = self._config.kd
        distilling = kd.enabled and kd.begun(self.progress.epoch)
        weights = self.student.kd_parameters()
        changed = any(weight.requires_grad != distilling for weight in weights)
        for weight in weights:
            weight.requires_grad_(distilling)
        if changed or not self._wrapped:
            self._step.student = wrap_for_ranks(self.student, self._ranks)
            self._wrapped = True
        self._step.student.train()
