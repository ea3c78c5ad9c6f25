"""The training loop: streams the cache, steps the student, and can be stopped at any time."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from cache.store import open_cache
from dkdetr.config import ExperimentConfig
from dkdetr.data.loader import BatchStream, batches_per_epoch, make_training_loader
from dkdetr.data.splits import load_split
from dkdetr.data.vocabulary import Vocabulary, from_metadata
from dkdetr.engine.allocator import keep_freed_memory
from dkdetr.engine.checkpoint import (
    Checkpoint,
    Progress,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dkdetr.engine.distributed import Ranks, join_ranks
from dkdetr.engine.initial_weights import start_from_file
from dkdetr.engine.interruption import StopFlag, stop_on_sigterm
from dkdetr.engine.metric_log import MetricLog
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.pairing import TeacherBuilder, teacher_side
from dkdetr.engine.run_folder import RunFolder, describe_machine, open_run
from dkdetr.engine.step import StepResult, TrainingStep, choose_precision
from dkdetr.errors import PreemptedError, UsageError
from dkdetr.experiment_file import config_hash
from dkdetr.progress import progress
from dkdetr.structures import TrainingBatch
from dkdetr.student.build import build_student
from dkdetr.student.detector import DKDETR

_LOG_EVERY = 20


@dataclass(frozen=True)
class TrainRequest:
    """What to train: a sealed cache, an experiment, and where the run lives."""

    cache: Path
    config: ExperimentConfig
    run: Path
    data_root: Path
    device: str = "auto"
    build_teacher: TeacherBuilder | None = None
    """Loads the cache's teacher; called for `kd.alignment = "online"` alone."""


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended."""

    run: Path
    checkpoint: Path
    iterations: int
    seconds: float
    """Of this start alone."""
    last_losses: dict[str, float]


def train(request: TrainRequest) -> TrainSummary:
    """Returns after the last epoch; resumes by itself where the run's folder holds a checkpoint.

    Raises:
        cache.spec.CacheError: the cache is unsealed, stale or damaged.
        MismatchError: the folder holds another experiment or another cache's run.
        NonFiniteLossError: training broke; the last checkpoint stands.
        PreemptedError: SIGTERM came; everything is saved.
    """
    keep_freed_memory()
    with join_ranks(request.device) as ranks, stop_on_sigterm() as stop:
        return _Run(request, ranks, stop).go()


class _Run:
    def __init__(self, request: TrainRequest, ranks: Ranks, stop: StopFlag) -> None:
        config = self.config = request.config
        self.request, self.ranks, self.stop = request, ranks, stop
        reader = open_cache(request.cache)
        self.cache = reader.info
        self.vocabulary: Vocabulary = from_metadata(*reader.text())
        split = load_split(self.cache.split, request.data_root)
        _refuse_impossible(config, ranks)
        if self.cache.random_teacher and ranks.is_first:
            print(
                f"RANDOM TEACHER: the embeddings of {request.cache} mean nothing; for trials only",
                file=sys.stderr,
            )
        self.folder = self._open_folder()
        torch.manual_seed(config.seed)
        self.student = build_student(config, text_dim=self.vocabulary.embed_dim)
        if config.student.weights is not None:
            start_from_file(self.student, Path(config.student.weights), split)
        self.student.to(ranks.device)
        self.optimizer: AdamW = make_optimizer(self.student, config.optim)
        self.step = TrainingStep(
            self.student,
            self.optimizer,
            torch.from_numpy(self.vocabulary.base().embeddings.copy()).to(ranks.device),
            config,
            ranks,
            precision=choose_precision(config.optim.precision, ranks.device),
            teacher=teacher_side(config, reader, split, ranks.device, request.build_teacher),
        )
        self._saved_at = -1
        self.progress = self._restore()
        self.loader: BatchStream[TrainingBatch] = make_training_loader(
            split,
            self.vocabulary,
            config,
            cache_path=request.cache,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start_epoch=self.progress.epoch,
            start_batch=self.progress.batch,
        )
        self.epoch_length = batches_per_epoch(
            split, self.vocabulary, config, cache_path=request.cache
        )

    def go(self) -> TrainSummary:
        """Returns how the run ended, after its last epoch."""
        started = time.monotonic()
        total = self.epoch_length * self.config.optim.epochs
        recent = _Recent()
        log = None
        if self.ranks.is_first:
            log = MetricLog(self.folder.metrics, after_iteration=self.progress.iteration)
        try:
            self._train(total, recent, log)
        except (RuntimeError, EOFError, OSError):
            # A SIGTERM for the whole group ends the loader's processes too.
            if not self.stop.is_set or self.ranks.world_size > 1:
                raise
            self._stop()
        finally:
            if log is not None:
                log.close()
        path = self._save()
        seconds = time.monotonic() - started
        return TrainSummary(self.request.run, path, total, seconds, recent.last)

    def _train(self, total: int, recent: "_Recent", log: MetricLog | None) -> None:
        last_saved = time.monotonic()
        quiet = not self.ranks.is_first
        if self.ranks.any(self.stop.is_set):
            self._stop()
        with progress("train", total, done=self.progress.iteration, quiet=quiet) as advance:
            for batch, wait in _timed(self.loader):
                self._enter_epoch()
                now = self.progress
                result = self.step(batch, epoch=now.epoch, iteration=now.iteration)
                self.progress = self._next(now)
                recent.add(result, wait, len(batch.targets) * self.ranks.world_size)
                done = self.progress.iteration
                if done % _LOG_EVERY == 0 or done == total:
                    self._log(log, recent)
                    advance(done, recent.note())
                if self.ranks.any(self.stop.is_set):
                    self._stop()
                if self._due(last_saved):
                    self._save()
                    last_saved = time.monotonic()

    def _stop(self) -> NoReturn:
        path = self._save()
        raise PreemptedError(
            f"stopped by SIGTERM at iteration {self.progress.iteration}; saved {path}; "
            "the same command goes on from there"
        )

    def _open_folder(self) -> RunFolder:
        provenance = {
            "experiment": self.config.name,
            "config_hash": config_hash(self.config),
            "cache_fingerprint": self.cache.fingerprint,
            "vocabulary_hash": self.vocabulary.hash,
            "split": self.cache.split,
            "teacher": self.cache.teacher,
            "teacher_spec": self.cache.provenance.get("teacher_spec"),
            "random_teacher": self.cache.random_teacher,
            "world_size": self.ranks.world_size,
            **describe_machine(self.ranks.device),
        }
        # One rank makes the folder; the others then find it.
        if self.ranks.is_first:
            open_run(self.request.run, self.config, provenance)
        self.ranks.wait()
        return open_run(self.request.run, self.config, provenance)

    def _restore(self) -> Progress:
        path = latest_checkpoint(self.folder.checkpoints)
        if path is None:
            return Progress(epoch=0, batch=0, iteration=0)
        checkpoint = load_checkpoint(path)
        self.student.load_state_dict(dict(checkpoint.student))
        self.optimizer.load_state_dict(dict(checkpoint.optimizer))
        self.step.scaler.load_state_dict(dict(checkpoint.scaler))
        self._saved_at = checkpoint.progress.iteration
        return checkpoint.progress

    def _enter_epoch(self) -> None:
        """Wraps the student for several ranks, anew where distillation sets in.

        DDP wants a gradient for every parameter at every step, and the KD parameters have none
        during burn-in.
        """
        distilling = self.config.kd.enabled and self.progress.epoch >= self.config.kd.start_epoch
        weights = self.student.kd_parameters()
        changed = any(weight.requires_grad != distilling for weight in weights)
        for weight in weights:
            weight.requires_grad_(distilling)
        unwrapped = isinstance(self.step.student, DKDETR)
        if self.ranks.world_size > 1 and (changed or unwrapped):
            self.step.student = _wrap(self.student, self.ranks)
        self.step.student.train()

    def _next(self, now: Progress) -> Progress:
        batch = now.batch + 1
        if batch < self.epoch_length:
            return Progress(now.epoch, batch, now.iteration + 1)
        return Progress(now.epoch + 1, 0, now.iteration + 1)

    def _due(self, last_saved: float) -> bool:
        # Rank clocks differ; the first rank's decides for all.
        late = time.monotonic() - last_saved > self.config.checkpoint_every_s
        return self.ranks.any(late and self.ranks.is_first)

    def _save(self) -> Path:
        path = self.folder.checkpoints / f"step_{self.progress.iteration:08d}.pt"
        if self._saved_at == self.progress.iteration:
            return path
        self._saved_at = self.progress.iteration
        if self.ranks.is_first:
            path = save_checkpoint(
                self.folder.checkpoints,
                Checkpoint(
                    student=self.student.state_dict(),
                    optimizer=self.optimizer.state_dict(),
                    scaler=self.step.scaler.state_dict(),
                    progress=self.progress,
                    config=self.config,
                    vocabulary=self.vocabulary,
                    cache_fingerprint=self.cache.fingerprint,
                    cache_split=self.cache.split,
                ),
            )
        self.ranks.wait()
        return path

    def _log(self, log: MetricLog | None, recent: "_Recent") -> None:
        values = recent.means()
        if self.ranks.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        values["epoch"] = self.progress.epoch
        if log is not None:
            log.write("train", self.progress.iteration, values)


class _Recent:
    """Figures since the last line of the log; tensors stay on the device until it is written."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._clear()

    def add(self, result: StepResult, wait: float, num_images: int) -> None:
        self._steps += 1
        for name, value in (result.parts | result.statistics).items():
            self._tensors[name].append(value)
        self._wait += wait
        self._images += num_images
        self._skipped += result.skipped
        self._learning_rate = result.learning_rate

    def means(self) -> dict[str, float]:
        seconds = time.monotonic() - self._since
        means = {k: round(torch.stack(v).mean().item(), 6) for k, v in self._tensors.items()}
        means |= {
            "learning_rate": self._learning_rate,
            "images_per_s": round(self._images / seconds, 3),
            "data_wait": round(self._wait / seconds, 4),
            "skipped_steps": self._skipped,
        }
        self._clear()
        self.last = means
        return dict(means)

    def note(self) -> str:
        wait = f"{100 * self.last['data_wait']:.0f}% wait"
        parts = [f"loss {self.last['total']:.2f}", f"lr {self.last['learning_rate']:.1e}"]
        if "kd_margin" in self.last:
            parts.append(f"margin {self.last['kd_margin']:.2f}")
        return ", ".join([*parts, f"{self.last['images_per_s']:.1f} img/s", wait])

    def _clear(self) -> None:
        self._tensors: dict[str, list[Tensor]] = defaultdict(list)
        self._steps = self._images = self._skipped = 0
        self._wait = self._learning_rate = 0.0
        self._since = time.monotonic()


def _timed(loader: BatchStream[TrainingBatch]) -> Iterator[tuple[TrainingBatch, float]]:
    """Yields each batch with the seconds that training waited for it."""
    asked = time.monotonic()
    for batch in loader:
        yield batch, time.monotonic() - asked
        asked = time.monotonic()


def _wrap(student: DKDETR, ranks: Ranks) -> nn.Module:
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=devices)


def _refuse_impossible(config: ExperimentConfig, ranks: Ranks) -> None:
    if config.data.batch_size % ranks.world_size:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} does not divide by {ranks.world_size} ranks"
        )
    kd = config.kd
    if (kd.enabled or kd.hybrid_queries) and kd.start_epoch >= config.optim.epochs:
        raise UsageError(
            f"kd.start_epoch={kd.start_epoch} lies behind the last of the {config.optim.epochs} "
            "epochs: nothing would be distilled. Set it lower, or switch distillation off with "
            "kd.regions_per_image=0 (and kd.hybrid_queries=0)"
        )
    if config.optim.lr <= 0 or config.optim.epochs < 1:
        raise UsageError("optim.lr and optim.epochs must be above 0")
    sync = config.student.backbone.norm == "sync_batch"
    if sync and ranks.world_size > 1 and ranks.device.type == "cpu":
        raise UsageError(
            "student.backbone.norm=sync_batch works on GPUs only; on several CPU ranks set it to "
            "batch or frozen"
        )
