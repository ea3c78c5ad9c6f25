"""One optimisation step over a group of micro-batches: forward, loss, backward, clip, update.

The gradients of k micro-batches are those of k ranks: every loss is divided by the group's mean
counts of boxes and regions, known before the first forward pass.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from dkdetr.config import ExperimentConfig
from dkdetr.data.device_views import on_device
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.guarded_update import update_where_finite
from dkdetr.engine.nonfinite import Diagnosis, diagnose, write_dump
from dkdetr.engine.optim import learning_rate_factor, set_learning_rate
from dkdetr.engine.pairing import TeacherSide, pair_with_teacher
from dkdetr.engine.step_chance import Moment, StepChance
from dkdetr.engine.step_parts import marked
from dkdetr.errors import NonFiniteLossError, PeerFailedError
from dkdetr.losses.alignment import AlignedOutput, Alignment
from dkdetr.losses.criterion import Criterion, Normalisers, count_boxes, count_regions
from dkdetr.losses.distillation import distillation_statistics
from dkdetr.structures import (
    DenoisingQueries,
    InstanceMasks,
    LoadedBatch,
    StudentOutput,
    TrainingBatch,
)

MAX_OVERFLOWS = 10
"""Steps in a row that the fp16 scaler may skip."""


@dataclass(frozen=True)
class StepResult:
    """What one step gives to the log: weighted loss parts and other figures, still tensors."""

    parts: dict[str, Tensor]
    statistics: dict[str, Tensor]
    learning_rate: float
    skipped: bool
    """True if the fp16 scaler found an overflow and left the weights alone."""


class TrainingStep:
    """Runs steps on one rank's batches.

    Args:
        student: the module to call: the student, or DDP around it.
        optimizer: over the student's parameters.
        text_embeddings: the base classes', on the device.
        config: the experiment.
        ranks: this process among the job's.
        precision: from `dkdetr.precision.training_type`.
        teacher: what the settings' options want of the teacher and the training set.
        dumps: folder for the report of a step whose loss is not finite.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: AdamW,
        text_embeddings: Tensor,
        config: ExperimentConfig,
        ranks: Ranks,
        *,
        precision: torch.dtype,
        dumps: Path,
        teacher: TeacherSide | None = None,
    ) -> None:
        self.student = student
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision is torch.float16)
        self._overflows_in_row = 0
        self._text_embeddings = text_embeddings
        self._teacher = teacher or TeacherSide()
        self._chance = StepChance(
            config,
            num_classes=len(text_embeddings),
            class_weights=self._teacher.class_weights,
            device=ranks.device,
        )
        self._alignment = Alignment(config.kd)
        self._criterion = Criterion(
            config.detection,
            config.kd,
            across_ranks=ranks if ranks.world_size > 1 else None,
            teacher_mean=self._teacher.mean,
        )
        self._config = config
        self._ranks = ranks
        self._precision = precision
        self._dumps = dumps

    def __call__(self, group: Sequence[LoadedBatch], *, epoch: int, iteration: int) -> StepResult:
        """Returns the figures of one step on a group of micro-batches; the weights have moved.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite and no scaler explains it, or
                it happened too often in a row; the weights have not moved.
            PeerFailedError: the same, and this rank's own part was finite.
        """
        config = self._config.optim
        factor = learning_rate_factor(config, epoch=epoch, iteration=iteration)
        learning_rate = set_learning_rate(self.optimizer, config, factor)
        counts = self._mean_counts(group)
        buffers = self._copy_of_buffers()
        self.optimizer.zero_grad(set_to_none=True)
        results = []
        for number, batch in enumerate(group):
            moment = Moment(epoch, iteration, self._ranks.rank * len(group) + number)
            self._chance.seed_dropout(moment)
            with self._exchange(last=number == len(group) - 1):
                results.append(self._backward(batch, moment, counts, share=1 / len(group)))
        with marked("optimiser"):
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.student.parameters(), config.clip_norm)
            # By the norm: of finite gradients it may not be finite, which the scaler misses.
            taken = update_where_finite(self.optimizer, norm)
            self.scaler.update()
        parts = _means(parts for parts, _ in results)
        statistics = _means(statistics for _, statistics in results)
        statistics["grad_norm"] = norm.detach()
        skipped = not taken()
        self._overflows_in_row = self._overflows_in_row + 1 if skipped else 0
        if skipped and not (self.scaler.is_enabled() and self._overflows_in_row <= MAX_OVERFLOWS):
            self._give_up(group, [parts for parts, _ in results], epoch, iteration)
        if skipped:
            self._put_back(buffers)
        return StepResult(parts, statistics, learning_rate, skipped)

    def state_dict(self) -> dict[str, Any]:
        """Returns the scaler's state and the overflows in a row."""
        return {"scaler": self.scaler.state_dict(), "overflows_in_row": self._overflows_in_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`; a scaler after a run without one finds its own scale."""
        if state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))
        self._overflows_in_row = int(state["overflows_in_row"])

    def _backward(
        self, loaded: LoadedBatch, moment: Moment, counts: Tensor, *, share: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adds a micro-batch's share to the gradients; returns its loss parts and statistics."""
        drawn = self._chance.classes(loaded, moment)
        denoising = self._chance.denoising(loaded, moment)
        with marked("views"):
            batch = on_device(loaded, self._ranks.device)
        epoch = moment.epoch
        output = self._forward(batch, epoch, denoising)
        try:
            pairs = self._pair(output, batch)
            paired, regions = (output, None) if pairs is None else (pairs.output, pairs.regions)
            with marked("losses"):
                report = self._criterion(
                    paired,
                    batch.targets,
                    regions,
                    self._normalisers(counts, pairs),
                    drawn_classes=drawn,
                    denoising=denoising,
                )
        except NonFiniteLossError:
            if self._config.kd.rkd.gather and self._ranks.world_size > 1:
                # The others wait in the loss's backward: they lose this rank, which speaks.
                diagnosis = self._diagnose([loaded], [{"total": torch.tensor(math.nan)}], epoch)
                told = diagnosis.began_here
                raise self._reported(diagnosis, epoch, moment.iteration, told=told) from None
            # No loss without a matching. The other ranks are about to exchange gradients: these
            # tell them that the step is broken.
            broken = _sum_of(output) * math.nan
            self.scaler.scale(broken).backward()
            return {"total": broken.detach()}, {}
        with marked("backward"):
            self.scaler.scale(report.total * share).backward()
        parts = {name: value.detach() for name, value in report.parts.items()}
        parts["total"] = report.total.detach()
        return parts, {} if pairs is None else distillation_statistics(pairs)

    def _forward(
        self, batch: TrainingBatch, epoch: int, denoising: DenoisingQueries | None
    ) -> StudentOutput:
        kd = self._config.kd
        hybrid = kd.hybrid_queries > 0 and kd.begun(epoch)
        regions = batch.regions if kd.auxiliary_queries else None
        half = self._precision is not torch.float32
        if self._config.compute.cuda_graphs:  # nothing of the last step is needed any more
            torch.compiler.cudagraph_mark_step_begin()
        with (
            marked("rest of forward"),
            torch.autocast(self._ranks.device.type, dtype=self._precision, enabled=half),
        ):
            return self.student(
                batch.images, self._text_embeddings, regions, hybrid=hybrid, denoising=denoising
            )

    def _pair(self, output: StudentOutput, batch: TrainingBatch) -> AlignedOutput | None:
        """Returns the pairs to distil; every rank must hear of one whose pairing broke."""
        try:
            return pair_with_teacher(
                output, batch, self._alignment, self._criterion, self._teacher.encoder
            )
        except NonFiniteLossError:
            if not self._config.kd.paired_from_start:
                self._ranks.mean(torch.zeros((), device=self._ranks.device))
            raise

    def _exchange(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Lets DDP exchange gradients after the last micro-batch only."""
        if isinstance(self.student, DistributedDataParallel) and not last:
            return self.student.no_sync()
        return contextlib.nullcontext()

    def _mean_counts(self, group: Sequence[LoadedBatch]) -> Tensor:
        """Returns boxes and offered regions: means over all ranks' parts, counted on the CPU."""
        cpu = torch.device("cpu")
        boxes = sum(count_boxes(batch.targets, cpu).item() for batch in group)
        regions = sum(count_regions(batch.regions, cpu).item() for batch in group)
        # `full` takes its value along with the kernel: nobody waits for a copy.
        own = [
            torch.full((), count / len(group), device=self._ranks.device)
            for count in (boxes, regions)
        ]
        return self._ranks.mean(torch.stack(own))

    def _normalisers(self, counts: Tensor, pairs: AlignedOutput | None) -> Normalisers:
        """Returns the counts that divide the losses; of regions, those that were paired."""
        num_boxes, num_regions = counts.clamp(min=1).unbind()
        # Else as many as were offered, which were counted before the step.
        if pairs is not None and not self._config.kd.paired_from_start:
            paired = count_regions(pairs.regions, self._ranks.device)
            num_regions = self._ranks.mean(paired).clamp(min=1)
        return Normalisers(num_boxes=num_boxes, num_regions=num_regions)

    def _copy_of_buffers(self) -> list[Tensor]:
        """Returns running statistics as they are, where a step may have to be taken back."""
        if not self.scaler.is_enabled():
            return []
        buffers = list(self.student.buffers())
        copies = [torch.empty_like(buffer) for buffer in buffers]
        _copy_all(copies, buffers)
        return copies

    def _put_back(self, buffers: Sequence[Tensor]) -> None:
        _copy_all(list(self.student.buffers()), buffers)

    def _give_up(
        self,
        group: Sequence[LoadedBatch],
        parts: Sequence[Mapping[str, Tensor]],
        epoch: int,
        iteration: int,
    ) -> NoReturn:
        """Raises what broke this step, with a report in the dump's folder."""
        own = not all(value.isfinite().all() for each in parts for value in each.values())
        # A gradient that broke under finite losses is nobody's own: the first rank speaks.
        somebody_s = self._ranks.any(own)
        suspected = own or (not somebody_s and self._ranks.is_first)
        diagnosis = self._diagnose(group, parts, epoch) if suspected else None
        # Joined batch statistics break every rank's losses: it speaks where it began, if that
        # can be told.
        began = diagnosis is not None and diagnosis.began_here
        told = self._ranks.any(began)
        if diagnosis is None or (told and not began):
            raise PeerFailedError("another rank's loss or gradient is not finite")
        raise self._reported(diagnosis, epoch, iteration, told=told)

    def _diagnose(
        self, group: Sequence[LoadedBatch], parts: Sequence[Mapping[str, Tensor]], epoch: int
    ) -> Diagnosis:
        """Returns what is broken on this rank; no step can follow."""
        if isinstance(self.student, DistributedDataParallel):
            # From here on this rank is alone: nothing in the student may wait for the others.
            self.student = self.student.module.eval()
        return diagnose(
            self.student,
            lambda batch: self._forward(batch, epoch, None),
            group,
            parts,
            device=self._ranks.device,
        )

    def _reported(
        self, diagnosis: Diagnosis, epoch: int, iteration: int, *, told: bool
    ) -> NonFiniteLossError:
        """Returns the error that tells a diagnosis, which is in a file too."""
        place = {"epoch": epoch, "iteration": iteration, "rank": self._ranks.rank}
        path = write_dump(self._dumps, diagnosis, place | {"overflows": self._overflows_in_row})
        # What a rank lost by itself nobody else has broken.
        joined = self._config.student.backbone.norm == "sync_batch" or self._config.kd.rkd.gather
        elsewhere = ""
        looked = not told and not diagnosis.out_of_memory
        if looked and self._ranks.world_size > 1 and (joined or not diagnosis.bad_parts):
            elsewhere = ". This rank alone is not broken: other ranks' images may have done it"
        return NonFiniteLossError(f"{diagnosis.sentence()}{elsewhere}; see {path}")


def _sum_of(output: Any) -> Tensor:
    """Returns the sum of an output's tensors, which every parameter has a part in."""
    if isinstance(output, Tensor):
        return output.sum() if output.is_floating_point() else output.new_zeros(()).float()
    if isinstance(output, InstanceMasks):
        return output.graph_zero()
    if is_dataclass(output):
        parts = [getattr(output, each.name) for each in fields(output)]
        return torch.stack([_sum_of(part) for part in parts if part is not None]).sum()
    raise TypeError(f"an output holds a {type(output).__name__}")


@torch.no_grad()
def _copy_all(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copies tensors, those of a type in one go: a student has some 160 buffers of two types."""
    pairs = list(zip(into, tensors, strict=True))
    for dtype in {tensor.dtype for tensor in tensors}:
        here, there = zip(*(pair for pair in pairs if pair[1].dtype is dtype), strict=True)
        torch._foreach_copy_(list(here), list(there))  # pyright: ignore[reportPrivateImportUsage]


def _means(results: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns each figure's mean over the micro-batches that have it."""
    columns: dict[str, list[Tensor]] = {}
    for figures in results:
        for name, value in figures.items():
            columns.setdefault(name, []).append(value)
    means: dict[str, Tensor] = {}
    for count in {len(values) for values in columns.values()}:  # nearly always one
        names = [name for name, values in columns.items() if len(values) == count]
        together = torch.stack([value for name in names for value in columns[name]])
        means |= zip(names, together.view(-1, count).mean(1).unbind(), strict=True)
    return {name: means[name] for name in columns}
