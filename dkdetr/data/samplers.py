"""Which images an epoch shows, in which order: a closed form of (seed, epoch), nothing remembered.

So any batch of any epoch can be made without those before it, on any number of ranks and workers,
and a resumed run goes on exactly where it stopped.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch.utils.data import Sampler

from dkdetr.data.annotations import BoxTable
from dkdetr.errors import DataError, UsageError


class SampleKey(NamedTuple):
    """Names a sample: with the seed, all its randomness follows from it."""

    epoch: int
    position: int
    """Place in the epoch's order over all ranks."""
    image_index: int


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed; unlike sums of parts, no two lists of parts share one in practice."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def uniform_factors(num_images: int) -> Float[np.ndarray, "num_images"]:
    """Returns 1 for each image: each is seen once an epoch."""
    return np.ones(num_images, dtype=np.float64)


def repeat_factors(boxes: BoxTable, *, threshold: float) -> Float[np.ndarray, "num_images"]:
    """Returns how often, in the mean, an epoch shows each image (LVIS's repeat factor sampling).

    With f(c) the share of images that show category c, r(c) = max(1, sqrt(threshold / f(c))) and
    an image's factor is the greatest r(c) of its categories (Gupta et al. 2019, appendix B).
    `boxes` holds base categories only; images without any get 1.
    """
    factors = uniform_factors(len(boxes.offsets) - 1)
    if len(boxes.category_ids) == 0:
        return factors
    _, labels = np.unique(boxes.category_ids, return_inverse=True)
    images = boxes.image_of_row()
    pairs = np.unique(np.stack((images, labels)), axis=1)
    share = np.bincount(pairs[1]) / len(factors)
    by_category = np.maximum(1.0, np.sqrt(threshold / share))
    np.maximum.at(factors, pairs[0], by_category[pairs[1]])
    return factors


def epoch_length(factors: Float[np.ndarray, "num_images"]) -> int:
    """Returns the number of samples of every epoch."""
    # The nudge keeps a sum that is whole but for rounding from losing a sample.
    return int(np.floor(factors.sum() + 1e-6))


def epoch_order(
    factors: Float[np.ndarray, "num_images"], *, seed: int, epoch: int
) -> Int[np.ndarray, "epoch_length"]:
    """Returns the image indices of an epoch, shuffled.

    An image of factor 2.3 comes 3 times in three of ten epochs and twice in the others. The
    fractions are rounded jointly (systematic sampling along a random order), not each by itself
    as the reference implementation does: each image has the same chances, and every epoch has the
    same length. Factors that are whole numbers are met exactly.
    """
    random = np.random.default_rng(derive_seed("order", seed, epoch))
    along = random.permutation(len(factors))
    whole = np.floor(factors[along]).astype(np.int64)
    ends = np.floor(np.cumsum(factors[along] - whole) + random.random()).astype(np.int64)
    length = epoch_length(factors)
    ends[-1] = max(ends[-1], length - whole.sum())  # against rounding in the cumulated sum
    order = random.permutation(np.repeat(along, whole + np.diff(ends, prepend=0)))
    return order[:length]


@dataclass(frozen=True)
class BatchPlan:
    """How epochs are cut into batches: `batch_size` images over all ranks, the rest dropped."""

    num_samples: int
    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise UsageError(
                f"data.batch_size = {self.batch_size} does not divide by {self.world_size} ranks"
            )
        if self.num_samples == 0:
            raise DataError(
                "no image can be trained on: each wants a box of a base name that is no crowd, and "
                "to be readable; dkdetr data check SPLIT counts them"
            )
        if self.batches_per_epoch == 0:
            raise DataError(
                f"{self.num_samples} usable training images make no batch of {self.batch_size}; "
                f"try --set data.batch_size={self.num_samples}"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in an epoch; the shuffle decides which images the last ones would be."""
        return self.num_samples // self.batch_size

    def positions(self, batch: int) -> range:
        """Returns this rank's positions in the epoch's order for one batch."""
        share = self.batch_size // self.world_size
        start = batch * self.batch_size + self.rank * share
        return range(start, start + share)


class TrainingBatchSampler(Sampler[list[SampleKey]]):
    """Yields this rank's batches of a whole run, from any epoch and batch on.

    Args:
        factors: mean number of times an epoch shows each image.
        plan: how an epoch is cut into batches.
        seed: the run's seed.
        epochs: the run ends before this epoch.
        start_epoch: first epoch.
        start_batch: first batch of the first epoch.
        arrange: puts the samples of an epoch (whole batches of them) into another order; None:
            as they were shuffled.
    """

    def __init__(
        self, factors: Float[np.ndarray, "num_images"], plan: BatchPlan,
        *, seed: int, epochs: int, start_epoch: int, start_batch: int,
        arrange: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        if not 0 <= start_batch <= plan.batches_per_epoch:
            raise UsageError(
                f"batch {start_batch} is outside an epoch of {plan.batches_per_epoch}: was the run "
                "begun with other data or another batch size?"
            )
        self._factors = factors
        self._plan = plan
        self._seed = seed
        self._epochs = epochs
        self._start_epoch = start_epoch
        self._start_batch = start_batch
        self._arrange = arrange

    def __len__(self) -> int:
        left = (self._epochs - self._start_epoch) * self._plan.batches_per_epoch
        return max(0, left - self._start_batch)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        start = self._start_batch
        for epoch in range(self._start_epoch, self._epochs):
            order = epoch_order(self._factors, seed=self._seed, epoch=epoch)
            if self._arrange is not None:
                # Cut first: which samples are dropped is the shuffle's choice, not the graph's.
                shown = self._plan.batches_per_epoch * self._plan.batch_size
                order = self._arrange(order[:shown], epoch)
            for batch in range(start, self._plan.batches_per_epoch):
                positions = self._plan.positions(batch)
                yield [SampleKey(epoch, at, int(order[at])) for at in positions]
            start = 0
