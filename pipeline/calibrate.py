"""How long a cache will take: every stage tried on a few images of two shards, nothing written."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import torch

from cache.plan import Plan
from dkdetr.data.image_files import UnreadableImageError
from dkdetr.data.loader import loader_processes
from dkdetr.data.prompts import fill_prompt
from dkdetr.data.splits import Split, load_split
from dkdetr.engine.distributed import Ranks, num_ranks, pick_device
from dkdetr.engine.interruption import StopFlag
from dkdetr.errors import DataError
from dkdetr.student.attention_backend import use_backend
from dkdetr.student.build import build_trunk
from pipeline.decoding import (
    Decoder,
    EncodedImage,
    Pixels,
    choose_decoder,
    decode_on_device,
)
from pipeline.fit import fit_plan, proposing_backend
from pipeline.fit_training import NetworkTraining, StateFile
from pipeline.pre_checks import check_settings, check_source, check_trainable, check_words
from pipeline.price import (
    CachePrice,
    StagePrice,
    plan_cache,
    price_of,
    price_of_proposals,
    require_room,
)
from pipeline.proposal_network import NetworkProposals
from pipeline.proposal_sources import (
    NETWORK_FILE,
    ProposalSpec,
    open_source,
    prepare_source,
)
from pipeline.proposals import ProposalRule, ProposalSource, SourceImage, apply_rule
from pipeline.readable_images import READ_THREADS, read_or_leave
from pipeline.request import CacheRequest
from pipeline.shard_worker import PendingImage, crops_of
from pipeline.teacher import load_teacher, teacher_embed_dim
from pipeline.teacher_model import Teacher

_IMAGES_A_SHARD = 4
_TEXTS = 64
_Read = tuple[int, Pixels | EncodedImage]
"""An image's id, and its pixels or what a device has to decode."""


@dataclass(frozen=True)
class _ShardRates:
    """Seconds that an image of the sample took, and how many crops it gave, in the mean."""

    read: float
    """In one of the threads, which decode too where Pillow does."""
    decode: float
    """Of the one thread that lets a device decode; 0 where Pillow does."""
    propose: float
    cut: float
    encode_crop: float
    crops: float
    num_images: int

    @property
    def per_image(self) -> float:
        """Returns an image's seconds in a worker, whose threads read and decode ahead meanwhile."""
        busy = self.propose + self.cut + self.crops * self.encode_crop
        return max(self.read / READ_THREADS, self.decode, busy)


def price_cache(request: CacheRequest) -> CachePrice:
    """Returns what a cache would cost, in crops, bytes and time; writes nothing.

    Of the network of `fit` alone, if that is what is asked for. Under torchrun one rank asks for
    all: `fit` is theirs together. Where the teacher's weights are not at hand the times are left
    out, and the price says so.

    Raises:
        DiskFullError: there is not enough room.
        DkdetrError, CacheError: what the command itself would be refused for, but for what only
            the pictures' content or a network still to be trained can tell.
    """
    spec = check_words(request)
    split = load_split(request.split, request.data_root)
    split.require_images()
    check_trainable(request, split, spec)
    price = price_of(request, split, spec, teacher_embed_dim(request.teacher))
    device = pick_device(request.device)
    if request.only_proposals:
        return _price_of_proposals(request, split, price, device)
    require_room(request, price)
    with tempfile.TemporaryDirectory() as folder:
        source = _source(request, split, spec, device, Path(folder))
    check_source(source, split, request)
    try:
        teacher = load_teacher(
            request.teacher, device, precision=request.precision, encoder=request.encoder
        )
    except DataError as error:
        return replace(price, calibration=f"not measured: {error}")
    check_settings(request, split, spec, teacher)
    fit_seconds = _time_fit(request, split, device) if price.fit_iterations else 0.0
    decoder = choose_decoder(request.decoder, device)
    rates = _time_shards(request, split, source, teacher, decoder)
    workers = max(1, request.executor.workers)
    crops = min(price.max_crops, ceil(rates.crops * price.num_images))
    where = "a worker" if request.executor.scheduler else f"{workers} worker(s)"
    fit, _, text = price.work()
    stages = (
        replace(fit, seconds=fit_seconds * price.fit_iterations) if price.fit_iterations else fit,
        StagePrice(
            "shards",
            f"about {crops:,} crops (at most {price.max_crops:,}) in {price.num_shards} shards, "
            f"{where}",
            rates.per_image * price.num_images / workers,
        ),
        replace(text, seconds=_time_text(request, split, teacher) * price.num_texts),
    )
    calibration = (
        f"measured here on {rates.num_images} images of two shards and "
        f"{request.crops_at_once(device)} of their crops, {device}, decoded by {decoder}; without "
        "the neighbour lists"
    )
    return replace(price, stages=stages, calibration=calibration)


def _price_of_proposals(
    request: CacheRequest, split: Split, price: CachePrice, device: torch.device
) -> CachePrice:
    """Returns the price of the network alone, timed if it is still to be trained."""
    trunk = build_trunk(fit_plan(request, split).config.student, load_weights=False)
    num_bytes = sum(each.numel() * each.element_size() for each in trunk.state_dict().values())
    price = price_of_proposals(price, num_bytes)
    if not price.fit_iterations:
        return replace(price, calibration="nothing to measure")
    (fit,) = price.work()
    fit = replace(fit, seconds=_time_fit(request, split, device) * price.fit_iterations)
    return replace(price, stages=(fit,), calibration=f"measured here on two steps, {device}")


def _time_fit(request: CacheRequest, split: Split, device: torch.device) -> float:
    """Returns the seconds of a training step with its loader processes at work.

    Tried is one part of this rank's share, as many images at once as in the training; what ranks
    wait for each other is left out.
    """
    config, ranks = fit_plan(request, split).config, num_ranks()
    parts = config.compute.micro_batches
    one_part = replace(config.data, batch_size=config.data.batch_size // (ranks * parts), workers=0)
    here = replace(config, data=one_part, compute=replace(config.compute, micro_batches=1))
    alone = Ranks(rank=0, world_size=1, device=device)
    nowhere = StateFile(request.out / "nowhere", "")
    load, step = NetworkTraining(here, split, nowhere, alone, StopFlag()).time_step()
    workers = loader_processes(config.data.workers)
    return parts * (max(step, load / workers) if workers else load + step)


def _time_shards(
    request: CacheRequest,
    split: Split,
    source: ProposalSource,
    teacher: Teacher,
    decoder: Decoder,
) -> _ShardRates:
    plan = plan_cache(split, request, teacher.embed_dim, crop_batch=0)
    started = time.monotonic()
    sample = _sample(split, plan, decoder)
    read = time.monotonic() - started
    if not _decoded(sample, teacher.device):  # a device's first batch takes memory, too
        raise DataError(f"{split.name}: no image of the first shards can be read")
    started = time.monotonic()
    pictures = _decoded(sample, teacher.device)
    read, decode = read / len(pictures), (time.monotonic() - started) / len(pictures)
    source.propose(pictures[: request.image_batch])
    _finish(teacher.device)
    started = time.monotonic()
    found = source.propose(pictures)
    _finish(teacher.device)
    propose = (time.monotonic() - started) / len(pictures)
    rule, kept = teacher.resolve(request.crops), ProposalRule(keep=request.keep)
    started = time.monotonic()
    pending: list[PendingImage] = []
    for picture, raw in zip(pictures, found, strict=True):
        height, width = picture.pixels.shape[:2]
        image = split.image_of(picture.image_id)
        proposals = apply_rule(raw, kept, height=height, width=width)
        pending.append(PendingImage(image, proposals, split.base_boxes(picture.image_id)))
    crops = list(crops_of(pictures, pending, teacher, rule))
    _finish(teacher.device)
    cut = (time.monotonic() - started) / len(pictures)
    counts = [len(stack) for stack in crops]
    batch = _fill_batch(torch.cat(crops), request.crops_at_once(teacher.device))
    teacher.crop_features(batch)
    started = time.monotonic()
    teacher.crop_features(batch)
    encode = (time.monotonic() - started) / len(batch)
    crops_an_image = float(np.mean(counts))
    return _ShardRates(read, decode, propose, cut, encode, crops_an_image, len(pictures))


def _sample(split: Split, plan: Plan, decoder: Decoder) -> list[_Read]:
    """Returns the first readable images of the first shard and of one in the middle."""
    found: list[_Read] = []
    for shard in sorted({0, plan.num_shards // 2}):
        wanted = len(found) + _IMAGES_A_SHARD
        for image_id in plan.shard_image_ids(shard):
            if len(found) == wanted:
                break
            try:
                found.append((image_id, read_or_leave(split, split.image_of(image_id), decoder)))
            except (UnreadableImageError, OSError):
                continue
    return found


def _decoded(sample: Sequence[_Read], device: torch.device) -> list[SourceImage]:
    """Returns the pictures; what was left for a device is decoded by it, all at once."""
    decoded = decode_on_device([image for _, image in sample], device)
    pictures = [
        SourceImage(image_id, pixels)
        for (image_id, _), pixels in zip(sample, decoded, strict=True)
        if not isinstance(pixels, UnreadableImageError)
    ]
    _finish(device)
    return pictures


def _source(
    request: CacheRequest, split: Split, spec: ProposalSpec, device: torch.device, folder: Path
) -> ProposalSource:
    """Returns the proposals' source; an untrained network, as fast, stands for one to train."""
    if spec.trains and (request.out / NETWORK_FILE).is_file():
        spec = ProposalSpec("fit", str(request.out))
    if not spec.trains:
        prepared, backend = prepare_source(spec, folder, split), proposing_backend(request, split)
        return open_source(prepared, device, batch_size=request.image_batch, backend=backend)
    config = fit_plan(request, split).config
    untrained = build_trunk(config.student, load_weights=False)
    use_backend(untrained, config.ops.backend, device)
    return NetworkProposals(
        untrained.to(device),
        image_size=config.data.image_size,
        batch_size=request.image_batch,
        source="fit",
        names=(),
        details={},
    )


def _fill_batch(crops: torch.Tensor, size: int) -> torch.Tensor:
    return crops.repeat(ceil(size / len(crops)), 1, 1, 1)[:size]


def _time_text(request: CacheRequest, split: Split, teacher: Teacher) -> float:
    templates = request.prompt_templates()
    names = [category.name for category in split.categories]
    texts = [fill_prompt(template, name) for template in templates for name in names][:_TEXTS]
    teacher.encode_texts(texts[:1])
    started = time.monotonic()
    teacher.encode_texts(texts)
    return (time.monotonic() - started) / len(texts)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
