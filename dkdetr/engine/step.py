"""One optimisation step over a group of micro-batches: forward, loss, backward, clip, update.

The gradients of k micro-batches are those of k ranks: every loss is divided by the group's mean
counts of boxes and regions, known before the first forward pass.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from dkdetr.config import ExperimentConfig
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.nonfinite import diagnose, write_dump
from dkdetr.engine.optim import learning_rate_factor, set_learning_rate
from dkdetr.errors import NonFiniteLossError, PeerFailedError, UsageError
from dkdetr.losses.criterion import (
    Criterion,
    Normalisers,
    count_boxes,
    count_regions,
    distillation_statistics,
)
from dkdetr.structures import StudentOutput, TrainingBatch

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
        precision: from `choose_precision`.
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
    ) -> None:
        self.student = student
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision is torch.float16)
        self._overflows_in_row = 0
        self._text_embeddings = text_embeddings
        self._criterion = Criterion(config.detection, config.kd)
        self._config = config
        self._ranks = ranks
        self._precision = precision
        self._dumps = dumps

    def __call__(self, group: Sequence[TrainingBatch], *, epoch: int, iteration: int) -> StepResult:
        """Returns the figures of one step on a group of micro-batches; the weights have moved.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite and no scaler explains it, or
                it happened too often in a row; the weights have not moved.
            PeerFailedError: the same, and this rank's own part was finite.
        """
        config = self._config.optim
        factor = learning_rate_factor(config, epoch=epoch, iteration=iteration)
        learning_rate = set_learning_rate(self.optimizer, config, factor)
        normalisers = self._normalisers(group)
        buffers = self._copy_of_buffers()
        self.optimizer.zero_grad(set_to_none=True)
        results = []
        for number, batch in enumerate(group):
            self._seed(iteration, number, len(group))
            with self._exchange(last=number == len(group) - 1):
                results.append(self._backward(batch, normalisers, share=1 / len(group)))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), config.clip_norm)
        parts, statistics = (_means(each[kind] for each in results) for kind in (0, 1))
        skipped = not math.isfinite(norm.item())
        self._overflows_in_row = self._overflows_in_row + 1 if skipped else 0
        if skipped and not (self.scaler.is_enabled() and self._overflows_in_row <= MAX_OVERFLOWS):
            self._give_up(group, [parts for parts, _ in results], epoch, iteration)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if skipped:
            self._put_back(buffers)
        return StepResult(parts, statistics | {"grad_norm": norm.detach()}, learning_rate, skipped)

    def state_dict(self) -> dict[str, Any]:
        """Returns the scaler's state and the overflows in a row."""
        return {"scaler": self.scaler.state_dict(), "overflows_in_row": self._overflows_in_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self.scaler.load_state_dict(dict(state["scaler"]))
        self._overflows_in_row = int(state["overflows_in_row"])

    def _backward(
        self, batch: TrainingBatch, normalisers: Normalisers, *, share: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adds a micro-batch's share to the gradients; returns its loss parts and statistics."""
        batch = batch.to(self._ranks.device)
        output = self._forward(batch)
        try:
            report = self._criterion(output, batch.targets, batch.regions, normalisers)
        except NonFiniteLossError:
            # No loss without a matching. The other ranks are about to exchange gradients: these
            # tell them that the step is broken.
            broken = _sum_of_outputs(output) * math.nan
            self.scaler.scale(broken).backward()
            return {"total": broken.detach()}, {}
        self.scaler.scale(report.total * share).backward()
        parts = {name: value.detach() for name, value in report.parts.items()}
        parts["total"] = report.total.detach()
        statistics: dict[str, Tensor] = {}
        if output.distillation is not None and batch.regions is not None:
            statistics = distillation_statistics(output.distillation, batch.regions)
        return parts, statistics

    def _forward(self, batch: TrainingBatch) -> StudentOutput:
        enabled = self._precision is not torch.float32
        device = self._ranks.device.type
        with torch.autocast(device, dtype=self._precision, enabled=enabled):
            return self.student(batch.images, self._text_embeddings, batch.regions)

    def _seed(self, iteration: int, number: int, parts: int) -> None:
        """Makes dropout a function of the iteration and the place among all ranks' parts."""
        place = self._ranks.rank * parts + number
        torch.manual_seed(hash((self._config.seed, iteration, place)) % 2**63)

    def _exchange(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Lets DDP exchange gradients after the last micro-batch only."""
        if isinstance(self.student, DistributedDataParallel) and not last:
            return self.student.no_sync()
        return contextlib.nullcontext()

    def _normalisers(self, group: Sequence[TrainingBatch]) -> Normalisers:
        """Returns mean counts over all ranks' micro-batches, from tensors still on the CPU."""
        cpu = torch.device("cpu")
        boxes = sum(count_boxes(batch.targets, cpu).item() for batch in group)
        regions = sum(count_regions(batch.regions, cpu).item() for batch in group)
        # `full` takes its value along with the kernel: nobody waits for a copy.
        own = [
            torch.full((), count / len(group), device=self._ranks.device)
            for count in (boxes, regions)
        ]
        num_boxes, num_regions = self._ranks.mean(torch.stack(own)).clamp(min=1).unbind()
        return Normalisers(num_boxes=num_boxes, num_regions=num_regions)

    def _copy_of_buffers(self) -> list[Tensor]:
        """Returns running statistics as they are, where a step may have to be taken back."""
        if not self.scaler.is_enabled():
            return []
        return [buffer.clone() for buffer in self.student.buffers()]

    def _put_back(self, buffers: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for buffer, before in zip(self.student.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _give_up(
        self,
        group: Sequence[TrainingBatch],
        parts: Sequence[Mapping[str, Tensor]],
        epoch: int,
        iteration: int,
    ) -> NoReturn:
        """Raises what broke this step, with a report in the dump's folder."""
        own = not all(value.isfinite().all() for each in parts for value in each.values())
        # A gradient that broke under finite losses is nobody's own: the first rank speaks.
        somebody_s = self._ranks.any(own)
        if not own and (somebody_s or not self._ranks.is_first):
            raise PeerFailedError("another rank's loss or gradient is not finite")
        if isinstance(self.student, DistributedDataParallel):
            # From here on this rank is alone: nothing may wait for the others.
            self.student = self.student.module.eval()
        diagnosis = diagnose(self.student, self._forward, group, parts, device=self._ranks.device)
        place = {"epoch": epoch, "iteration": iteration, "rank": self._ranks.rank}
        path = write_dump(self._dumps, diagnosis, place | {"overflows": self._overflows_in_row})
        raise NonFiniteLossError(f"{diagnosis.sentence()}; see {path}")


def choose_precision(setting: str, device: torch.device) -> torch.dtype:
    """Returns the type that `optim.precision` means on a device.

    Raises:
        UsageError: the device cannot do it.
    """
    on_gpu = device.type == "cuda"
    native_bf16 = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    if setting == "auto":
        return torch.float32 if not on_gpu else torch.bfloat16 if native_bf16 else torch.float16
    if setting == "fp16" and not on_gpu:
        raise UsageError("optim.precision=fp16 wants a CUDA device; use fp32 or auto on a CPU")
    if setting == "bf16" and on_gpu and not native_bf16:
        raise UsageError("optim.precision=bf16: this GPU has no bf16; use fp16 or auto")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[setting]


def _sum_of_outputs(output: StudentOutput) -> Tensor:
    """Returns a sum that every parameter of the student has a part in."""
    total = output.logits.sum() + output.detection.boxes_cxcywh.sum()
    total = total + output.encoder.objectness_logits.sum() + output.encoder.boxes_cxcywh.sum()
    if output.distillation is not None:
        total = total + output.distillation.features.sum()
    return total


def _means(results: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns each figure's mean over the micro-batches that have it."""
    columns: dict[str, list[Tensor]] = {}
    for figures in results:
        for name, value in figures.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean() for name, values in columns.items()}
