"""One optimisation step: forward, loss, backward, clip, update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from dkdetr.config import ExperimentConfig
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.optim import learning_rate_factor, set_learning_rate
from dkdetr.engine.pairing import TeacherSide, pair_with_teacher
from dkdetr.errors import NonFiniteLossError, UsageError
from dkdetr.losses.alignment import Alignment
from dkdetr.losses.criterion import Criterion, Normalisers, count_boxes, count_regions
from dkdetr.losses.denoising import make_denoising
from dkdetr.losses.distillation import distillation_statistics
from dkdetr.losses.federated import draw_classes
from dkdetr.structures import DenoisingQueries, StudentOutput, TeacherRegions, TrainingBatch


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
        teacher: what the settings' options want of the teacher and the training set.
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
        teacher: TeacherSide | None = None,
    ) -> None:
        self.student = student
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision is torch.float16)
        self._text_embeddings = text_embeddings
        self._teacher = teacher or TeacherSide()
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

    def __call__(self, batch: TrainingBatch, *, epoch: int, iteration: int) -> StepResult:
        """Returns the figures of one step; the weights have moved.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite (without a scaler to explain
                it); the weights have not moved.
        """
        batch = batch.to(self._ranks.device)
        config = self._config.optim
        factor = learning_rate_factor(config, epoch=epoch, iteration=iteration)
        learning_rate = set_learning_rate(self.optimizer, config, factor)
        # Dropout is a function of the iteration, so that a resumed run draws the same.
        torch.manual_seed(hash((self._config.seed, iteration, self._ranks.rank)) % 2**63)
        denoising = self._make_denoising(batch, iteration)
        output = self._forward(batch, epoch, denoising)
        regions = None
        try:
            pairs = pair_with_teacher(
                output, batch, self._alignment, self._criterion, self._teacher.encoder
            )
            if pairs is not None:
                output, regions = pairs.output, pairs.regions
            report = self._criterion(
                output,
                batch.targets,
                regions,
                self._normalisers(batch, regions),
                drawn_classes=self._draw_classes(batch, iteration),
                denoising=denoising,
            )
        except NonFiniteLossError:
            raise NonFiniteLossError(self._explain({}, output, batch)) from None
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(report.total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), config.clip_norm)
        skipped = not math.isfinite(norm.item())
        if skipped and not self.scaler.is_enabled():
            raise NonFiniteLossError(self._explain(report.parts, output, batch))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        statistics = {"grad_norm": norm.detach()}
        if pairs is not None:
            statistics |= distillation_statistics(pairs)
        parts = {name: value.detach() for name, value in report.parts.items()}
        parts["total"] = report.total.detach()
        return StepResult(parts, statistics, learning_rate, skipped)

    def _forward(
        self, batch: TrainingBatch, epoch: int, denoising: DenoisingQueries | None
    ) -> StudentOutput:
        kd = self._config.kd
        hybrid = kd.hybrid_queries > 0 and epoch >= kd.start_epoch
        regions = batch.regions if kd.auxiliary_queries else None
        enabled = self._precision is not torch.float32
        device = self._ranks.device.type
        with torch.autocast(device, dtype=self._precision, enabled=enabled):
            return self.student(
                batch.images, self._text_embeddings, regions, hybrid=hybrid, denoising=denoising
            )

    def _draw_classes(self, batch: TrainingBatch, iteration: int) -> Tensor | None:
        weights = self._teacher.class_weights
        if weights is None:
            return None
        number = self._config.detection.fed_classes
        chance = self._generator(iteration, 1)
        drawn = draw_classes(batch.targets, weights, num_drawn=number, generator=chance)
        return drawn.to(self._ranks.device)

    def _make_denoising(self, batch: TrainingBatch, iteration: int) -> DenoisingQueries | None:
        student = self._config.student
        if student.denoising == 0:
            return None
        return make_denoising(
            batch.targets,
            len(self._text_embeddings),
            num_groups=student.denoising,
            box_noise=student.denoising_box_noise,
            label_noise=student.denoising_label_noise,
            generator=self._generator(iteration, 2),
        )

    def _generator(self, iteration: int, purpose: int) -> torch.Generator:
        """Returns chance for one purpose, a function of the iteration, for resumed runs."""
        seed = hash((self._config.seed, iteration, self._ranks.rank, purpose)) % 2**63
        return torch.Generator().manual_seed(seed)

    def _normalisers(self, batch: TrainingBatch, regions: TeacherRegions | None) -> Normalisers:
        device = self._ranks.device
        counts = torch.stack((count_boxes(batch.targets, device), count_regions(regions, device)))
        num_boxes, num_regions = self._ranks.mean(counts).clamp(min=1).unbind()
        return Normalisers(num_boxes=num_boxes, num_regions=num_regions)

    def _explain(
        self, parts: Mapping[str, Tensor], output: StudentOutput, batch: TrainingBatch
    ) -> str:
        """Names the images, the bad parts and the first bad tensor of a broken step."""
        bad_parts = [name for name, value in parts.items() if not math.isfinite(value.item())]
        suspects = {
            "image": batch.images.pixels,
            "target boxes": torch.cat([t.boxes_cxcywh for t in batch.targets]),
            "objectness": output.encoder.objectness_logits,
            "logits": output.logits,
            "boxes": output.detection.boxes_cxcywh,
        }
        if batch.regions is not None:
            suspects["teacher embeddings"] = batch.regions.embeddings
        weights = dict(self.student.named_parameters())
        first = next(
            (name for name, value in (weights | suspects).items() if not value.isfinite().all()),
            next((f"gradient of {n}" for n, w in weights.items()
                  if w.grad is not None and not w.grad.isfinite().all()), "none"),
        )  # fmt: skip
        return (
            f"the loss or its gradient is not finite (parts: {', '.join(bad_parts) or 'none'}; "
            f"first bad tensor: {first}; images {list(batch.images.image_ids)}); the weights were "
            "left as they were. Look at these images, or lower optim.lr"
        )


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
