"""Exporting a cache to mapped files, for file systems that are slow at many small reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache.durable import dump_checked_json, load_checked_json, sweep_partial_files, write_atomic
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
    leaves an unfinished one, and the same call begins anew.

    Raises:
        CacheError: `out` is something else, or the cache is itself an export.
        CorruptCacheError: a shard is not what was committed.
        DiskFullError: no room.
        CacheLockedError: another process exports to `out`.
    """
    if reader.is_export:
        raise CacheError(f"{reader.path} is an export already: copy the folder")
    _refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    with Lease(out):
        sweep_partial_files(out)
        if _is_done(reader, out):
            return False
        # From here on the folder is known as an export, and as an unfinished one.
        write_atomic(out / EXPORT_FILE, dump_checked_json({"finished": False}))
        _copy_head(reader, out)
        record = write_flat(out / MAPPED_FOLDER, reader.plan, reader.source)
        root = reader.info.merkle_root
        table = {"finished": True, "schema": SCHEMA, "merkle_root": root, **record}
        write_atomic(out / EXPORT_FILE, dump_checked_json(table))
    return True


def _is_done(reader: CacheReader, out: Path) -> bool:
    try:
        record = load_checked_json(out / EXPORT_FILE)
        if record.get("merkle_root") != reader.info.merkle_root:
            return False
        return not FlatReader(out / MAPPED_FOLDER, record, reader.plan).problems()
    except (FileNotFoundError, CorruptCacheError):
        return False


def _copy_head(reader: CacheReader, out: Path) -> None:
    names = [CACHE_FILE, PLAN_FILE, PROVENANCE_FILE, QUARANTINE_FILE, TEXT_MANIFEST]
    names += [manifest_file(shard) for shard in range(reader.plan.num_shards)]
    names += list(load_text_manifest(reader.path)["files"])
    if reader.neighbors() is not None:
        lists: Mapping[str, Any] = json.loads((reader.path / NEIGHBORS_MANIFEST).read_bytes())
        names += [*lists["files"], NEIGHBORS_MANIFEST]
    for name in [*names, COMPLETE_FILE]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, (reader.path / name).read_bytes())


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
