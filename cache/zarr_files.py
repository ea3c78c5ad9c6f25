"""The Zarr files of a cache, as bytes: their metadata, and one whole shard of every array.

The only home of zarr. Everything is Zarr v3, little-endian, without compressor (half-precision
embeddings shrink by 8 % and read three times slower) and with a crc32c on every chunk.

zarr writes into memory and `durable` to the disk: zarr's own files are not flushed, and its
sharding codec reads a shard that is already there before it replaces it, spoilt or not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from cache.arrays import DATA_FOLDER, ArraySpec, array_specs, gt_rows_of_shard
from cache.plan import Plan


def metadata_files(plan: Plan) -> dict[str, bytes]:
    """Returns the zarr.json files of a cache: path inside the cache -> bytes."""
    files: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(files), zarr_format=3)  # pyright: ignore[reportUnknownMemberType]
    for spec in array_specs(plan):
        _create_array(root, spec, plan)
    return {f"{DATA_FOLDER}/{key}": buffer.to_bytes() for key, buffer in sorted(files.items())}


def shard_files(
    plan: Plan, shard_index: int, blocks: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, bytes]]:
    """Yields the path inside the cache and the bytes of one whole shard of every array."""
    rows = plan.shard_rows(shard_index)
    for spec in array_specs(plan):
        files: dict[str, Any] = {}
        root = zarr.create_group(MemoryStore(files), zarr_format=3)  # pyright: ignore[reportUnknownMemberType]
        array = _create_array(root, spec, plan)
        start = shard_index * gt_rows_of_shard(plan) if spec.ragged else rows.start
        block = blocks[spec.name]
        if spec.name == "gt/first_row":
            block = block + shard_index * gt_rows_of_shard(plan)
        array[start : start + len(block)] = block
        name = spec.shard_file(shard_index)
        yield name, files[name.removeprefix(f"{DATA_FOLDER}/")].to_bytes()


def _create_array(root: zarr.Group, spec: ArraySpec, plan: Plan) -> zarr.Array[Any]:
    gt_rows = gt_rows_of_shard(plan)
    length = plan.num_shards * gt_rows if spec.ragged else plan.num_images
    return root.create_array(
        spec.name,
        shape=(length, *spec.shape),
        chunks=(spec.chunk_rows, *spec.shape),
        shards=(gt_rows if spec.ragged else plan.shard_size, *spec.shape),
        dtype=spec.dtype,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=(Crc32cCodec(),),
        fill_value=spec.fill,
        # An all-fill chunk must be a chunk: an absent one looks the same as a lost one.
        config={"write_empty_chunks": True},
    )
