"""The training loop: streams the cache, steps the student, and can be stopped at any time."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from cache.store import open_cache
from dkdetr.config import ExperimentConfig
from dkdetr.data.batch_stream import BatchStream
from dkdetr.data.cached_split import load_cached_split
from dkdetr.data.device_views import settle_views
from dkdetr.data.loader import batches_per_epoch, make_training_loader
from dkdetr.data.vocabulary import Vocabulary, from_metadata
from dkdetr.engine.allocator import keep_freed_memory
from dkdetr.engine.distributed import Ranks, join_ranks
from dkdetr.engine.epoch_scores import EpochScores
from dkdetr.engine.folder_lock import PATIENCE_S, locked_folder
from dkdetr.engine.initial_weights import boxes_seen_before
from dkdetr.engine.interruption import StopFlag, stop_on_sigterm
from dkdetr.engine.pairing import teacher_side
from dkdetr.engine.profiling import WARMUP_STEPS, profiled
from dkdetr.engine.rank_log import rank_log
from dkdetr.engine.recent_figures import RecentFigures
from dkdetr.engine.run_diary import RunDiary, open_diary
from dkdetr.engine.run_folder import RunFolder, describe_machine, open_run
from dkdetr.engine.run_starts import note_start
from dkdetr.engine.run_state import RunState
from dkdetr.engine.sample_pictures import draw_samples
from dkdetr.engine.step_parts import marked
from dkdetr.engine.student_setup import make_deterministic
from dkdetr.engine.train_request import TrainRequest
from dkdetr.errors import PreemptedError, UsageError
from dkdetr.experiment_file import config_hash, refuse_late_start
from dkdetr.precision import float32_products
from dkdetr.progress import progress
from dkdetr.structures import LoadedBatch
from dkdetr.student_file import load_student_file

_LOG_EVERY = 20
_BUSY = (
    "another training is at work in '{}'. Two would undo each other's checkpoints: wait until it "
    "is done, or stop it, or name another folder with --run"
)


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended."""

    run: Path
    checkpoint: Path
    iterations: int
    seconds: float
    """Of this start alone."""
    last_losses: dict[str, float | None]
    """The diary's last line: losses, rates, memory."""


def train(request: TrainRequest) -> TrainSummary:
    """Returns after the last epoch; resumes by itself where the run's folder holds a checkpoint.

    Raises:
        cache.spec.CacheError: the cache is unsealed, stale or damaged.
        MismatchError: the folder holds another experiment or another cache's run, or the burn-in
            does not fit.
        FolderLockedError: another training is at work in the folder.
        NonFiniteLossError: training broke; the last checkpoint stands.
        PeerLostError: another rank died or hangs.
        PreemptedError: SIGTERM came; everything is saved.
    """
    keep_freed_memory()
    if request.deterministic:
        make_deterministic()
    timeout_s = request.config.compute.rank_timeout_s
    precision = request.config.optim.precision
    with (
        stop_on_sigterm() as stop,
        join_ranks(request.device, timeout_s=timeout_s) as ranks,
        float32_products(precision, ranks.device),
        ExitStack() as held,
    ):
        return _Run(request, ranks, stop, held).go()


class _Run:
    def __init__(
        self, request: TrainRequest, ranks: Ranks, stop: StopFlag, held: ExitStack
    ) -> None:
        config = self.config = request.config
        self.request, self.ranks, self.stop, self.held = request, ranks, stop, held
        _refuse_impossible(config, ranks)
        self._stop_early()
        reader = open_cache(request.cache)
        self.cache = reader.info
        self.vocabulary: Vocabulary = from_metadata(*reader.text())
        split = load_cached_split(self.cache.split, request.data_root)
        self._stop_early()
        if self.cache.random_teacher and ranks.is_first:
            print(
                f"RANDOM TEACHER: the embeddings of {request.cache} mean nothing; for trials only",
                file=sys.stderr,
            )
        weights, start = config.student.weights, None
        # A run that goes on has its mark and its weights, wherever the file is by now.
        if weights is not None and not RunFolder(request.run).goes_on:
            start = load_student_file(Path(weights))
        seen = boxes_seen_before(start, request.start_from, split)
        self.folder = self._open_folder(seen)
        self.state = RunState(
            config,
            split,
            self.vocabulary,
            self.cache,
            ranks,
            self.folder,
            teacher_side(config, reader, split, ranks.device, request.build_teacher),
            start,
        )
        self.state.restore(request.start_from)
        self._stop_early()
        limit = request.image_limit
        self.loader: BatchStream[LoadedBatch] = make_training_loader(
            split,
            self.vocabulary,
            settle_views(config, ranks.device),
            cache_path=request.cache,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start_epoch=self.state.progress.epoch,
            start_batch=self.state.progress.batch,
            image_limit=limit,
            pin_memory=ranks.device.type == "cuda",
            # Several ranks stop together, after a step.
            should_stop=(lambda: stop.is_set) if ranks.world_size == 1 else None,
        )
        self.epoch_length = batches_per_epoch(
            split, self.vocabulary, config, cache_path=request.cache, image_limit=limit
        )
        self.recent = RecentFigures(ranks.device)
        self.scores = self._epoch_scores()

    def go(self) -> TrainSummary:
        """Returns how the run ended, after its last epoch."""
        started = time.monotonic()
        with ExitStack() as closing:
            diary, names = RunDiary(), self.request.watch.trackers
            if self.ranks.is_first:
                at = self.state.progress.iteration
                note_start(self.folder, self.ranks, at)
                opened = open_diary(self.folder, names, self.config, after_iteration=at)
                diary = closing.enter_context(opened)
            self._train(diary)
        path = self.state.save()
        seconds = time.monotonic() - started
        done = self.state.progress.iteration
        return TrainSummary(self.request.run, path, done, seconds, self.recent.last)

    def _train(self, diary: RunDiary) -> None:
        last_saved = time.monotonic()
        total = self._last_iteration()
        state, first = self.state, self.state.progress.iteration
        if self.ranks.any(self.stop.is_set):
            self._stop()
        with ExitStack() as open_ones:
            quiet = not self.ranks.is_first
            advance = open_ones.enter_context(progress("train", total, done=first, quiet=quiet))
            profiler = open_ones.enter_context(self._profiler())
            self._keep_burn_in()
            self._score(diary)
            for group, wait in self._groups(total):
                result = state.train_on(group, epoch_length=self.epoch_length)
                done = state.progress.iteration
                self.recent.add(result, wait, self.config.data.batch_size)
                if done % _LOG_EVERY == 0 or done == total:
                    self._log(diary, total - done)
                    advance(done, self.recent.note())
                self._keep_burn_in()
                self._draw(group)
                if profiler is not None:
                    profiler.step()
                late = time.monotonic() - last_saved > self.config.checkpoint_every_s
                # Rank clocks differ; the first rank's decides for all.
                stop, due = self.ranks.vote(self.stop.is_set, late and self.ranks.is_first)
                if stop:
                    self._stop()
                if due:
                    state.save()
                    last_saved = time.monotonic()
                self._score(diary)
        # The stream ends early only on SIGTERM.
        if state.progress.iteration < total:
            self._stop()

    def _groups(self, total: int) -> Iterator[tuple[list[LoadedBatch], float]]:
        """Yields each batch's micro-batches with the seconds that training waited for them."""
        batches, parts = iter(self.loader), self.config.compute.micro_batches
        while self.state.progress.iteration < total:
            asked = time.monotonic()
            with marked("data wait"):
                group = list(islice(batches, parts))
            if len(group) < parts:
                return
            yield group, time.monotonic() - asked

    def _keep_burn_in(self) -> None:
        if self.request.start_from is None:
            self.state.keep_burn_in()

    def _last_iteration(self) -> int:
        """Returns the iteration to end at: the last epoch's, or an earlier one that was asked for.

        Iterations count the steps before a shared burn-in too.
        """
        at, request = self.state.progress, self.request
        epochs = self.config.optim.epochs
        if request.until_epoch is not None:
            epochs = min(epochs, request.until_epoch)
        left = (epochs - at.epoch) * self.epoch_length - at.batch
        ends = [at.iteration + max(0, left)]
        if request.until_iteration is not None:
            ends.append(max(at.iteration, request.until_iteration))
        if request.watch.profile_steps > 0:
            ends.append(at.iteration + WARMUP_STEPS + request.watch.profile_steps)
        return min(ends)

    @contextmanager
    def _profiler(self) -> Iterator[Any]:
        steps = self.request.watch.profile_steps
        if steps == 0 or not self.ranks.is_first:
            yield None
            return
        with profiled(self.folder.path / "profile", steps, self.state.student) as profiler:
            yield profiler

    def _stop_early(self) -> None:
        """Ends a start-up that SIGTERM met; several ranks stop together later, before a step."""
        if self.stop.is_set and self.ranks.world_size == 1:
            raise PreemptedError(
                "stopped by SIGTERM while starting; what was saved before stands, the same "
                "command goes on"
            )

    def _stop(self) -> NoReturn:
        path = self.state.save()
        raise PreemptedError(
            f"stopped by SIGTERM at iteration {self.state.progress.iteration}; saved {path}; "
            "the same command goes on from there"
        )

    def _open_folder(self, saw_boxes_of: str | None) -> RunFolder:
        provenance = {
            "experiment": self.config.name,
            "config_hash": config_hash(self.config),
            "seed": self.config.seed,
            "cache_fingerprint": self.cache.fingerprint,
            "vocabulary_hash": self.vocabulary.hash,
            "split": self.cache.split,
            "teacher": self.cache.teacher,
            "teacher_spec": self.cache.provenance.get("teacher_spec"),
            "random_teacher": self.cache.random_teacher,
            "started_from": str(self.request.start_from or ""),
            "saw_boxes_of": saw_boxes_of,
            "world_size": self.ranks.world_size,
            "augment": settle_views(self.config, self.ranks.device).data.augment,
            **describe_machine(self.ranks.device),
        }
        if self.ranks.is_first:
            place = self.request.run
            # The other ranks wait below, and call a first one lost that stays away too long.
            patience_s = min(PATIENCE_S, self.config.compute.rank_timeout_s / 2)
            lock = locked_folder(place, _BUSY.format(place), patience_s=patience_s)
            self.held.enter_context(lock)
            open_run(place, self.config, provenance)
        self.ranks.wait()
        # Not before the first rank has found the folder to be this run's.
        self.held.enter_context(rank_log(self.request.run, self.ranks))
        return RunFolder(self.request.run)

    def _log(self, diary: RunDiary, left: int) -> None:
        at = self.state.progress
        diary.write("train", at.iteration, {**self.recent.means(left), "epoch": at.epoch})

    def _epoch_scores(self) -> EpochScores | None:
        watch = self.request.watch
        if watch.eval_every == 0:
            return None
        return EpochScores(
            watch.eval_every, watch.eval_split, self.cache.split, self.request.data_root,
            self.vocabulary, self.config, self.ranks, self.folder,
        )  # fmt: skip

    def _score(self, diary: RunDiary) -> None:
        if self.scores is not None and self.state.progress.batch == 0:
            self.recent.keep_peak()
            self.recent.leave_out(self.scores.score_if_due(self.state, diary, self.stop))

    def _draw(self, group: Sequence[LoadedBatch]) -> None:
        every, iteration = self.request.watch.pictures_every, self.state.progress.iteration
        if every > 0 and iteration % every == 0 and self.ranks.is_first:
            draw_samples(
                self.state.student,
                group[0],
                self.state.text_embeddings,
                self.vocabulary.base().names,
                self.folder.path / "pictures",
                iteration,
            )


def _refuse_impossible(config: ExperimentConfig, ranks: Ranks) -> None:
    refuse_late_start(config)
    if config.compute.cuda_graphs and ranks.world_size > 1:
        raise UsageError(
            f"compute.cuda_graphs wants one process, and there are {ranks.world_size}: exchanges "
            "between ranks were never recorded; set it to false, or start without torchrun"
        )
