"""The loaders: one for a whole training run, one for a pass over a split.

Loader processes start by forkserver: forking a process that has read Zarr (an event-loop thread)
or used OpenMP can deadlock.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cache.spec import CacheError
from cache.store import CacheReader, open_cache
from dkdetr.config import ExperimentConfig
from dkdetr.data.datasets import (
    EvaluationBatches,
    TrainingBatches,
    TrainingImages,
    training_images,
)
from dkdetr.data.neighbor_batches import RelatedCompany, places_for_neighbors, related_images
from dkdetr.data.samplers import (
    BatchPlan,
    TrainingBatchSampler,
    epoch_length,
    repeat_factors,
    uniform_factors,
)
from dkdetr.data.splits import Split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import DkdetrError, MismatchError, UsageError
from dkdetr.structures import ImageBatch, TrainingBatch

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class _Failure:
    """An error for the user on its way from a loader process.

    DataLoader itself would re-raise it with a traceback of the worker for a message.
    """

    error: Exception


class _BatchDataset(Dataset[Any]):
    """Hands whole batches to a DataLoader that does no batching of its own."""

    def __init__(self, make_batch: Callable[[Any], Any]) -> None:
        self._make_batch = make_batch

    def __getitem__(self, keys: Any) -> Any:
        try:
            return self._make_batch(keys)
        except (DkdetrError, CacheError) as error:
            return _Failure(error)


class BatchStream(Generic[Batch]):
    """Yields batches once through; its length is the number of batches left.

    Args:
        make_batch: makes a batch of a sampler's list of keys; goes to the loader processes.
        keys: the lists of keys, in order; its length is known.
        workers: loader processes; 0 loads here.
    """

    def __init__(
        self, make_batch: Callable[[Any], Batch], keys: Iterable[Any], *, workers: int
    ) -> None:
        num_batches = len(keys)  # type: ignore[arg-type]
        workers = min(workers, num_batches)
        self._loader: DataLoader[Any] = DataLoader(
            _BatchDataset(make_batch),
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            multiprocessing_context=_forkserver() if workers else None,
            worker_init_fn=_prepare_worker if workers else None,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            # Its own: DataLoader draws a seed, and the run's global state must not notice.
            generator=torch.Generator(),
        )
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch


def make_training_loader(
    split: Split,
    vocabulary: Vocabulary,
    config: ExperimentConfig,
    *,
    cache_path: Path | None,
    rank: int = 0,
    world_size: int = 1,
    start_epoch: int = 0,
    start_batch: int = 0,
) -> BatchStream[TrainingBatch]:
    """Returns one rank's batches from (start_epoch, start_batch) to the end of the run.

    A sample is a function of the seed, its epoch and its place in the epoch's order: neither the
    number of ranks nor that of loader processes changes it (with `kd.rkd.neighbor_fraction` the
    order itself depends on the images a rank). Teacher regions come with epochs from
    `kd.start_epoch` on, if anything distils. Images that stage 1 quarantined are left out, and so
    are those without a base box. The last, incomplete batch of an epoch is dropped.

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
    with_masks = config.student.mask_head
    images = _usable_images(split, vocabulary, reader, with_masks=with_masks)
    split.require_images()
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
    make_batch = TrainingBatches(images, config, reader if distils else None)
    return BatchStream(make_batch, sampler, workers=config.data.workers)


def batches_per_epoch(
    split: Split, vocabulary: Vocabulary, config: ExperimentConfig, *, cache_path: Path | None
) -> int:
    """Returns the number of steps of an epoch, the same for each epoch and rank."""
    reader = open_cache(cache_path) if cache_path is not None else None
    factors = _factors(_usable_images(split, vocabulary, reader), config)
    return BatchPlan(epoch_length(factors), config.data.batch_size, 0, 1).batches_per_epoch


def make_evaluation_loader(
    split: Split, config: ExperimentConfig, *, rank: int = 0, world_size: int = 1
) -> BatchStream[ImageBatch]:
    """Returns every image of the split exactly once over all ranks, in batches, in id order.

    Rank r takes the images r, r + world_size, ...; the last batch may be smaller.

    Raises:
        DataError: images are missing, or while iterating: one is unreadable.
    """
    split.require_images()
    size = config.eval.batch_size
    mine = list(range(rank, len(split.images), world_size))
    batches: Sequence[list[int]] = [mine[i : i + size] for i in range(0, len(mine), size)]
    make_batch = EvaluationBatches(split.folder, split.images, image_size=config.data.image_size)
    return BatchStream(make_batch, batches, workers=config.data.workers)


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
    share = plan.batch_size // plan.world_size
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


def _forkserver() -> BaseContext:
    """Returns the start method; its server imports torch once, for all loaders of the run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _prepare_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; the main one alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
