"""Which image lies where: the order of the rows and their division into shards.

One shard is one work item and one commit. Workers that each wrote a part of one shard would lose
rows without any error, so nothing smaller can be committed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self, cast

from cache.spec import CacheError

Storage = Literal["fp16", "int8"]


@dataclass(frozen=True)
class Plan:
    """The fixed shape of a cache. Row `r` holds `image_ids[r]`; ids are sorted and unique.

    `batch_layout` says how the teacher's batches are composed: embeddings differ in their last
    bits with the batch they were computed in, so it belongs to the data.
    """

    image_ids: tuple[int, ...]
    shard_size: int
    max_regions: int
    embed_dim: int
    max_gt: int
    storage: Storage
    batch_layout: Mapping[str, Any] = field(hash=False)
    flipped: bool = False
    """True where every region has a second embedding, of its mirrored crop."""

    def __post_init__(self) -> None:
        if not self.image_ids:
            raise CacheError("a cache needs at least one image")
        if any(a >= b for a, b in zip(self.image_ids, self.image_ids[1:], strict=False)):
            raise CacheError("the image ids of a plan must be sorted and unique")
        if self.image_ids[0] < 0:
            raise CacheError(f"image ids must not be negative, got {self.image_ids[0]}")
        for name in ("shard_size", "max_regions", "embed_dim"):
            if getattr(self, name) < 1:
                raise CacheError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_gt < 0:
            raise CacheError(f"max_gt must not be negative, got {self.max_gt}")
        if self.storage not in ("fp16", "int8"):
            raise CacheError(f"storage must be fp16 or int8, got '{self.storage}'")

    @property
    def num_images(self) -> int:
        """Returns the number of rows."""
        return len(self.image_ids)

    @property
    def num_shards(self) -> int:
        """Returns the number of shards; the last one may be short."""
        return -(-self.num_images // self.shard_size)

    def shard_rows(self, shard_index: int) -> range:
        """Returns the rows of a shard; raises CacheError if there is no such shard."""
        if not 0 <= shard_index < self.num_shards:
            raise CacheError(f"no shard {shard_index}: this cache has {self.num_shards}")
        start = shard_index * self.shard_size
        return range(start, min(start + self.shard_size, self.num_images))

    def shard_image_ids(self, shard_index: int) -> tuple[int, ...]:
        """Returns the image ids of a shard, in the order of its rows."""
        rows = self.shard_rows(shard_index)
        return self.image_ids[rows.start : rows.stop]

    @cached_property
    def row_of(self) -> Mapping[int, int]:
        """Returns the row of every image id."""
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of plan.json."""
        return {
            "image_ids": list(self.image_ids),
            "shard_size": self.shard_size,
            "max_regions": self.max_regions,
            "embed_dim": self.embed_dim,
            "max_gt": self.max_gt,
            "storage": self.storage,
            "batch_layout": dict(self.batch_layout),
            "flipped": self.flipped,
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Returns the plan that `to_dict` wrote."""
        fields = {**table, "image_ids": tuple(table["image_ids"])}
        return cls(**cast("dict[str, Any]", fields))


def make_plan(
    image_ids: Iterable[int],
    *,
    max_regions: int,
    embed_dim: int,
    max_gt: int,
    storage: Storage,
    batch_layout: Mapping[str, Any],
    flipped: bool = False,
) -> Plan:
    """Returns a plan over the sorted ids, in shards of min(512, max(16, ceil(n / 16))) images.

    Args:
        image_ids: in any order.
        max_regions: regions kept of an image; the arrays are that long.
        embed_dim: length of an embedding.
        max_gt: the most base ground-truth boxes any of these images has.
        storage: how region embeddings are stored; `int8` halves them, at a cosine of 0.9999.
        batch_layout: how the teacher's batches are composed.
        flipped: whether a region has a second embedding, of its mirrored crop.
    """
    ordered = tuple(sorted(int(image_id) for image_id in image_ids))
    return Plan(
        image_ids=ordered,
        shard_size=min(512, max(16, -(-len(ordered) // 16))),
        max_regions=max_regions,
        embed_dim=embed_dim,
        max_gt=max_gt,
        storage=storage,
        batch_layout=batch_layout,
        flipped=flipped,
    )
