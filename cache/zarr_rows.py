"""The rows of a sealed cache out of its Zarr shards; a shard is hashed when it is first touched."""

from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from cache.location import CachePath, mending
from cache.manifest import ShardManifest
from cache.plan import Plan
from cache.regions import RegionRows
from cache.rows import ImageRows
from cache.shard_reader import Shard
from cache.spec import CorruptCacheError


class RowSource(Protocol):
    """Whatever holds the rows of a cache as they are stored: Zarr shards, or mapped files."""

    def regions(self, row: int) -> RegionRows:
        """Returns the regions of the image at `row`."""
        ...

    def ground_truth(self, row: int) -> dict[str, NDArray[Any]]:
        """Returns the image's rows of each ragged array."""
        ...

    def image_embedding(self, row: int) -> NDArray[Any]:
        """Returns the embedding of the whole image."""
        ...

    def rows(self, row: int) -> ImageRows:
        """Returns everything of the image."""
        ...


class ZarrRows:
    """A RowSource over the shards of a cache.

    Args:
        path: the cache.
        plan: its plan.
        manifest_of: returns the manifest of a shard, as sealed.
    """

    def __init__(
        self, path: CachePath, plan: Plan, manifest_of: Callable[[int], ShardManifest]
    ) -> None:
        self._path, self._plan, self._manifest_of = path, plan, manifest_of
        self._shards: dict[int, Shard] = {}

    def regions(self, row: int) -> RegionRows:
        """Returns the regions of the image at `row`; raises CorruptCacheError."""
        shard, place = self._find(row)
        return shard.regions(place)

    def ground_truth(self, row: int) -> dict[str, NDArray[Any]]:
        """Returns the image's rows of each ragged array; raises CorruptCacheError."""
        shard, place = self._find(row)
        return shard.ground_truth(place)

    def image_embedding(self, row: int) -> NDArray[Any]:
        """Returns the embedding of the whole image; raises CorruptCacheError."""
        shard, place = self._find(row)
        return shard.image_embedding(place)

    def rows(self, row: int) -> ImageRows:
        """Returns everything of the image; raises CorruptCacheError."""
        shard, place = self._find(row)
        return shard.rows(place)

    def _find(self, row: int) -> tuple[Shard, int]:
        index, place = divmod(row, self._plan.shard_size)
        return self._shards.get(index) or self._open(index), place

    def _open(self, index: int) -> Shard:
        problems = self._manifest_of(index).problems(self._path)
        if problems:
            raise CorruptCacheError(
                f"{problems[0]}. Its embeddings cannot be trusted; "
                f"next: {mending(self._path, f' --shard {index}')}"
            )
        shard = self._shards[index] = Shard(self._path, self._plan, index)
        return shard
