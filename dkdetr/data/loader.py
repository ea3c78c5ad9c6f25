"""The loaders: one for a whole training run, one for a pass over a split."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cache.location import CachePath
from cache.regions import RegionSource
from cache.resident import load_resident
from cache.store import CacheReader, open_cache
from dkdetr.config import ExperimentConfig
from dkdetr.cores import cores_at_hand
from dkdetr.data.batch_stream import BatchStream, KeyLists
from dkdetr.data.datasets import (
    EvaluationBatches,
    TrainingBatches,
    TrainingImages,
    training_images,
)
from dkdetr.data.neighbor_batches import RelatedCompany, places_for_neighbors, related_images
from dkdetr.data.samplers import (
    BatchPlan,
    SampleKey,
    TrainingBatchSampler,
    epoch_length,
    repeat_factors,
    uniform_factors,
)
from dkdetr.data.splits import Split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import MismatchError, UsageError
from dkdetr.structures import DecodedImages, ImageBatch, LoadedBatch


class MicroBatches:
    """Cuts each list of keys into `parts` of the same length, in order."""

    def __init__(self, batches: KeyLists, parts: int) -> None:
        self._batches = batches
        self._parts = parts

    def __len__(self) -> int:
        return len(self._batches) * self._parts

    def __iter__(self) -> Iterator[Sequence[SampleKey]]:
        for keys in self._batches:
            size = len(keys) // self._parts
            for part in range(self._parts):
                yield keys[part * size : (part + 1) * size]


def make_training_loader(
    split: Split,
    vocabulary: Vocabulary,
    config: ExperimentConfig,
    *,
    cache_path: CachePath | None,
    rank: int = 0,
    world_size: int = 1,
    start_epoch: int = 0,
    start_batch: int = 0,
    image_limit: int | None = None,
    pin_memory: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> BatchStream[LoadedBatch]:
    """Returns one rank's micro-batches from (start_epoch, start_batch) to the end of the run.

    Each batch comes as `compute.micro_batches` parts; without them it is one part, the whole
    share of the rank. `image_limit` keeps the first images only; `pin_memory` is for a GPU, which
    then copies while it computes; `should_stop` is asked while no batch is ready, and ends the
    stream early.

    A sample is a function of the seed, its epoch and its place in the epoch's order: neither the
    number of ranks nor that of loader processes changes it (with `kd.rkd.neighbor_fraction` the
    order itself depends on the images a part). Teacher regions come with epochs from
    `kd.start_epoch` on, if anything distils. Images that stage 1 quarantined are left out, and so
    are those without a base box. The last, incomplete batch of an epoch is dropped. `data.augment`
    is settled (`device_views.settle_views`).

    Raises:
        DataError: images are missing, the split is not for training, novel names would leak, or
            the student has a mask head and an object no outline.
        MismatchError: the cache or the vocabulary belongs to another split, or it lacks the
            neighbour lists that are asked for.
        UsageError: distillation without a cache, a batch size that does not divide, or too small
            a one for `kd.rkd.neighbor_fraction`.
        CacheError: the cache is unsealed or corrupt.
    """
    distils = config.kd.enabled and config.kd.start_epoch < config.optim.epochs
    if distils and cache_path is None:
        raise UsageError(
            "distillation needs a teacher's cache: give --cache, or switch it off with "
            "--set kd.regions_per_image=0"
        )
    reader = open_cache(cache_path) if cache_path is not None else None
    images = _usable_images(split, vocabulary, reader, with_masks=config.student.mask_head)
    images = images.first(image_limit)
    split.require_images()
    parts = config.compute.micro_batches
    if config.data.batch_size % (world_size * parts):
        raise UsageError(
            f"data.batch_size = {config.data.batch_size} does not divide by {world_size} ranks "
            f"times compute.micro_batches = {parts}"
        )
    factors = _factors(images, config)
    plan = BatchPlan(epoch_length(factors), config.data.batch_size, rank, world_size)
    sampler = TrainingBatchSampler(
        factors,
        plan,
        seed=config.seed,
        epochs=config.optim.epochs,
        start_epoch=start_epoch,
        start_batch=start_batch,
        arrange=_company(images, config, plan, reader) if distils else None,
    )
    source = _region_source(reader, config) if reader is not None and distils else None
    make_batch = TrainingBatches(images, config, source)
    workers = loader_processes(config.data.workers)
    if rank == 0 and workers < config.data.workers:
        print(
            f"loader processes: {workers}, one a core of this process, and not the "
            f"{config.data.workers} of data.workers",
            file=sys.stderr,
        )
    return BatchStream(
        make_batch,
        MicroBatches(sampler, parts),
        workers=workers,
        pin_memory=pin_memory,
        should_stop=should_stop,
    )


def loader_processes(asked: int) -> int:
    """Returns how many of the loader processes that are asked for this process gets.

    One a core at most; the ranks that torchrun started on a machine share its cores. More would
    take turns, and each holds several hundred megabytes.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(asked, max(1, cores_at_hand() // ranks_here))


def batches_per_epoch(
    split: Split,
    vocabulary: Vocabulary,
    config: ExperimentConfig,
    *,
    cache_path: CachePath | None,
    image_limit: int | None = None,
) -> int:
    """Returns the number of steps of an epoch, the same for each epoch and rank."""
    reader = open_cache(cache_path) if cache_path is not None else None
    images = _usable_images(split, vocabulary, reader).first(image_limit)
    factors = _factors(images, config)
    return BatchPlan(epoch_length(factors), config.data.batch_size, 0, 1).batches_per_epoch


def make_evaluation_loader(
    split: Split,
    config: ExperimentConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    leave_views: bool = False,
    pin_memory: bool = False,
) -> BatchStream[ImageBatch] | BatchStream[DecodedImages]:
    """Returns every image of the split exactly once over all ranks, in batches, in id order.

    Rank r takes the batches r, r + world_size, ...; the last batch may be smaller, and a rank may
    have none. A batch is the same whatever the number of ranks: so is what a student says of it.
    With `leave_views` the images are only decoded, and `render_images` makes their views;
    `pin_memory` as above.

    Raises:
        DataError: images are missing, or while iterating: one is unreadable.
    """
    split.require_images()
    size = config.eval.batch_size
    places = list(range(len(split.images)))
    batches: Sequence[list[int]] = [places[i : i + size] for i in range(0, len(places), size)]
    batches = batches[rank::world_size]
    make_batch = EvaluationBatches(split.folder, split.images, image_size=config.data.image_size)
    workers = loader_processes(config.data.workers)
    if leave_views:
        return BatchStream(make_batch.decoded, batches, workers=workers, pin_memory=pin_memory)
    return BatchStream(make_batch, batches, workers=workers, pin_memory=pin_memory)


def _usable_images(
    split: Split,
    vocabulary: Vocabulary,
    reader: CacheReader | None,
    *,
    with_masks: bool = False,
) -> TrainingImages:
    quarantined = reader.quarantined if reader is not None else {}
    images = training_images(split, vocabulary, leave_out=quarantined, with_masks=with_masks)
    if reader is not None:
        wanted = np.array([image.image_id for image in images.images])
        absent = wanted[~np.isin(wanted, reader.image_ids)]
        if len(absent):
            raise MismatchError(
                f"the cache {reader.path} lacks {len(absent)} of the {len(wanted)} training images "
                f"of {split.name}: it was made from {reader.info.split}; "
                f"next: dkdetr cache-teacher --split {split.name}"
            )
    return images


def _region_source(reader: CacheReader, config: ExperimentConfig) -> RegionSource:
    if config.data.cache_mode == "stored" or config.kd.offered_regions == 0:
        return reader
    return load_resident(reader, max_base_iou=config.kd.selection.max_base_iou)


def _factors(images: TrainingImages, config: ExperimentConfig) -> np.ndarray:
    if config.data.sampler == "uniform":
        return uniform_factors(len(images.images))
    return repeat_factors(images.boxes, threshold=config.data.repeat_threshold)


def _company(
    images: TrainingImages, config: ExperimentConfig, plan: BatchPlan, reader: CacheReader | None
) -> RelatedCompany | None:
    """Returns what brings related images into one batch, where the experiment asks for it."""
    fraction = config.kd.rkd.neighbor_fraction
    if fraction == 0 or reader is None:
        return None
    share = plan.batch_size // (plan.world_size * config.compute.micro_batches)
    places = places_for_neighbors(fraction, share)
    lists = reader.neighbors()
    if lists is None:
        raise MismatchError(
            f"kd.rkd.neighbor_fraction={fraction:g} needs neighbour lists, and the cache "
            f"{reader.path} has none; next: dkdetr cache neighbors {reader.path}"
        )
    rows = np.array([reader.plan.row_of[image.image_id] for image in images.images])
    return RelatedCompany(
        related=related_images(lists, rows),
        factors=_factors(images, config),
        share=share,
        num_neighbors=places,
        seed=config.seed,
        start_epoch=config.kd.start_epoch,
    )
