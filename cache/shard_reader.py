"""Reading one image's chunk out of a Zarr shard, by its index, with its checksum.

zarr itself is not asked: it gives fill values for a lost shard without a word, and a thread of
its own would be in the way of forked loader processes. The files stay plain Zarr v3; a test
compares the two readers.
"""

from collections.abc import Callable
from os import SEEK_END
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.arrays import ArraySpec
from cache.spec import CorruptCacheError

_CRC_BYTES = 4
_crc32c: Callable[[bytes], int] = google_crc32c.value  # pyright: ignore


class ShardReader:
    """Reads chunks of one shard of one array; it keeps the shard's index, and no open file."""

    def __init__(self, path: Path, spec: ArraySpec, shard_index: int, shard_size: int) -> None:
        self._file = path / spec.shard_file(shard_index)
        self._spec = spec
        self._shard_index = shard_index
        index_bytes = 16 * shard_size + _CRC_BYTES
        index = self._read(-index_bytes, index_bytes, "its index")
        self._offsets = np.frombuffer(index, "<u8").reshape(shard_size, 2)

    def read(self, place: int) -> NDArray[Any]:
        """Returns the chunk of the image at `place` in the shard, shaped as the array's spec.

        Raises:
            CorruptCacheError: names array, shard and place.
        """
        offset, length = (int(number) for number in self._offsets[place])
        if length != self._spec.chunk_bytes + _CRC_BYTES:
            raise self._error(f"the chunk of its image {place} is missing")
        chunk = self._read(offset, length, f"the chunk of its image {place}")
        dtype = np.dtype(self._spec.dtype).newbyteorder("<")
        return np.frombuffer(chunk, dtype).reshape(self._spec.shape)

    def _read(self, offset: int, length: int, what: str) -> bytes:
        """Returns checked bytes; a negative offset counts from the end of the file."""
        try:
            with self._file.open("rb", buffering=0) as stream:
                size = stream.seek(0, SEEK_END)
                stream.seek(offset if offset >= 0 else max(0, size + offset))
                data = stream.read(length)
        except FileNotFoundError:
            raise self._error("the file is missing") from None
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
