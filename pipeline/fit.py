"""`--proposals fit`: trains a proposal network on base boxes; so a first cache needs no student.

It learns what the student's own first stage learns, class-agnostic: each base object teaches one
token, by focal loss and box losses. That one-to-one rule is what keeps duplicates out of the first
ranks; targets that grade every token by its overlap were measured and found fewer objects, novel
ones too (README.md).

Under torchrun every rank trains; the first one alone looks at the files, decides and writes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from cache.beginning import repair_goal
from cache.layout import CACHE_FILE, load_provenance
from cache.lock import Lease
from cache.spec import CorruptCacheError
from dkdetr.config import ExperimentConfig
from dkdetr.data.splits import Split
from dkdetr.engine.distributed import Ranks, join_ranks
from dkdetr.engine.interruption import stop_on_sigterm
from dkdetr.engine.start import experiment_of_split
from dkdetr.errors import CorruptArtefactError, MismatchError
from dkdetr.experiment_file import HASHED_AS, load_experiment
from dkdetr.student.attention_backend import Backend
from pipeline.fit_ranks import PATIENCE_S, FirstRankError, share_from_first
from pipeline.fit_training import NetworkTraining, StateFile, refuse_impossible
from pipeline.proposal_network import load_network, save_network
from pipeline.proposal_sources import NETWORK_FILE, REMADE_FILE, parse_proposals
from pipeline.request import CacheRequest
from pipeline.source_images import ImageCheck, check_images, require_few, without_images

_STATE_FILE = "proposals/fit_state.safetensors"
_MAX_BATCH = 16
_MIN_EPOCHS = 2
_LR_FACTOR = 2.5
_ANY_EXPERIMENT = "own_r50"
"""All have `ops.backend`."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class FitPlan:
    """How the network is trained: the experiment's own settings, shortened."""

    config: ExperimentConfig
    num_iterations: int


def fit_plan(request: CacheRequest, split: Split) -> FitPlan:
    """Returns the training that `--proposals fit` means for a split.

    A sixth of the experiment's epochs (at least 2) without distillation, in batches of at most 16
    with the learning rate scaled to them, times 2.5: without a decoder and over so few steps the
    network bears it and needs it (README.md). Micro-batches are those of `--set` alone; whether
    they divide the batches is asked where it trains (`fit_training.refuse_impossible`).
    """
    experiment = request.experiment or experiment_of_split(split.name)
    resolved = load_experiment(experiment, request.overrides)
    config = resolved.config
    with_boxes = int((np.diff(split.base_table.offsets) > 0).sum())
    batch_size = max(1, min(config.data.batch_size, _MAX_BATCH, with_boxes))
    epochs = request.fit_epochs
    if epochs is None:
        epochs = max(_MIN_EPOCHS, ceil(config.optim.epochs / 6))
    lr = _LR_FACTOR * config.optim.lr * batch_size / config.data.batch_size
    # Those of an experiment file are parts of `train`'s larger batches.
    typed = resolved.origins.get("compute.micro_batches") == "--set"
    parts = config.compute.micro_batches if typed else 1
    config = replace(
        config,
        student=replace(config.student, mask_head=False),
        kd=replace(config.kd, regions_per_image=0),
        data=replace(config.data, batch_size=batch_size),
        compute=replace(config.compute, micro_batches=parts),
        optim=replace(config.optim, epochs=epochs, lr=lr),
    )
    return FitPlan(config, epochs * (with_boxes // batch_size))


def proposing_backend(request: CacheRequest, split: Split) -> Backend:
    """Returns the code of a network's attention where it proposes (`ops.backend`).

    Where nothing is trained no experiment is asked for, and `--set` alone says it.

    Raises:
        ConfigError: no such code.
    """
    spec = parse_proposals(request.proposals)
    if spec.trains:
        return fit_plan(request, split).config.ops.backend
    return load_experiment(_ANY_EXPERIMENT, request.overrides).config.ops.backend


def fit_proposals(
    request: CacheRequest,
    split: Split,
    images: ImageCheck | None,
    say: Say,
    *,
    anew: bool = False,
) -> Path:
    """Returns the trained network's file, CACHE/proposals/network.safetensors.

    A finished one for the same inputs is reused; an unfinished one goes on from its last step. All
    ranks of a torchrun call this; those behind the first need no `images`.

    Args:
        request: of the cache.
        split: whose base boxes teach it.
        images: what is known of its files.
        say: told in a line what is going on.
        anew: the one that is there is lost; trains another beside it, proposals/remade.safetensors.

    Raises:
        CorruptArtefactError: there is one that cannot be read.
        DataError: more pictures cannot be read than the cache will be allowed to leave out.
        MismatchError: the cache was made with a network of other inputs.
        NonFiniteLossError: the training diverged.
        PreemptedError: SIGTERM came; what was trained is kept.
        UsageError: its batches do not divide by the ranks and their parts.
        FirstRankError: on every other rank, where the first one failed before the training.
    """
    path = request.out / (REMADE_FILE if anew else NETWORK_FILE)
    plan = fit_plan(request, split)
    with join_ranks(request.device, timeout_s=PATIENCE_S) as ranks:
        if not ranks.is_first:
            order = share_from_first(ranks, None)
            if order["do"] == "fail":
                raise FirstRankError(int(order["exit_code"]))
            if order["do"] == "train":
                readable = without_images(split, dict.fromkeys(order["unreadable"], ""))
                state = StateFile(request.out / _STATE_FILE, order["key"])
                with stop_on_sigterm() as stop:
                    NetworkTraining(plan.config, readable, state, ranks, stop).run()
                ranks.wait()
            return path
        assert images is not None
        key = _fit_key(plan, split, images)
        with ExitStack() as stack:
            with _or_tell_the_others(ranks):
                request.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(Lease(request.out))
                reused = _remade(path, key, say) if anew else _reuse(request, path, key, say)
                if not reused:
                    refuse_impossible(plan.config, world_size=ranks.world_size)
                # A truncated picture is set aside later, by name; it must not stop the training.
                unreadable = {} if reused else check_images(split, decode=True).unreadable
                # But what the shards would be refused for is told before hours of training.
                require_few(
                    unreadable,
                    len(split.images),
                    request.max_bad,
                    fetched_again="type the same command: nothing was trained yet",
                )
            if reused:
                share_from_first(ranks, {"do": "reuse"})
                return path
            share_from_first(ranks, {"do": "train", "key": key, "unreadable": [*unreadable]})
            say(
                f"proposals: training a network for {plan.num_iterations:,} steps of "
                f"{plan.config.data.batch_size} images on {ranks.world_size} "
                + ("ranks" if ranks.world_size > 1 else "process")
            )
            readable = without_images(split, unreadable)
            state = StateFile(request.out / _STATE_FILE, key)
            if why := state.why_not():
                say(
                    f"proposals: the unfinished training in {state.path} {why}: this one starts at "
                    "step 0 and will overwrite it"
                )
            with stop_on_sigterm() as stop:
                training = NetworkTraining(plan.config, readable, state, ranks, stop)
                if training.recomputes and not plan.config.compute.activation_checkpointing:
                    say("proposals: the GPU has little memory, encoder layers are computed twice")
                trunk = training.run()
            facts = {"key": key, "image_size": plan.config.data.image_size,
                     "seen": _seen(plan, split, training.num_iterations)}  # fmt: skip
            save_network(path, trunk.cpu(), plan.config.student, facts)
            state.path.unlink(missing_ok=True)
            ranks.wait()
    return path


@contextmanager
def _or_tell_the_others(ranks: Ranks) -> Iterator[None]:
    """Lets an error pass, after the other ranks, which wait for orders, have heard of it."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        share_from_first(ranks, {"do": "fail", "exit_code": code})
        raise


def _remade(path: Path, key: str, say: Say) -> bool:
    """Returns True if a repair that came to no end has trained the network of the same inputs."""
    try:
        return path.is_file() and load_network(path)[1]["key"] == key
    except CorruptArtefactError as error:
        say(f"{error}; trained anew")
        return False


def _reuse(request: CacheRequest, path: Path, key: str, say: Say) -> bool:
    """Returns True if there is a finished network of the same inputs."""
    if not path.is_file():
        return False
    # A repair that was cut short may have taken the head out.
    has_cache = (request.out / CACHE_FILE).is_file() or bool(repair_goal(request.out))
    try:
        _, facts = load_network(path)
    except CorruptArtefactError as error:
        mended = "delete it, and the same command trains it anew"
        if has_cache and _knows_its_request(request.out):
            mended = f"dkdetr cache repair {request.out} trains it anew"
        raise CorruptArtefactError(f"{error}; next: {mended}") from None
    if facts["key"] == key:
        say(f"proposals: the network in {path} fits, reused")
        return True
    if has_cache:
        raise MismatchError(
            f"{path} was trained on other inputs or settings, and the cache beside it was "
            "made with it: name another --out, or use it as it is with "
            f"--proposals fit:{request.out}"
        )
    return False


def _knows_its_request(cache: Path) -> bool:
    """Returns True if a repair can tell how the cache was made."""
    try:
        return "request" in load_provenance(cache)
    except (FileNotFoundError, CorruptCacheError):
        return False


def _seen(plan: FitPlan, split: Split, iterations: int) -> dict[str, Any]:
    return {
        "split": split.name,
        "iterations": iterations,
        "backbone_weights": plan.config.student.backbone.weights,
        "names": [category.name for category in split.categories if category.is_base],
    }


def _fit_key(plan: FitPlan, split: Split, images: ImageCheck) -> str:
    """Returns a hash of all that decides the network's weights."""
    table = split.base_table
    described = json.dumps(
        {
            "student": asdict(plan.config.student)
            | {"masks_at_once": HASHED_AS["student.masks_at_once"]},
            "data": asdict(plan.config.data)
            | {"workers": 0, "cache_mode": HASHED_AS["data.cache_mode"]},
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
