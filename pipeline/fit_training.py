"""The training loop of `fit`: on one process or several, stopped and resumed at any step.

What a step draws and sees is a function of the seed, its number and the rank, so a training that
was stopped anywhere ends in the same bits as one that was not. On several ranks the losses are
divided by the mean number of objects, so that the gradients' mean over ranks is one process's.
With `compute.micro_batches` a rank takes its share in parts, whose gradients add up to the share's.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import cos, pi
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dkdetr.atomic_file import write_bytes
from dkdetr.config import DetectionLossConfig, ExperimentConfig
from dkdetr.data.device_views import on_device, settle_views
from dkdetr.data.loader import BatchStream, batches_per_epoch, make_training_loader
from dkdetr.data.samplers import derive_seed
from dkdetr.data.splits import Split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.interruption import StopFlag
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.student_setup import recompute_layers, wrap_for_ranks
from dkdetr.errors import NonFiniteLossError, PreemptedError, UsageError
from dkdetr.losses.criterion import count_boxes
from dkdetr.losses.detection import box_giou_loss, box_l1_loss, focal_loss
from dkdetr.losses.matcher import match
from dkdetr.losses.matching_cost import MatchingCosts
from dkdetr.precision import float32_products
from dkdetr.progress import progress
from dkdetr.structures import EncoderOutput, LoadedBatch, Targets
from dkdetr.student.attention_backend import use_backend
from dkdetr.student.build import build_trunk
from dkdetr.student.detector import ProposingTrunk
from pipeline.fit_memory import wants_recomputing

_WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class StateFile:
    """Where an unfinished training is kept, and which training it is."""

    path: Path
    key: str

    def why_not(self) -> str | None:
        """Returns why the state that lies there is not gone on from; None if it is, or none is."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                key = (file.metadata() or {}).get("key")
        except SafetensorError:
            return "cannot be read"
        return None if key == self.key else "is of other settings or inputs"


class NetworkTraining:
    """A proposal network in training.

    Args:
        config: the experiment, shortened (`fit.fit_plan`).
        split: whose base boxes are learned, without unreadable images.
        state: where to go on from, and to.
        ranks: this process among the others.
        stop: set by SIGTERM.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        split: Split,
        state: StateFile,
        ranks: Ranks,
        stop: StopFlag,
    ) -> None:
        refuse_impossible(config, world_size=ranks.world_size)
        self._config = settle_views(config, ranks.device)
        self._split, self._state = split, state
        self._ranks, self._stop = ranks, stop
        torch.manual_seed(config.seed)
        self.trunk = build_trunk(config.student).to(ranks.device).train()
        use_backend(self.trunk, config.ops.backend, ranks.device)
        at_once = config.data.batch_size // (ranks.world_size * config.compute.micro_batches)
        self.recomputes = wants_recomputing(config, at_once, ranks.device)
        if self.recomputes:
            recompute_layers(self.trunk.encoder.layers)
        self._optimizer = make_optimizer(self.trunk, config.optim)
        self._vocabulary = _base_vocabulary(split)
        self._per_epoch = batches_per_epoch(split, self._vocabulary, config, cache_path=None)
        self._iteration = _restore(state, self.trunk, self._optimizer)
        if ranks.any(self._iteration != round(float(ranks.mean(self._position())))):
            raise UsageError(
                f"the ranks find different states of the training in '{state.path}': the cache's "
                "folder must lie where all machines see the same files"
            )

    @property
    def num_iterations(self) -> int:
        """Returns the steps of the whole training."""
        return self._config.optim.epochs * self._per_epoch

    def run(self) -> ProposingTrunk:
        """Returns the trained network, in evaluation mode.

        Raises:
            PreemptedError: SIGTERM came to some rank; the state is kept.
            NonFiniteLossError: the training diverged.
        """
        epoch, batch = divmod(self._iteration, self._per_epoch)
        loader = make_training_loader(
            self._split,
            self._vocabulary,
            self._config,
            cache_path=None,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            start_epoch=epoch,
            start_batch=batch,
            pin_memory=self._ranks.device.type == "cuda",
        )
        try:
            self._train(wrap_for_ranks(self.trunk, self._ranks), loader)
        except (RuntimeError, EOFError, OSError):
            # A SIGTERM for the whole group ends the loader's processes too.
            if not self._stop.is_set or self._ranks.world_size > 1:
                raise
            self._preempt()
        return self.trunk.eval()

    def _train(self, model: nn.Module, loader: BatchStream[LoadedBatch]) -> None:
        total, parts = self.num_iterations, self._config.compute.micro_batches
        batches = iter(loader)
        kept_at = time.monotonic()
        quiet = not self._ranks.is_first
        with progress("fitting proposals", total, done=self._iteration, quiet=quiet) as advance:
            while group := list(islice(batches, parts)):
                loss = self._step(model, group)
                self._iteration += 1
                if self._ranks.any(self._stop.is_set):
                    self._preempt()
                late = time.monotonic() - kept_at > self._config.checkpoint_every_s
                # Clocks differ between ranks; the first one's decides.
                due = self._ranks.any(late and self._ranks.is_first)
                if self._iteration < total and (due or self._iteration % self._per_epoch == 0):
                    self._keep()
                    kept_at = time.monotonic()
                if self._iteration % 10 == 0 or self._iteration == total:
                    advance(self._iteration, f"loss {loss.item():.2f}")

    def time_step(self) -> tuple[float, float]:
        """Returns the seconds of loading a part of a batch here and of a step on it alone.

        Both are taken of a second one, after a first has warmed everything up. Spoils the network.
        """
        loading = stepping = 0.0
        loader = make_training_loader(self._split, self._vocabulary, self._config, cache_path=None)
        asked = time.monotonic()
        for batch, _ in zip(loader, range(2), strict=False):
            got = time.monotonic()
            self._step(self.trunk, [batch]).item()
            loading, stepping = got - asked, time.monotonic() - got
            asked = time.monotonic()
        return loading, stepping

    def _step(self, model: nn.Module, group: Sequence[LoadedBatch]) -> Tensor:
        with float32_products("tf32", self._ranks.device):
            return self._float32_step(model, group)

    def _float32_step(self, model: nn.Module, group: Sequence[LoadedBatch]) -> Tensor:
        """Returns the loss of a batch, whose parts are given; the weights have moved."""
        config, device = self._config, self._ranks.device
        _set_rate(self._optimizer, config, self._iteration / self.num_iterations)
        # Every part is divided by the objects of them all: so the parts add up to the whole.
        count = count_boxes([each for part in group for each in part.targets], device)
        num_objects = self._ranks.mean(count)
        self._optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for number, part in enumerate(group):
            # Dropout's draws: a resumed step must draw as an uninterrupted one, and k parts draw
            # as k ranks do.
            place = self._ranks.rank * len(group) + number
            torch.manual_seed(derive_seed("fit", config.seed, self._iteration, place))
            with _exchange(model, last=number == len(group) - 1):
                batch = on_device(part, device)
                _, _, encoder = model(batch.images)
                loss = proposal_loss(
                    encoder, batch.targets, config.detection, num_objects=num_objects
                )
                if self._ranks.any(not bool(torch.isfinite(loss))):
                    raise NonFiniteLossError(
                        f"the proposal network's loss is not finite at step {self._iteration}: "
                        "lower optim.lr with --set"
                    )
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.trunk.parameters(), config.optim.clip_norm)
        self._optimizer.step()
        return total

    def _position(self) -> Tensor:
        return torch.tensor(float(self._iteration), device=self._ranks.device)

    def _preempt(self) -> NoReturn:
        self._keep()
        raise PreemptedError(
            f"stopped by SIGTERM at step {self._iteration:,} of {self.num_iterations:,} of the "
            "proposal network; it is saved, and the same command goes on from there"
        )

    def _keep(self) -> None:
        """Writes what the next step starts from."""
        if self._ranks.is_first:
            _write_state(self._state, self._iteration, self.trunk, self._optimizer)
        self._ranks.wait()


def proposal_loss(
    encoder: EncoderOutput,
    targets: Sequence[Targets],
    settings: DetectionLossConfig,
    *,
    num_objects: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Returns the loss of a batch, divided by `num_objects`: the detector's first stage.

    Each object takes the token that is cheapest overall (Hungarian, method A.3); every other valid
    token is background, which the focal loss lets fade once it is easy.
    """
    costs = MatchingCosts(
        cost_class=settings.cost_class,
        cost_bbox=settings.cost_bbox,
        cost_giou=settings.cost_giou,
        focal_alpha=settings.focal_alpha,
        focal_gamma=settings.focal_gamma,
    )
    logits = encoder.objectness_logits
    pairs = match(logits[..., None], encoder.boxes_cxcywh, targets, costs, valid=encoder.valid)
    wanted = torch.zeros_like(logits)
    wanted[pairs.image_index, pairs.query_index] = 1.0
    objectness = focal_loss(
        logits.float(),
        wanted,
        alpha=settings.focal_alpha,
        gamma=settings.focal_gamma,
        weights=encoder.valid.float(),
    )
    boxes = encoder.boxes_cxcywh[pairs.image_index, pairs.query_index]
    aims = torch.cat([each.boxes_cxcywh for each in targets])[pairs.target_index]
    total = (
        settings.weight_class * objectness
        + settings.weight_bbox * box_l1_loss(boxes, aims)
        + settings.weight_giou * box_giou_loss(boxes, aims)
    )
    return total / num_objects.clamp(min=1)


def refuse_impossible(config: ExperimentConfig, *, world_size: int) -> None:
    """Raises UsageError if batches do not divide by the ranks and their parts."""
    batch_size, parts = config.data.batch_size, config.compute.micro_batches
    if batch_size % (world_size * parts):
        by: list[str] = []
        ways: list[str] = []
        if world_size > 1:
            by.append(f"{world_size} ranks")
            ways.append("start fewer ranks, or a number that divides them")
        if parts > 1:
            by.append(f"{parts} micro-batches")
            ways.insert(0, "lower compute.micro_batches")
        raise UsageError(
            f"fit's batches of {batch_size} images do not divide by {' of '.join(by)}: "
            f"{', or '.join(ways)}"
        )


def _exchange(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Lets DDP exchange gradients after the last part only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def _set_rate(optimizer: torch.optim.AdamW, config: ExperimentConfig, share: float) -> None:
    """Sets a linear warm-up over the first tenth, then a cosine to zero: short runs want it."""
    factor = min(1.0, share / _WARMUP_SHARE + 0.01) * 0.5 * (1 + cos(pi * share))
    for group in optimizer.param_groups:
        group["lr"] = config.optim.lr * group["lr_scale"] * factor


def _base_vocabulary(split: Split) -> Vocabulary:
    """Returns the base names with placeholder vectors: the loader wants labels, no text."""
    base = [category for category in split.categories if category.is_base]
    return Vocabulary(
        names=tuple(category.name for category in base),
        category_ids=tuple(category.category_id for category in base),
        is_base=(True,) * len(base),
        frequencies=tuple(category.frequency for category in base),
        prompts=(),
        teacher="none",
        embeddings=np.ones((len(base), 1), dtype=np.float32),
    )


def _write_state(
    state: StateFile, iteration: int, trunk: nn.Module, optimizer: torch.optim.AdamW
) -> None:
    tensors = {f"trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    moments: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    for number, entries in moments.items():
        tensors.update({f"optimizer.{number}.{name}": value for name, value in entries.items()})
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(state.path, save(whole, metadata={"key": state.key, "iteration": str(iteration)}))


def _restore(state: StateFile, trunk: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """Returns the step to start with; 0 if there is no state of this very training."""
    if not state.path.is_file() or state.why_not():
        return 0
    with safe_open(state.path, framework="pt") as file:
        described = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    trunk.load_state_dict(
        {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("trunk.")}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, entry = rest.partition(".")
            moments.setdefault(int(number), {})[entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return int(described["iteration"])
