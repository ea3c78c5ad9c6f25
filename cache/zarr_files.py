"""The Zarr files of a cache: their metadata, and writing one whole shard of every array.

The only home of zarr. Everything is Zarr v3, little-endian, without compressor (half-precision
embeddings shrink by 8 % and read three times slower) and with a crc32c on every image's chunk.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore, MemoryStore

from cache.arrays import DATA_FOLDER, array_specs
from cache.durable import disk_errors
from cache.plan import Plan


def metadata_files(plan: Plan) -> dict[str, bytes]:
    """Returns the zarr.json files of a cache: path inside the cache -> bytes."""
    files: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(files), zarr_format=3)  # pyright: ignore[reportUnknownMemberType]
    for spec in array_specs(plan):
        root.create_array(
            spec.name,
            shape=(plan.num_images, *spec.shape),
            chunks=(1, *spec.shape),
            shards=(plan.shard_size, *spec.shape),
            dtype=spec.dtype,
            filters=None,
            serializer=BytesCodec(endian="little"),
            compressors=(Crc32cCodec(),),
            fill_value=spec.fill,
        )
    return {f"{DATA_FOLDER}/{key}": buffer.to_bytes() for key, buffer in sorted(files.items())}


def write_blocks(path: Path, shard_index: int, blocks: Mapping[str, NDArray[Any]]) -> None:
    """Writes one whole shard of every array of the cache at `path`; zarr renames into place.

    Raises:
        DiskFullError: no room; only whole files are left.
    """
    for name, block in blocks.items():
        with disk_errors(f"shard {shard_index:06d}, array {name}"):
            opened = zarr.Array.open(LocalStore(path / DATA_FOLDER / name))
            # An all-fill chunk must be a chunk: an absent one looks the same as a lost one.
            # open_array ignores this setting for an array that exists, so it is set here.
            array = opened.with_config({"write_empty_chunks": True})
            shards = array.shards
            assert shards is not None
            start = shard_index * shards[0]
            array[start : start + len(block)] = block
