"""What makes a folder an export of a cache: EXPORT.json, beside a copy of the cache's head."""

from pathlib import Path

from cache.durable import load_checked_json
from cache.layout import Seal
from cache.location import CachePath
from cache.mapped import FlatReader
from cache.plan import Plan
from cache.spec import SCHEMA, CacheError, StaleCacheError, UnsealedCacheError

EXPORT_FILE = "EXPORT.json"
MAPPED_FOLDER = "mapped"


def is_export(path: CachePath) -> bool:
    """Returns True if the folder is an export, finished or not."""
    return (path / EXPORT_FILE).is_file()


def require_finished_export(path: CachePath) -> None:
    """Returns if an export is whole, else raises UnsealedCacheError."""
    if not load_checked_json(path / EXPORT_FILE)["finished"]:
        raise UnsealedCacheError(
            f"the export {path} was not finished; next: dkdetr cache export CACHE {path}"
        )


def open_export(path: CachePath, plan: Plan, seal: Seal) -> FlatReader:
    """Returns the reader of an export's mapped files.

    Raises:
        CorruptCacheError: a file is not what was exported.
        StaleCacheError: it belongs to another cache than the one whose seal lies beside it.
        CacheError: it lies behind a URL.
    """
    if not isinstance(path, Path):
        raise CacheError(f"{path} is an export, to be mapped: copy it to a local disk")
    record = load_checked_json(path / EXPORT_FILE)
    if record["schema"] != SCHEMA or record["merkle_root"] != seal.merkle_root:
        raise StaleCacheError(
            f"{path} was exported from another cache than the one whose seal lies beside it:\n"
            f"  schema       export: {record['schema']}  seal: {seal.schema}\n"
            f"  merkle_root  export: {record['merkle_root']}  seal: {seal.merkle_root}\n"
            f"next: dkdetr cache export CACHE {path}"
        )
    return FlatReader(path / MAPPED_FOLDER, record, plan)


def refuse_export(path: Path) -> None:
    """Raises CacheError if the folder is an export: nothing can be made there."""
    if is_export(path):
        raise CacheError(f"{path} is an export of a cache, made to be read; name another folder")
