"""Weights from a hub: those that were fetched before, and what is kept of which they were.

open_clip's tables name a repository without its revision, and open_clip asks at every load what
the newest is. So what is here already is taken as it is, and a cache says which it had.
"""

import hashlib
from pathlib import Path, PurePosixPath

from huggingface_hub import try_to_load_from_cache

_USUAL = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def kept_weights(where: str) -> Path | None:
    """Returns a repository's weights as they were fetched before, or None; asks no network.

    Args:
        where: OWNER/NAME/FILE, or OWNER/NAME/ for the usual file, as open_clip's tables say.
    """
    repository, _, file = where.rpartition("/")
    for name in _names(file):
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def was_asked(repository: str, file: str) -> bool:
    """Returns True if a repository's file is kept here, or is known not to be in it."""
    return try_to_load_from_cache(repository, file) is not None


def weights_record(path: Path | None) -> dict[str, str]:
    """Returns what provenance keeps of a file of weights: its name and sha256, not where it lies.

    Of a file in a hub's cache also `hub`: the repository and its commit, OWNER/NAME@COMMIT. Empty
    for None: weights that no file holds.
    """
    if path is None:
        return {}
    with path.open("rb") as file:
        record = {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    # models--OWNER--NAME/snapshots/COMMIT/FILE
    for commit in path.parents:
        folder = commit.parent.parent.name
        if commit.parent.name == "snapshots" and folder.startswith("models--"):
            repository = folder.removeprefix("models--").replace("--", "/")
            record["hub"] = f"{repository}@{commit.name}"
    return record


def _names(file: str) -> tuple[str, ...]:
    """Returns the files that open_clip tries, in its order: no pickle where there is another."""
    if file in ("", *_USUAL):
        return _USUAL if file != _USUAL[0] else (file,)
    path = PurePosixPath(file)
    return (f"{path.stem}.safetensors", file) if path.suffix in (".bin", ".pth") else (file,)
