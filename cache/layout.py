"""The files at the head of a cache: CACHE.json, plan.json, text, provenance and COMPLETE.json."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray

from cache.durable import (
    dump_checked_json,
    file_problem,
    file_record,
    hash_file,
    load_checked_json,
    write_atomic,
)
from cache.faults import fault_point
from cache.location import CachePath, member
from cache.plan import Plan
from cache.rows import norm_problem
from cache.spec import SCHEMA, CorruptCacheError, StaleCacheError, fingerprint

CACHE_FILE = "CACHE.json"
PLAN_FILE = "plan.json"
PROVENANCE_FILE = "provenance.json"
COMPLETE_FILE = "COMPLETE.json"
QUARANTINE_FILE = "quarantine.jsonl"
TEXT_MANIFEST = "text/manifest.json"
REPAIR_NOTE = "repair.json"
_VOCABULARY_FILE = "text/vocabulary.json"
_EMBEDDINGS_FILE = "text/embeddings.npy"


@dataclass(frozen=True)
class Head:
    """CACHE.json: what the image data was made from."""

    schema: int
    fingerprint: str
    parts: Mapping[str, Any]

    @classmethod
    def load(cls, path: CachePath) -> Self:
        """Returns the head; raises FileNotFoundError, CorruptCacheError, StaleCacheError."""
        table = load_checked_json(path / CACHE_FILE)
        if table.get("schema") != SCHEMA:
            command = made_by(path, "dkdetr cache-teacher --split SPLIT")
            raise StaleCacheError(
                f"{path} has schema {table.get('schema')}, and this version reads schema {SCHEMA} "
                "(ground truth without padding): nothing of it can be taken over. "
                f"next: delete it and run again, or with another --out: {command}"
            )
        head = cls(**table)
        if fingerprint(head.parts) != head.fingerprint:
            raise CorruptCacheError(f"{path / CACHE_FILE}: the parts do not give the fingerprint")
        return head


@dataclass(frozen=True)
class Seal:
    """COMPLETE.json: written last of all; with it the cache is finished.

    `leaves` holds the hash of every committed file or of the manifest that vouches for it.
    `data_root` covers all but the text: what neighbour lists depend on.
    """

    schema: int
    fingerprint: str
    merkle_root: str
    data_root: str
    num_images: int
    num_regions: int
    num_shards: int
    leaves: Mapping[str, str]

    @classmethod
    def load(cls, path: CachePath) -> Self:
        """Returns the seal; raises FileNotFoundError, CorruptCacheError."""
        return cls(**load_checked_json(path / COMPLETE_FILE))

    def write(self, path: Path) -> None:
        """Seals the cache."""
        fault_point("seal.before_complete")
        write_atomic(path / COMPLETE_FILE, dump_checked_json(asdict(self)))
        fault_point("seal.after_complete")


def made_by(path: CachePath, otherwise: str) -> str:
    """Returns the command that made a cache, as its provenance tells, or another."""
    try:
        command = load_provenance(path).get("command")
    except (FileNotFoundError, CorruptCacheError):
        command = None
    return f"dkdetr {command}" if command else otherwise


def merkle_root(leaves: Mapping[str, str]) -> str:
    """Returns the sha256 Merkle root over `name -> hash`, taken in the order of the names."""
    level = [
        hashlib.sha256(b"\0" + name.encode() + b"\0" + leaves[name].encode()).digest()
        for name in sorted(leaves)
    ]
    while len(level) > 1:
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\1" + b"".join(pair)).digest() for pair in pairs]
    return level[0].hex() if level else hashlib.sha256(b"").hexdigest()


def seal_problems(
    path: CachePath, seal: Seal, *, without: Collection[str] = frozenset()
) -> list[str]:
    """Returns a line for each file under the seal that has changed, and for a wrong root.

    Files named `without` are not looked at.
    """
    problems: list[str] = []
    for name, wanted in seal.leaves.items():
        if name in without:
            continue
        problem = leaf_problem(path, name, wanted)
        if problem is not None:
            problems.append(problem)
    data = {name: leaf for name, leaf in seal.leaves.items() if name != TEXT_MANIFEST}
    if merkle_root(seal.leaves) != seal.merkle_root or merkle_root(data) != seal.data_root:
        problems.append(f"{path / COMPLETE_FILE}: the Merkle root does not fit its leaves")
    return problems


class Roots(NamedTuple):
    """What a cache was sealed with: over all, and over all but the text."""

    merkle_root: str
    data_root: str


def changed_rows(path: CachePath, old: Roots | None, new: Seal) -> tuple[str, ...]:
    """Returns a line if a cache that was sealed before was sealed again over other rows."""
    if old is None or old.data_root == new.data_root:
        return ()
    return (
        f"shards of {path} were lost and made again, to other bytes: its root was "
        f"{old.merkle_root} and is {new.merkle_root}; runs made from the old one are not its runs",
    )


def leaf_problem(path: CachePath, name: str, wanted: str) -> str | None:
    """Returns what is wrong with one small file under the seal, or None."""
    file = member(path, name)
    if not file.is_file():
        return f"{file} is missing"
    return None if hash_file(file) == wanted else f"{file} has changed since the cache was sealed"


def load_plan(path: CachePath) -> Plan:
    """Returns the plan of a cache; raises FileNotFoundError, CorruptCacheError."""
    return Plan.from_dict(load_checked_json(path / PLAN_FILE))


def write_provenance(path: Path, provenance: Mapping[str, Any]) -> None:
    """Writes who made the cache, where and when: kept, checked, and outside of the Merkle root."""
    write_atomic(path / PROVENANCE_FILE, dump_checked_json(dict(provenance)))


def load_provenance(path: CachePath) -> dict[str, Any]:
    """Returns what `write_provenance` wrote; raises FileNotFoundError, CorruptCacheError."""
    return load_checked_json(path / PROVENANCE_FILE)


def write_text_files(
    path: Path,
    metadata: Mapping[str, Any],
    embeddings: NDArray[Any],
    text_parts: Mapping[str, Any],
) -> None:
    """Writes text/: the vocabulary, its embeddings [C, D], and, last, the manifest of both.

    Raises:
        CorruptCacheError: an embedding is not of unit norm.
    """
    rows = np.asarray(embeddings, dtype="<f4")
    problem = norm_problem("text embeddings", rows) if rows.ndim == 2 else "not a matrix"
    if problem is not None:
        raise CorruptCacheError(f"the text must not be cached: {problem}")
    folder = path / "text"
    folder.mkdir(exist_ok=True)
    (path / TEXT_MANIFEST).unlink(missing_ok=True)
    fault_point("text.before_write")
    vocabulary = json.dumps(metadata, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path / _VOCABULARY_FILE, vocabulary.encode() + b"\n")
    buffer = BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    write_atomic(path / _EMBEDDINGS_FILE, buffer.getvalue())
    fault_point("text.before_manifest")
    names = (_VOCABULARY_FILE, _EMBEDDINGS_FILE)
    manifest = {
        "fingerprint": fingerprint(text_parts),
        "parts": text_parts,
        "files": {name: file_record(path / name) for name in names},
    }
    write_atomic(path / TEXT_MANIFEST, dump_checked_json(manifest))


def load_text_manifest(path: CachePath) -> dict[str, Any]:
    """Returns fingerprint, parts and files of the text; FileNotFoundError, CorruptCacheError."""
    return load_checked_json(path / TEXT_MANIFEST)


def text_problems(path: CachePath) -> list[str]:
    """Returns a line for each file of the text that is not as committed."""
    try:
        manifest = load_text_manifest(path)
    except FileNotFoundError:
        return [f"{path / TEXT_MANIFEST} is missing"]
    except CorruptCacheError as error:
        return [str(error)]
    files: Mapping[str, Any] = manifest["files"]
    problems = {name: file_problem(member(path, name), file) for name, file in files.items()}
    return [f"{path / name} {problem}" for name, problem in problems.items() if problem]


def load_text_files(path: CachePath) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Returns the vocabulary's metadata and float32 embeddings [C, D], hashes checked."""
    problems = text_problems(path)
    if problems:
        raise CorruptCacheError(problems[0])
    metadata = cast("dict[str, Any]", json.loads((path / _VOCABULARY_FILE).read_bytes()))
    data = BytesIO((path / _EMBEDDINGS_FILE).read_bytes())
    return metadata, np.load(data, allow_pickle=False)
