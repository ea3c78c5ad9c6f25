"""Exporting a cache to mapped files, for file systems that are slow at many small reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.durable import (
    dump_checked_json,
    file_problem,
    load_checked_json,
    sweep_partial_files,
    write_atomic,
)
from cache.exported import EXPORT_FILE, MAPPED_FOLDER, is_export
from cache.layout import (
    CACHE_FILE,
    COMPLETE_FILE,
    PLAN_FILE,
    PROVENANCE_FILE,
    QUARANTINE_FILE,
    TEXT_MANIFEST,
    load_text_manifest,
)
from cache.lock import LOCK_FILE, Lease
from cache.manifest import manifest_file
from cache.mapped import FlatReader, write_flat
from cache.neighbor_lists import NEIGHBORS_MANIFEST
from cache.spec import SCHEMA, CacheError, CorruptCacheError
from cache.store import CacheReader


def export_cache(reader: CacheReader, out: Path) -> bool:
    """Returns True once `out` is the export of a cache, False if it was before.

    Everything but the Zarr data is copied as it is; a finished EXPORT.json comes last. A kill
    leaves an unfinished one, and the same call goes on. Mapped files that are whole stay: where
    neighbour lists came later, or a copy was harmed, only the copies are made again.

    Raises:
        CacheError: `out` is something else, or the cache is itself an export.
        CorruptCacheError: a shard or a neighbour list is not what was committed.
        StaleCacheError: the cache's neighbour lists are of other data.
        DiskFullError: no room.
        CacheLockedError: another process exports to `out`.
    """
    if reader.is_export:
        raise CacheError(f"{reader.path} is an export already: copy the folder")
    _refuse_foreign(out)
    head, lists = _head_files(reader), _lists_of(reader)
    out.mkdir(parents=True, exist_ok=True)
    with Lease(out):
        sweep_partial_files(out)
        mapped = _whole_mapping(reader, out)
        if mapped and mapped["finished"] and _is_copied(reader, out, head, lists):
            return False
        # From here on the folder is known as an export, and as an unfinished one.
        _write_record(out, mapped or {}, finished=False)
        if not lists:
            (out / NEIGHBORS_MANIFEST).unlink(missing_ok=True)
        for name in [*head, *lists, COMPLETE_FILE]:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(out / name, (reader.path / name).read_bytes())
        if mapped is None:
            record = write_flat(out / MAPPED_FOLDER, reader.plan, reader.source)
            mapped = {"schema": SCHEMA, "merkle_root": reader.info.merkle_root, **record}
        _write_record(out, mapped, finished=True)
    return True


def _write_record(out: Path, record: Mapping[str, Any], *, finished: bool) -> None:
    write_atomic(out / EXPORT_FILE, dump_checked_json({**record, "finished": finished}))


def _whole_mapping(reader: CacheReader, out: Path) -> dict[str, Any] | None:
    """Returns EXPORT.json, finished or not, if all mapped files are this cache's; else None."""
    try:
        record = load_checked_json(out / EXPORT_FILE)
        if record.get("merkle_root") != reader.info.merkle_root:
            return None
        problems = FlatReader(out / MAPPED_FOLDER, record, reader.plan).problems()
    except (FileNotFoundError, CorruptCacheError):
        return None
    return None if problems else record


def _head_files(reader: CacheReader) -> list[str]:
    """Returns the small files but COMPLETE.json, which comes last."""
    names = [CACHE_FILE, PLAN_FILE, PROVENANCE_FILE, QUARANTINE_FILE, TEXT_MANIFEST]
    names += [manifest_file(shard) for shard in range(reader.plan.num_shards)]
    return [*names, *load_text_manifest(reader.path)["files"]]


def _lists_of(reader: CacheReader) -> dict[str, Mapping[str, Any] | None]:
    """Returns the files of the neighbour lists with their records; last the manifest, with None."""
    if reader.neighbors() is None:
        return {}
    manifest = json.loads((reader.path / NEIGHBORS_MANIFEST).read_bytes())
    return {**manifest["files"], NEIGHBORS_MANIFEST: None}


def _is_copied(
    reader: CacheReader,
    out: Path,
    head: Sequence[str],
    lists: Mapping[str, Mapping[str, Any] | None],
) -> bool:
    if not lists and (out / NEIGHBORS_MANIFEST).exists():
        return False
    whole = [*head, COMPLETE_FILE, *(name for name, record in lists.items() if record is None)]
    try:
        return all(
            (out / name).read_bytes() == (reader.path / name).read_bytes() for name in whole
        ) and not any(file_problem(out / name, record) for name, record in lists.items() if record)
    except FileNotFoundError:
        return False


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CacheError(f"{out} is a file, not a folder for an export")
    if not out.exists() or is_export(out):
        return
    foreign = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(LOCK_FILE))
    if foreign:
        raise CacheError(
            f"{out} is not an export and not empty (it holds '{foreign[0]}'): name another folder"
        )
