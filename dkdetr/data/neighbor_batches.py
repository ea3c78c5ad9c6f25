"""Batches of related images: the epoch's own images, in another order. Our addition to the paper.

RKD compares the regions of a rank's micro-batch with each other. Regions of images drawn at random
are nearly all equally unlike; among related images there are relations worth imitating.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cache.neighbor_lists import NeighborLists
from dkdetr.data.samplers import derive_seed
from dkdetr.errors import UsageError

_MOST_RELATED = 16


@dataclass(frozen=True, eq=False)
class RelatedImages:
    """Of every training image the few most related ones, as compressed sparse rows."""

    indptr: Int[np.ndarray, "num_images_plus_1"]
    indices: Int[np.ndarray, "num_links"]

    def of(self, image_index: int) -> Int[np.ndarray, "num_related"]:
        """Returns the indices of the training images related to one."""
        return self.indices[self.indptr[image_index] : self.indptr[image_index + 1]]


def related_images(
    lists: NeighborLists, rows: Int[np.ndarray, "num_images"], *, most: int = _MOST_RELATED
) -> RelatedImages:
    """Returns the `most` most related training images of each training image.

    Args:
        lists: a cache's neighbour lists, over all its images.
        rows: the cache's row of every training image.
        most: links kept of an image.
    """
    index_of_row = np.full(len(lists.graph_indptr) - 1, -1, dtype=np.int64)
    index_of_row[rows] = np.arange(len(rows))
    graph = np.asarray(lists.graph_rows)
    spans = np.stack((lists.graph_indptr[rows], lists.graph_indptr[rows + 1]), axis=1).tolist()
    kept: list[np.ndarray] = []
    for begin, end in spans:
        indices = index_of_row[graph[begin:end]]
        kept.append(indices[indices >= 0][:most])
    indptr = np.concatenate(([0], np.cumsum([len(each) for each in kept])))
    return RelatedImages(indptr.astype(np.int64), np.concatenate(kept))


@dataclass(frozen=True, eq=False)
class RelatedCompany:
    """Rearranges the epochs that distil; a function of (seed, epoch, images a part)."""

    related: RelatedImages
    factors: Float[np.ndarray, "num_images"]
    share: int
    """Images of a part: a rank's micro-batch, whose regions are compared."""
    num_neighbors: int
    """Of these, places for related images."""
    seed: int
    start_epoch: int
    """Epochs before it are left as they are: nothing is distilled in them."""

    def __call__(
        self, order: Int[np.ndarray, "num_samples"], epoch: int
    ) -> Int[np.ndarray, "num_samples"]:
        """Returns the samples of an epoch in the order in which they are shown."""
        if epoch < self.start_epoch:
            return order
        return gather_related(
            order,
            self.related,
            self.factors,
            share=self.share,
            num_neighbors=self.num_neighbors,
            seed=self.seed,
            epoch=epoch,
        )


def places_for_neighbors(fraction: float, share: int) -> int:
    """Returns how many of a part's `share` images are related ones.

    Raises:
        UsageError: so small a share has no place for them.
    """
    places = min(round(fraction * share), share - 1)
    if places < 1:
        raise UsageError(
            f"kd.rkd.neighbor_fraction={fraction:g} of {share} images a micro-batch is not one "
            "image: raise it or data.batch_size, or set it to 0"
        )
    return places


def gather_related(
    order: Int[np.ndarray, "num_samples"],
    related: RelatedImages,
    factors: Float[np.ndarray, "num_images"],
    *,
    share: int,
    num_neighbors: int,
    seed: int,
    epoch: int,
) -> Int[np.ndarray, "num_samples"]:
    """Returns the same samples, so that of every `share` of them some are related to the others.

    Each group of `share` samples (one micro-batch of a rank) starts with the next samples of
    `order` that no group before has taken: its seeds. `num_neighbors` places are for images
    related to the seeds, drawn in proportion to their repeat factors from those that the epoch
    has still to show; where these do not suffice, further seeds take the places. So an epoch shows
    each image exactly as often as without, and only the company changes.

    Args:
        order: the epoch's samples, shuffled, a whole number of groups.
        related: which images are related.
        factors: repeat factor of each image.
        share: samples a group.
        num_neighbors: places of a group for related images.
        seed: the run's seed.
        epoch: the epoch.
    """
    assert len(order) % share == 0
    assert 0 < num_neighbors < share
    random = np.random.default_rng(derive_seed("neighbors", seed, epoch))
    left = np.bincount(order, minlength=len(factors))
    taken = np.zeros(len(factors), dtype=np.int64)  # as a neighbour, ahead of its turn
    queue = iter(order.tolist())
    result = np.empty_like(order)

    def next_seed() -> int:
        for image in queue:
            if not taken[image]:
                left[image] -= 1
                return image
            taken[image] -= 1
        raise AssertionError("as many samples come out as went in")

    for start in range(0, len(order), share):
        group = [next_seed() for _ in range(share - num_neighbors)]
        candidates = np.unique(np.concatenate([related.of(image) for image in group]))
        candidates = candidates[left[candidates] > 0]
        candidates = candidates[~np.isin(candidates, group)]
        # The keys u^(1/w) order a draw without replacement in proportion to w (Efraimidis 2006).
        keys = random.random(len(candidates)) ** (1 / factors[candidates])
        drawn = candidates[np.argsort(-keys, kind="stable")[:num_neighbors]]
        taken[drawn] += 1
        left[drawn] -= 1
        group += drawn.tolist()
        group += [next_seed() for _ in range(share - len(group))]
        result[start : start + share] = group
    return result
