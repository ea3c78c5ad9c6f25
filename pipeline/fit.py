"""`--proposals fit`: trains a proposal network on base boxes; so a first cache needs no student.

It learns what the student's own first stage learns, class-agnostic: each base object teaches one
token, by focal loss and box losses. That one-to-one rule is what keeps duplicates out of the first
ranks; targets that grade every token by its overlap were measured and found fewer objects, novel
ones too (README.md).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cache.layout import CACHE_FILE
from dkdetr.atomic_file import write_bytes
from dkdetr.config import DetectionLossConfig, ExperimentConfig
from dkdetr.data.loader import make_training_loader
from dkdetr.data.splits import Split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.start import experiment_of_split
from dkdetr.errors import MismatchError, NonFiniteLossError
from dkdetr.experiment_file import load_experiment
from dkdetr.losses.detection import box_giou_loss, box_l1_loss, focal_loss
from dkdetr.losses.matcher import MatchingCosts, match
from dkdetr.progress import progress
from dkdetr.structures import EncoderOutput, Targets
from dkdetr.student.build import build_trunk
from dkdetr.student.detector import ProposingTrunk
from pipeline.proposal_network import load_network, save_network
from pipeline.proposal_sources import NETWORK_FILE
from pipeline.request import CacheRequest
from pipeline.source_images import ImageCheck, check_images, without_images

_STATE_FILE = "proposals/fit_state.safetensors"
_MAX_BATCH = 16
_MIN_EPOCHS = 2
_WARMUP_SHARE = 0.1
_LR_FACTOR = 2.5


@dataclass(frozen=True)
class FitPlan:
    """How the network is trained: the experiment's own settings, shortened."""

    config: ExperimentConfig
    num_iterations: int


def fit_plan(request: CacheRequest, split: Split) -> FitPlan:
    """Returns the training that `--proposals fit` means for a split.

    A sixth of the experiment's epochs (at least 2) without distillation, in batches of at most 16
    with the learning rate scaled to them, times 2.5: without a decoder and over so few steps the
    network bears it and needs it (README.md).
    """
    experiment = request.experiment or experiment_of_split(split.name)
    config = load_experiment(experiment, request.overrides).config
    with_boxes = int((np.diff(split.base_table.offsets) > 0).sum())
    batch_size = max(1, min(config.data.batch_size, _MAX_BATCH, with_boxes))
    epochs = request.fit_epochs or max(_MIN_EPOCHS, ceil(config.optim.epochs / 6))
    lr = _LR_FACTOR * config.optim.lr * batch_size / config.data.batch_size
    config = replace(
        config,
        student=replace(config.student, mask_head=False),
        kd=replace(config.kd, regions_per_image=0),
        data=replace(config.data, batch_size=batch_size),
        compute=replace(config.compute, micro_batches=1),
        optim=replace(config.optim, epochs=epochs, lr=lr),
    )
    return FitPlan(config, epochs * (with_boxes // batch_size))


def fit_proposals(
    request: CacheRequest,
    split: Split,
    images: ImageCheck,
    device: torch.device,
    say: Callable[[str], None],
) -> Path:
    """Returns the trained network's file, CACHE/proposals/network.safetensors.

    A finished one for the same inputs is reused; an unfinished one goes on from its last epoch.

    Raises:
        MismatchError: the cache was made with a network of other inputs.
        NonFiniteLossError: the training diverged.
    """
    path = request.out / NETWORK_FILE
    plan = fit_plan(request, split)
    key = _fit_key(plan, split, images)
    if path.is_file():
        _, facts = load_network(path)
        if facts["key"] == key:
            say(f"proposals: the network in {path} fits, reused")
            return path
        if (request.out / CACHE_FILE).is_file():
            raise MismatchError(
                f"{path} was trained on other inputs or settings, and the cache beside it was "
                "made with it: name another --out, or use it as it is with "
                f"--proposals fit:{request.out}"
            )
    say(
        f"proposals: training a network for {plan.num_iterations} steps of "
        f"{plan.config.data.batch_size} images"
    )
    # A truncated picture is set aside later, by name; here it must only not stop the training.
    readable = without_images(split, check_images(split, decode=True).unreadable)
    trunk = _train(plan, readable, request.out, key, device)
    facts = {
        "key": key,
        "image_size": plan.config.data.image_size,
        "seen": {
            "source": "fit",
            "split": split.name,
            "iterations": plan.num_iterations,
            "backbone_weights": plan.config.student.backbone.weights,
            "novel_boxes": "none: trained on base boxes alone",
        },
    }
    save_network(path, trunk.cpu(), plan.config.student, facts)
    (request.out / _STATE_FILE).unlink(missing_ok=True)
    return path


def proposal_loss(
    encoder: EncoderOutput, targets: Sequence[Targets], settings: DetectionLossConfig
) -> Float[Tensor, ""]:
    """Returns the loss of a batch, divided by its number of objects: the detector's first stage.

    Each object takes the token that is cheapest overall (Hungarian, method A.3); every other valid
    token is background, which the focal loss lets fade once it is easy.
    """
    objects = [Targets(torch.zeros_like(each.labels), each.boxes_cxcywh) for each in targets]
    costs = MatchingCosts(
        cost_class=settings.cost_class,
        cost_bbox=settings.cost_bbox,
        cost_giou=settings.cost_giou,
        focal_alpha=settings.focal_alpha,
        focal_gamma=settings.focal_gamma,
    )
    logits = encoder.objectness_logits
    pairs = match(logits[..., None], encoder.boxes_cxcywh, objects, costs, valid=encoder.valid)
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
    return total / max(1, sum(len(each.labels) for each in targets))


def _train(
    plan: FitPlan, split: Split, out: Path, key: str, device: torch.device
) -> ProposingTrunk:
    config = plan.config
    torch.manual_seed(config.seed)
    trunk = build_trunk(config.student).to(device).train()
    optimizer = make_optimizer(trunk, config.optim)
    first_epoch = _restore(out / _STATE_FILE, key, trunk, optimizer)
    loader = make_training_loader(
        split, _base_vocabulary(split), config, cache_path=None, start_epoch=first_epoch
    )
    per_epoch = max(1, len(loader) // max(1, config.optim.epochs - first_epoch))
    iteration = first_epoch * per_epoch
    total = config.optim.epochs * per_epoch
    with progress("fitting proposals", total, done=iteration) as advance:
        for batch in loader:
            if iteration % per_epoch == 0:
                # Dropout's draws: a resumed epoch must draw as an uninterrupted one.
                torch.manual_seed(config.seed + iteration)
            _set_rate(optimizer, config, iteration / total)
            _, _, encoder = trunk(batch.images.to(device))
            targets = [target.to(device) for target in batch.targets]
            loss = proposal_loss(encoder, targets, config.detection)
            if not torch.isfinite(loss):
                raise NonFiniteLossError(
                    f"the proposal network's loss is not finite at step {iteration}: lower "
                    "optim.lr with --set"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trunk.parameters(), config.optim.clip_norm)
            optimizer.step()
            iteration += 1
            if iteration % per_epoch == 0 and iteration < total:
                _keep(out / _STATE_FILE, key, iteration // per_epoch, trunk, optimizer)
            if iteration % 10 == 0 or iteration == total:
                advance(iteration, f"loss {loss.item():.2f}")
    return trunk.eval()


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


def _fit_key(plan: FitPlan, split: Split, images: ImageCheck) -> str:
    """Returns a hash of all that decides the network's weights."""
    table = split.base_table
    described = json.dumps(
        {
            "student": asdict(plan.config.student),
            "data": {**asdict(plan.config.data), "workers": 0},
            "optim": asdict(plan.config.optim),
            "seed": plan.config.seed,
            "images": images.content_xxh3,
            "loss": asdict(plan.config.detection),
        },
        sort_keys=True,
    )
    digest = hashlib.sha256(described.encode())
    for array in (table.offsets, table.boxes_xyxy, table.category_ids):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _keep(path: Path, key: str, epoch: int, trunk: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Writes what the next epoch starts from."""
    tensors = {f"trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    moments: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    for number, entries in moments.items():
        tensors.update({f"optimizer.{number}.{name}": value for name, value in entries.items()})
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata={"key": key, "epoch": str(epoch)}))


def _restore(path: Path, key: str, trunk: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """Returns the epoch to start with; 0 if there is no state of this very training."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            if described.get("key") != key:
                return 0
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return 0
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
    return int(described["epoch"])
