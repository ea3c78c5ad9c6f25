"""Makes one shard: read, propose, crop, embed, commit. Runs in this process or in a Dask worker.

Everything a shard's bytes depend on is in the job and in the plan, never in who makes it or when:
images are read in the plan's order, proposed for and embedded in batches of fixed composition.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8

from cache.layout import load_plan
from cache.plan import Plan
from cache.rows import ImageRows
from cache.writer import commit_shard
from dkdetr.boxes import pairwise_iou
from dkdetr.data.annotations import Boxes, ImageInfo
from dkdetr.data.image_files import UnreadableImageError, read_image
from dkdetr.data.splits import Split, load_split
from dkdetr.engine.allocator import keep_freed_memory
from dkdetr.engine.distributed import pick_device
from dkdetr.errors import MismatchError
from pipeline.canary import check_canary
from pipeline.crops import CropRule, combine_crops, crop_windows, embed_stream
from pipeline.proposal_sources import open_source
from pipeline.proposals import ProposalRule, Proposals, ProposalSource, SourceImage, apply_rule
from pipeline.teacher import Precision, load_teacher
from pipeline.teacher_model import Teacher

READ_THREADS = 2


@dataclass(frozen=True)
class ShardJob:
    """What a worker must know to make any shard of a cache; hashable and picklable."""

    cache_path: Path
    split: str
    data_root: Path
    teacher: str
    teacher_identity: str
    precision: Precision
    device: str
    canary: str
    proposals: str
    """A prepared source: see pipeline.proposal_sources."""
    proposal_rule: ProposalRule
    crop_rule: CropRule
    crop_batch: int
    image_batch: int
    threads: int
    """Torch threads of a worker process; 0 leaves torch's own choice."""


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard: counts, and which images could not be used."""

    num_images: int
    num_regions: int
    quarantined: tuple[tuple[int, str], ...]


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
    """Returns the report of a shard, now committed. Idempotent."""
    return embed_shard(job, shard, tools_of(job, worker_number))


@lru_cache(maxsize=1)
def tools_of(job: ShardJob, worker_number: int) -> ShardTools:
    """Returns the tools of a job, built on the first call in this process.

    Raises:
        MismatchError: this machine's teacher is not the one the cache was planned with.
    """
    keep_freed_memory()
    if job.threads:
        torch.set_num_threads(job.threads)
    device = worker_device(job.device, worker_number)
    teacher = load_teacher(job.teacher, device, precision=job.precision)
    if teacher.identity != job.teacher_identity:
        raise MismatchError(
            f"the teacher '{job.teacher}' is {teacher.identity} on this worker and "
            f"{job.teacher_identity} where the cache was planned: give all workers the same weights"
        )
    check_canary(job.canary, teacher, where=f"the cache {job.cache_path}")
    return ShardTools(
        plan=load_plan(job.cache_path),
        split=load_split(job.split, job.data_root),
        teacher=teacher,
        source=open_source(job.proposals, device, batch_size=job.image_batch),
    )


def worker_device(device: str, worker_number: int) -> torch.device:
    """Returns a worker's device: workers of one machine take its GPUs in turn."""
    chosen = pick_device(device)
    if chosen.type == "cuda" and device in {"auto", "cuda"}:
        return torch.device("cuda", worker_number % torch.cuda.device_count())
    return chosen


def embed_shard(job: ShardJob, shard: int, tools: ShardTools) -> ShardReport:
    """Returns the report of a shard, now committed."""
    plan, teacher, rule = tools.plan, tools.teacher, job.crop_rule
    image_of = {image.image_id: image for image in tools.split.images}
    images = [image_of[image_id] for image_id in plan.shard_image_ids(shard)]
    pending: deque[PendingImage] = deque()
    quarantined: dict[int, str] = {}

    def stacks() -> Iterator[torch.Tensor]:
        readable = _readable(tools.split, images, quarantined)
        while chunk := list(islice(readable, job.image_batch)):
            raw = tools.source.propose([picture for _, picture in chunk])
            for (image, picture), found in zip(chunk, raw, strict=True):
                height, width = picture.pixels.shape[:2]
                kept = apply_rule(found, job.proposal_rule, height=height, width=width)
                pending.append(PendingImage(image, kept, tools.split.base_boxes(image.image_id)))
                yield crops_of(picture, pending[-1], teacher, rule)

    encode = teacher.crop_features
    rows = [
        rows_of_image(pending.popleft(), features, rule)
        for features in embed_stream(stacks(), encode, batch_size=job.crop_batch)
    ]
    manifest = commit_shard(job.cache_path, shard, rows, quarantined=quarantined, plan=plan)
    return ShardReport(
        num_images=manifest.num_images,
        num_regions=manifest.num_regions,
        quarantined=tuple(sorted((int(key), why) for key, why in manifest.quarantined.items())),
    )


def _readable(
    split: Split, images: Sequence[ImageInfo], quarantined: dict[int, str]
) -> Iterator[tuple[ImageInfo, SourceImage]]:
    """Yields the images that can be read, in order; notes the others. Reads ahead in threads."""

    def read(image: ImageInfo) -> SourceImage | str:
        path = split.image_path(image)
        try:
            pixels = read_image(path, expected_hw=(image.height, image.width))
        except UnreadableImageError as error:
            # The cache must not depend on where this machine keeps its pictures.
            return str(error).replace(str(path), image.file_name)
        return SourceImage(image.image_id, pixels)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        ahead: deque[tuple[ImageInfo, Future[SourceImage | str]]] = deque()
        remaining = iter(images)
        while True:
            while len(ahead) < 2 * READ_THREADS and (image := next(remaining, None)) is not None:
                ahead.append((image, pool.submit(read, image)))
            if not ahead:
                return
            image, future = ahead.popleft()
            result = future.result()
            if isinstance(result, str):
                quarantined[image.image_id] = result
            else:
                yield image, result


def crops_of(
    picture: SourceImage, image: PendingImage, teacher: Teacher, rule: CropRule
) -> UInt8[torch.Tensor, "num_crops 3 crop_height crop_width"]:
    """Returns every crop of an image: proposals and base boxes at all scales, the whole picture.

    Mirrored crops follow: of all of these if views are averaged, of the proposals' if kept.
    """
    height, width = picture.pixels.shape[:2]
    boxes = np.concatenate((image.proposals.boxes_xyxy, image.base.boxes_xyxy)).astype(np.float32)
    windows = crop_windows(boxes, rule, height=height, width=width).reshape(-1, 4)
    windows = np.concatenate((windows, [[0, 0, width, height]]))
    pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1).to(teacher.device).contiguous()
    crops = teacher.cut(pixels, windows, rule)
    if rule.views == "orig":
        return crops
    of_proposals = len(image.proposals.boxes_xyxy) * len(rule.scales)
    mirrored = crops if rule.views == "avg" else crops[:of_proposals]
    return torch.cat((crops, mirrored.flip(-1)))


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
