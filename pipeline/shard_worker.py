"""Makes one shard: read, propose, crop, embed, commit. Runs in this process or in a Dask worker.

Everything a shard's bytes depend on is in the job and in the plan, never in who makes it or when:
images are read in the plan's order, proposed for and embedded in batches of fixed composition.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8

from cache.layout import Head, load_plan
from cache.plan import Plan
from cache.rows import ImageRows
from cache.spec import diff_parts
from cache.writer import commit_shard
from dkdetr.boxes import pairwise_iou
from dkdetr.data.annotations import Boxes, ImageInfo
from dkdetr.data.splits import Split, load_split
from dkdetr.engine.allocator import keep_freed_memory
from dkdetr.engine.distributed import pick_device
from dkdetr.errors import MismatchError
from dkdetr.student.attention_backend import Backend
from pipeline.canary import check_canary
from pipeline.crops import CropRule, combine_crops, crop_windows
from pipeline.decoding import Decoder, choose_decoder
from pipeline.encode_stream import BusyClock, embed_stream
from pipeline.fingerprint import split_parts
from pipeline.picture_upload import on_device
from pipeline.proposal_sources import open_source
from pipeline.proposals import ProposalRule, Proposals, ProposalSource, SourceImage, apply_rule
from pipeline.readable_images import readable_images
from pipeline.resampling import resampling_on
from pipeline.teacher import Precision, load_teacher
from pipeline.teacher_model import Encoder, Teacher

_COMPUTING = threading.Lock()


@dataclass(frozen=True)
class ShardJob:
    """What a worker must know to make any shard of a cache; hashable and picklable."""

    cache_path: Path
    fingerprint: str
    """The cache's. Workers outlive commands, and files change under one path."""
    split: str
    data_root: Path
    teacher: str
    teacher_identity: str
    precision: Precision
    encoder: Encoder
    decoder: Decoder
    device: str
    resampling: str
    """The way that the cache's fingerprint records; see pipeline.resampling."""
    canary: str
    proposals: str
    """A prepared source: see pipeline.proposal_sources."""
    ops_backend: Backend
    proposal_rule: ProposalRule
    crop_rule: CropRule
    crop_batch: int
    image_batch: int
    threads: int
    """Torch threads of a worker process; 0 leaves torch's own choice."""


@dataclass(frozen=True)
class ShardTimes:
    """Seconds of a shard's embedding: in all, of the encoder's device, waiting for pictures."""

    whole: float
    encoder: float
    reading: float


def busy_note(times: Sequence[ShardTimes]) -> str:
    """Returns how busy the encoder's device was over some shards, in a few words."""
    whole = sum(each.whole for each in times)
    encoder, reading = (
        sum(getattr(each, part) for each in times) / max(whole, 1e-9)
        for part in ("encoder", "reading")
    )
    return f"encoder busy {encoder:.0%}, waiting for pictures {reading:.0%}"


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard: counts, which images could not be used, and the time."""

    num_images: int
    quarantined: tuple[tuple[int, str], ...]
    times: ShardTimes


@dataclass(frozen=True, eq=False)
class MadeShard:
    """A shard that is embedded and not yet written."""

    shard: int
    rows: tuple[ImageRows, ...]
    quarantined: Mapping[int, str]
    times: ShardTimes


@dataclass(frozen=True, eq=False)
class ShardTools:
    """What is built once a process and used for every shard."""

    plan: Plan
    split: Split
    teacher: Teacher
    source: ProposalSource


@dataclass(frozen=True, eq=False)
class PendingImage:
    """An image whose crops are on their way through the teacher."""

    image: ImageInfo
    proposals: Proposals
    base: Boxes


def make_shard(job: ShardJob, shard: int, worker_number: int) -> ShardReport:
    """Returns the report of a shard, now committed. Idempotent.

    A worker with two threads writes one shard while it embeds the next.
    """
    with _COMPUTING:
        tools = tools_of(job, worker_number)
        if job.threads:  # of the calling thread alone
            torch.set_num_threads(job.threads)
        made = embed_images(job, shard, tools)
    return commit(job, made, tools.plan)


def begin_shard(
    job: ShardJob, shard: int, tools: ShardTools, writing: Executor
) -> Future[ShardReport]:
    """Returns the report to come of a shard that is embedded now and being written elsewhere."""
    return writing.submit(commit, job, embed_images(job, shard, tools), tools.plan)


@lru_cache(maxsize=1)
def tools_of(job: ShardJob, worker_number: int) -> ShardTools:
    """Returns the tools of a job, built on the first call in this process.

    Raises:
        MismatchError: this machine's teacher, proposals or split are not those the cache was
            planned with, or another cache lies there by now.
    """
    keep_freed_memory()
    device = worker_device(job.device, worker_number)
    teacher = load_teacher(job.teacher, device, precision=job.precision, encoder=job.encoder)
    if teacher.identity != job.teacher_identity:
        raise MismatchError(
            f"the teacher '{job.teacher}' is {teacher.identity} on this worker and "
            f"{job.teacher_identity} where the cache was planned: give all workers the same weights"
        )
    if resampling_on(device) != job.resampling:
        raise MismatchError(
            f"crops are cut here by '{resampling_on(device)}' and where the cache was planned by "
            f"'{job.resampling}': their pixels differ by grey levels; give all workers the same "
            "device and packages"
        )
    choose_decoder(job.decoder, device)  # it must be here, too
    check_canary(job.canary, teacher, where=f"the cache {job.cache_path}")
    split = load_split(job.split, job.data_root)
    source = open_source(job.proposals, device, batch_size=job.image_batch, backend=job.ops_backend)
    _require_same_inputs(job, split, source)
    return ShardTools(load_plan(job.cache_path), split, teacher, source)


def _require_same_inputs(job: ShardJob, split: Split, source: ProposalSource) -> None:
    head = Head.load(job.cache_path)
    here = {
        "split": split_parts(split),
        "proposals": {**source.identity, **job.proposal_rule.parts()},
    }
    lines = diff_parts({name: head.parts[name] for name in here}, here)
    if head.fingerprint != job.fingerprint:
        lines = [f"fingerprint  cache: {head.fingerprint}  wanted: {job.fingerprint}", *lines]
    if lines:
        raise MismatchError(
            f"this worker's inputs are not those that the cache {job.cache_path} was planned with: "
            f"{'; '.join(lines)}. Give all workers the same files under the same paths and the "
            "same kind of device, or run the cache-teacher command again if they have changed "
            "since it began"
        )


def worker_device(device: str, worker_number: int) -> torch.device:
    """Returns a worker's device: workers of one machine take its GPUs in turn."""
    chosen = pick_device(device)
    if chosen.type == "cuda" and device in {"auto", "cuda"}:
        return torch.device("cuda", worker_number % torch.cuda.device_count())
    return chosen


def embed_images(job: ShardJob, shard: int, tools: ShardTools) -> MadeShard:
    """Returns what a shard's images give; nothing is written yet."""
    plan, teacher, rule = tools.plan, tools.teacher, job.crop_rule
    images = [tools.split.image_of(image_id) for image_id in plan.shard_image_ids(shard)]
    pending: deque[PendingImage] = deque()
    quarantined: dict[int, str] = {}
    started, encoder = time.monotonic(), BusyClock(teacher.device)
    waited = 0.0

    def stacks() -> Iterator[torch.Tensor]:
        nonlocal waited
        chunks = readable_images(
            tools.split, images, quarantined,
            chunk_size=job.image_batch, decoder=job.decoder, device=teacher.device,
        )  # fmt: skip
        while True:
            asked = time.monotonic()
            chunk = next(chunks, None)
            waited += time.monotonic() - asked
            if chunk is None:
                return
            pictures = on_device([picture for _, picture in chunk], teacher.device)
            new: list[PendingImage] = []
            for (image, picture), found in zip(chunk, tools.source.propose(pictures), strict=True):
                height, width = picture.pixels.shape[:2]
                kept = apply_rule(found, job.proposal_rule, height=height, width=width)
                new.append(PendingImage(image, kept, tools.split.base_boxes(image.image_id)))
            pending.extend(new)
            yield from crops_of(pictures, new, teacher, rule)

    encode = encoder.around(teacher.features_on_device)
    rows = [
        rows_of_image(pending.popleft(), features, rule)
        for features in embed_stream(stacks(), encode, batch_size=job.crop_batch)
    ]
    spent = ShardTimes(time.monotonic() - started, encoder.seconds(), waited)
    return MadeShard(shard, tuple(rows), quarantined, spent)


def commit(job: ShardJob, made: MadeShard, plan: Plan) -> ShardReport:
    """Returns the report of a shard, now committed."""
    manifest = commit_shard(
        job.cache_path, made.shard, made.rows,
        quarantined=made.quarantined, plan=plan, fingerprint=job.fingerprint,
    )  # fmt: skip
    return ShardReport(
        num_images=manifest.num_images,
        quarantined=tuple(sorted((int(key), why) for key, why in manifest.quarantined.items())),
        times=made.times,
    )


def crops_of(
    pictures: Sequence[SourceImage],
    images: Sequence[PendingImage],
    teacher: Teacher,
    rule: CropRule,
) -> Iterator[UInt8[torch.Tensor, "_ 3 crop_height crop_width"]]:
    """Yields every crop of each image: proposals and base boxes at all scales, the whole picture.

    Mirrored crops follow: of all of these if views are averaged, of the proposals' if kept.
    """
    windows: list[np.ndarray] = []
    for picture, image in zip(pictures, images, strict=True):
        height, width = picture.pixels.shape[:2]
        boxes = np.concatenate((image.proposals.boxes_xyxy, image.base.boxes_xyxy))
        mine = crop_windows(boxes.astype(np.float32), rule, height=height, width=width)
        windows.append(np.concatenate((mine.reshape(-1, 4), [[0, 0, width, height]])))
    there = on_device(pictures, teacher.device)
    pixels = [torch.as_tensor(picture.pixels).permute(2, 0, 1) for picture in there]
    cut = teacher.cut_pictures(pixels, windows, rule)
    for image, crops in zip(images, cut, strict=True):
        if rule.views == "orig":
            yield crops
            continue
        of_proposals = len(image.proposals.boxes_xyxy) * len(rule.scales)
        mirrored = crops if rule.views == "avg" else crops[:of_proposals]
        yield torch.cat((crops, mirrored.flip(-1)))


def rows_of_image(
    pending: PendingImage, features: Float[np.ndarray, "num_crops embed_dim"], rule: CropRule
) -> ImageRows:
    """Returns what is cached of an image, from the features of `crops_of`."""
    num_regions, num_base = len(pending.proposals.boxes_xyxy), len(pending.base.boxes_xyxy)
    scales, dim = len(rule.scales), features.shape[1]
    of_boxes = scales * (num_regions + num_base)
    by_box = features[:of_boxes].reshape(-1, scales, dim)
    whole = features[of_boxes : of_boxes + 1]
    mirrored = features[of_boxes + 1 :]
    flipped = None
    if rule.views == "avg":
        by_box = np.concatenate((by_box, mirrored[:-1].reshape(-1, scales, dim)), axis=1)
        whole = np.concatenate((whole, mirrored[-1:]))
    elif rule.views == "orig,flip":
        flipped = combine_crops(mirrored.reshape(-1, scales, dim), rule.combine)
    embeddings = combine_crops(by_box, rule.combine)
    return ImageRows(
        image_id=pending.image.image_id,
        image_size_hw=(pending.image.height, pending.image.width),
        boxes_xyxy=pending.proposals.boxes_xyxy,
        objectness=pending.proposals.objectness,
        max_base_iou=max_base_iou(pending.proposals.boxes_xyxy, pending.base.boxes_xyxy),
        region_embeddings=embeddings[:num_regions],
        flipped_embeddings=flipped,
        image_embedding=combine_crops(whole[None], rule.combine)[0],
        gt_boxes_xyxy=pending.base.boxes_xyxy.astype(np.float32),
        gt_category_ids=pending.base.category_ids.astype(np.int64),
        gt_embeddings=embeddings[num_regions:],
    )


def max_base_iou(
    boxes_xyxy: Float[np.ndarray, "num_boxes 4"], base_xyxy: Float[np.ndarray, "num_base 4"]
) -> Float[np.ndarray, "num_boxes"]:
    """Returns each box's greatest IoU with a base box; 0 where there is none."""
    if not len(base_xyxy) or not len(boxes_xyxy):
        return np.zeros(len(boxes_xyxy), dtype=np.float32)
    boxes = torch.from_numpy(np.asarray(boxes_xyxy, dtype=np.float32))
    base = torch.from_numpy(np.asarray(base_xyxy, dtype=np.float32))
    return pairwise_iou(boxes, base).max(dim=1).values.numpy()
