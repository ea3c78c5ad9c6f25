"""Reading one image out of a Zarr shard, by the shards' own indices, with their checksums.

zarr itself is not asked: it gives fill values for a lost shard without a word, and a thread of
its own would be in the way of forked loader processes. The files stay plain Zarr v3; a test
compares the two readers.
"""

from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.arrays import GT_FIELDS, REGION_VIEWS, ArraySpec, array_specs, gt_rows_of_shard
from cache.codec import dequantize
from cache.location import CachePath, file_size, read_range
from cache.plan import Plan
from cache.regions import RegionRows, size_hw
from cache.rows import ImageRows
from cache.spec import CorruptCacheError

_CRC_BYTES = 4
_crc32c: Callable[[bytes], int] = google_crc32c.value  # pyright: ignore


class ArrayReader:
    """Reads chunks of one shard of one array; it keeps the shard's index, and no open file."""

    def __init__(
        self, path: CachePath, spec: ArraySpec, shard_index: int, rows_of_shard: int
    ) -> None:
        self._file = path / spec.shard_file(shard_index)
        self._spec = spec
        self._dtype = np.dtype(spec.dtype).newbyteorder("<")
        self._shard_index = shard_index
        num_chunks = rows_of_shard // spec.chunk_rows
        index_bytes = 16 * num_chunks + _CRC_BYTES
        index = self._read(None, index_bytes, "its index")
        self._offsets = np.frombuffer(index, "<u8").reshape(num_chunks, 2)

    def read(self, place: int) -> NDArray[Any]:
        """Returns the chunk at `place` in the shard, shaped as the array's spec.

        Raises:
            CorruptCacheError: names array, shard and place.
        """
        offset, length = self._offsets[place].tolist()
        if length != self._spec.chunk_bytes + _CRC_BYTES:
            raise self._error(f"its chunk {place} is missing")
        chunk = np.frombuffer(self._read(offset, length, f"its chunk {place}"), self._dtype)
        if self._spec.ragged:
            return chunk.reshape(self._spec.chunk_rows, *self._spec.shape)
        return chunk.reshape(self._spec.shape)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Returns rows `start` to `stop` of a ragged array's shard."""
        size = self._spec.chunk_rows
        if not 0 <= start <= stop <= len(self._offsets) * size:
            raise self._error(f"has no rows {start} to {stop}")
        if start == stop:
            return np.zeros((0, *self._spec.shape), self._dtype)
        chunks = [self.read(place) for place in range(start // size, -(-stop // size))]
        skipped = start // size * size
        return np.concatenate(chunks)[start - skipped : stop - skipped]

    def check(self) -> None:
        """Reads every chunk that is there; raises CorruptCacheError at the first bad one."""
        for place, (_, length) in enumerate(self._offsets.tolist()):
            # Places without a chunk: behind the end of a ragged array or of the last shard.
            if length != np.iinfo(np.uint64).max:
                self.read(place)

    def _read(self, offset: int | None, length: int, what: str) -> bytes:
        """Returns checked bytes; without an offset, the last ones of the file."""
        try:
            start = max(0, file_size(self._file) - length) if offset is None else offset
            data = read_range(self._file, start, length)
        except FileNotFoundError:
            raise self._error("the file is missing") from None
        except OverflowError:
            raise self._error(f"{what} lies outside of the file") from None
        body, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if len(data) != length:
            raise self._error(f"{what} is cut short")
        if _crc32c(body) != int.from_bytes(crc, "little"):
            raise self._error(f"{what} has a wrong checksum")
        return body

    def _error(self, what: str) -> CorruptCacheError:
        return CorruptCacheError(
            f"shard {self._shard_index:06d}: array {self._spec.name} ({self._file}): {what}"
        )


class Shard:
    """One shard of every array. Its files are believed: check them against the manifest first."""

    def __init__(self, path: CachePath, plan: Plan, shard_index: int) -> None:
        gt_rows = gt_rows_of_shard(plan)
        self._readers = {
            spec.name: ArrayReader(
                path, spec, shard_index, gt_rows if spec.ragged else plan.shard_size
            )
            for spec in array_specs(plan)
        }
        names = [name for pair in REGION_VIEWS for name in pair]
        self._vectors = [name for name in names if name in self._readers]
        self._first_gt = shard_index * gt_rows
        self._embed_dim = plan.embed_dim

    def regions(self, place: int) -> RegionRows:
        """Returns the regions of the image at `place`; raises CorruptCacheError."""
        n = int(self._read("num_regions", place))
        return RegionRows(
            image_id=int(self._read("image_id", place)),
            image_size_hw=size_hw(self._read("image_size_hw", place)),
            boxes_xyxy=self._read("boxes_xyxy", place)[:n],
            objectness=self._read("objectness", place)[:n],
            max_base_iou=self._read("max_base_iou", place)[:n],
            vectors={name: self._read(name, place)[:n] for name in self._vectors},
        )

    def image_embedding(self, place: int) -> NDArray[Any]:
        """Returns the embedding of the whole image as stored; NaN where there is none."""
        if "image_embedding" not in self._readers:
            return np.full(self._embed_dim, np.nan, np.float16)
        return self._read("image_embedding", place)

    def ground_truth(self, place: int) -> dict[str, NDArray[Any]]:
        """Returns the image's rows of each ragged array, as stored."""
        num = int(self._read("gt/num_boxes", place))
        start = int(self._read("gt/first_row", place)) - self._first_gt
        return {name: self._readers[name].read_rows(start, start + num) for name in GT_FIELDS}

    def rows(self, place: int) -> ImageRows:
        """Returns everything of the image at `place`; raises CorruptCacheError."""
        found, truth = self.regions(place), self.ground_truth(place)
        return image_rows(found, self.image_embedding(place), truth)

    def _read(self, name: str, place: int) -> NDArray[Any]:
        return self._readers[name].read(place)


def image_rows(
    found: RegionRows, image_embedding: NDArray[Any], truth: dict[str, NDArray[Any]]
) -> ImageRows:
    """Returns an image's rows, of its own memory, from their parts as stored."""
    return ImageRows(
        image_id=found.image_id,
        image_size_hw=found.image_size_hw,
        boxes_xyxy=found.boxes_xyxy.copy(),
        objectness=found.objectness.copy(),
        max_base_iou=found.max_base_iou.copy(),
        region_embeddings=_decoded(found, *REGION_VIEWS[0]),
        image_embedding=image_embedding.astype(np.float32),
        gt_boxes_xyxy=truth["gt/boxes_xyxy"].copy(),
        gt_category_ids=truth["gt/category_ids"].copy(),
        gt_embeddings=truth["gt/embeddings"].astype(np.float32),
        flipped_embeddings=_decoded(found, *REGION_VIEWS[1]) if found.has_flipped else None,
    )


def _decoded(found: RegionRows, name: str, scale: str) -> NDArray[np.float32]:
    return dequantize(found.vectors[name], found.vectors.get(scale))
