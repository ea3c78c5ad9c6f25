"""Beginning a cache or finding one begun: is the folder ours, the cache the same, the seal good."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.arrays import DATA_FOLDER
from cache.durable import dump_checked_json, load_checked_json, sync_folder, write_atomic
from cache.exported import refuse_export
from cache.faults import fault_point
from cache.layout import (
    CACHE_FILE,
    COMPLETE_FILE,
    PLAN_FILE,
    PROVENANCE_FILE,
    QUARANTINE_FILE,
    REPAIR_NOTE,
    Head,
    Roots,
    Seal,
    load_plan,
    load_provenance,
    seal_problems,
    write_provenance,
)
from cache.lock import LOCK_FILE
from cache.manifest import MANIFEST_FOLDER, committed_shards
from cache.neighbor_lists import NEIGHBORS_FOLDER
from cache.plan import Plan
from cache.spec import CacheError, CorruptCacheError, StaleCacheError, diff_parts
from cache.zarr_files import metadata_files

_PLACES = ("split", "data_root", "teacher_spec", "teacher_weights", "command", "request")
"""What provenance says of where things lie: the latest command knows best."""


def refuse_foreign_folder(path: Path) -> None:
    """Returns if `path` is free, or a cache begun or finished; else raises CacheError."""
    if path.exists() and not path.is_dir():
        raise CacheError(f"{path} is a file, not a folder for a cache")
    refuse_export(path)
    if not path.exists() or (path / CACHE_FILE).exists():
        return
    # Prefixes: a kill leaves NAME.*.partial of any of them, of CACHE.json too.
    ours = (
        LOCK_FILE, CACHE_FILE, PLAN_FILE, PROVENANCE_FILE, DATA_FOLDER, MANIFEST_FOLDER, "text",
        "proposals", REPAIR_NOTE, QUARANTINE_FILE, COMPLETE_FILE, NEIGHBORS_FOLDER,
    )  # fmt: skip
    foreign = sorted(e.name for e in path.iterdir() if not e.name.startswith(ours))
    if foreign:
        raise CacheError(
            f"{path} is not a cache and not empty (it holds '{foreign[0]}'): name another folder"
        )


def check_same_cache(path: Path, head: Head, plan: Plan) -> None:
    """Returns if the cache at `path` was begun with this head and plan, else StaleCacheError."""
    found = Head.load(path)
    if found.fingerprint != head.fingerprint:
        raise stale_cache(path, diff_parts(found.parts, head.parts))
    try:
        planned = load_plan(path)
    except (FileNotFoundError, CorruptCacheError) as error:
        missing = isinstance(error, FileNotFoundError)
        # Taken out by `cache repair`: the seal's root says whether it comes back, or, where there
        # was no seal, all rows went with it.
        rows = committed_shards(path) or (path / COMPLETE_FILE).exists()
        if missing and ((path / REPAIR_NOTE).is_file() or not rows):
            return
        state = "is missing" if missing else "has changed"
        raise CorruptCacheError(
            f"{path / PLAN_FILE} {state}: nothing says any more which row holds which image. "
            f"next: dkdetr cache repair {path}"
        ) from None
    wanted = json.loads(json.dumps(plan.to_dict()))
    if planned.to_dict() != wanted:
        lines = "\n  ".join(diff_parts(planned.to_dict(), wanted))
        raise StaleCacheError(
            f"{path} was planned with other images or shapes, though its parts are the same:\n"
            f"  {lines}\nnext: the same command with another --out, or delete this cache first"
        )


def stale_cache(
    path: Path, differences: Sequence[str], *, repairing: bool = False
) -> StaleCacheError:
    """Returns the error of a cache whose parts differ from those wanted, a line each."""
    lines = "\n  ".join(differences)
    ending = (
        "Its embeddings would be wrong for this command and nothing would fail. "
        "next: the same command with another --out, or delete this cache first"
    )
    if repairing:
        ending = (
            "What is made again would be of another cache, so nothing was taken out of this one. "
            "next: give the pictures, proposals and teacher it was made from"
        )
    return StaleCacheError(f"{path} was made from other inputs:\n  {lines}\n{ending}")


def repair_goal(path: Path) -> dict[str, str]:
    """Returns what a repair that has not come to its end is to arrive at; empty if none is known.

    Keys: merkle_root, fingerprint and, but in notes of before, data_root.
    """
    try:
        return load_checked_json(path / REPAIR_NOTE)
    except (FileNotFoundError, CorruptCacheError):
        return {}


def check_repair_goal(path: Path, head: Head) -> None:
    """Returns if `head` is what a repair without a CACHE.json is to arrive at, or there is none."""
    goal = repair_goal(path)
    if goal and goal["fingerprint"] != head.fingerprint:
        raise StaleCacheError(
            f"{path} is being repaired, and was made from other inputs (its CACHE.json, which "
            f"would tell which, was damaged):\n  fingerprint  cache: {goal['fingerprint']}  "
            f"wanted: {head.fingerprint}\n"
            "next: give the pictures, proposals and teacher it was made from"
        )


def write_head(path: Path, head: Head, plan: Plan, provenance: Mapping[str, Any]) -> None:
    """Writes the head's files where they are not already right; CACHE.json last."""
    table = {"schema": head.schema, "fingerprint": head.fingerprint, "parts": dict(head.parts)}
    files = {PLAN_FILE: dump_checked_json(plan.to_dict()), **metadata_files(plan)}
    files[CACHE_FILE] = dump_checked_json(table)
    (path / MANIFEST_FOLDER).mkdir(exist_ok=True)
    try:
        kept = load_provenance(path)
    except (FileNotFoundError, CorruptCacheError):
        kept = None
    places = {key: provenance[key] for key in _PLACES if key in provenance}
    current = {**(provenance if kept is None else kept), **places}
    if current != kept:
        write_provenance(path, current)
    for name, data in files.items():
        if not _same_json(path / name, data):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            fault_point("create.before_file")
            write_atomic(path / name, data)


def _same_json(file: Path, data: bytes) -> bool:
    try:
        return json.loads(file.read_bytes()) == json.loads(data)
    except (FileNotFoundError, ValueError):
        return False


def readable_seal(path: Path) -> Seal | None:
    """Returns the seal, whether or not it still holds; None if there is none that can be read."""
    try:
        return Seal.load(path)
    except (FileNotFoundError, CorruptCacheError):
        return None


def break_bad_seal(path: Path) -> Roots | None:
    """Removes COMPLETE.json if a file it vouches for has changed: sealing again mends that.

    Returns what the cache was sealed with, by a seal good or bad or the note of a repair that has
    not come to its end; None if neither can be read.
    """
    seal = readable_seal(path)
    if (path / COMPLETE_FILE).exists() and (seal is None or seal_problems(path, seal)):
        (path / COMPLETE_FILE).unlink()
        sync_folder(path)
    return _noted_roots(path) if seal is None else Roots(seal.merkle_root, seal.data_root)


def _noted_roots(path: Path) -> Roots | None:
    goal = repair_goal(path)
    data_root = goal.get("data_root")
    return Roots(goal["merkle_root"], data_root) if data_root else None
