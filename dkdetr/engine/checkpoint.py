"""Checkpoints: written whole or not at all, hashed, and loaded without running anyone's code.

The only file that loads checkpoints of ours with `torch.load`. One is a `.pt` file of tensors and
plain types beside a `.json` marker with its size and hash; the marker is written last, and a file
without a fitting marker does not count.
"""

import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  the class of torch's refusal, nothing is unpickled
from typing import IO, Any, BinaryIO, cast

import torch

from cache.durable import hash_file
from cache.faults import fault_point
from dkdetr.atomic_file import atomic_file, write_text
from dkdetr.config import ExperimentConfig
from dkdetr.data.vocabulary import Vocabulary, from_metadata
from dkdetr.errors import CorruptArtefactError, DataError, UsageError
from dkdetr.experiment_file import config_from_dict, config_to_dict
from dkdetr.student.build import build_student
from dkdetr.student.detector import DKDETR

_FORMAT = 2


@dataclass(frozen=True)
class Progress:
    """How far a run has come: the next batch is number `batch` of `epoch`."""

    epoch: int
    batch: int
    iteration: int


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    student: Mapping[str, torch.Tensor]
    average: Mapping[str, torch.Tensor]
    """The running average of the weights; empty without `optim.ema_decay`."""
    optimizer: Mapping[str, Any]
    step: Mapping[str, Any]
    """The loss scaler's state and what belongs to it."""
    progress: Progress
    config: ExperimentConfig
    vocabulary: Vocabulary
    cache_fingerprint: str
    cache_split: str


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes a checkpoint, returns its path, and removes all but the newest `keep` whole ones."""
    path = folder / f"step_{checkpoint.progress.iteration:08d}.pt"
    write_checkpoint(path, checkpoint)
    # Files of later iterations are leftovers of a run that was set back, those without a marker
    # of a kill: they count for nothing.
    files = sorted(folder.glob("step_*.pt"))
    kept = [file for file in files if file <= path and _marker_of(file).is_file()][-keep:]
    for old in files:
        if old not in kept:
            _marker_of(old).unlink(missing_ok=True)
            fault_point("checkpoint.before_prune")
            old.unlink()
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)
    return path


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint and, once it is on the disk, its marker."""
    vocabulary = checkpoint.vocabulary
    state = {
        "format": _FORMAT,
        "student": dict(checkpoint.student),
        "average": dict(checkpoint.average),
        "optimizer": dict(checkpoint.optimizer),
        "step": dict(checkpoint.step),
        "progress": vars(checkpoint.progress),
        "config": json.dumps(config_to_dict(checkpoint.config)),
        "vocabulary": json.dumps(vocabulary.metadata()),
        "text_embeddings": torch.from_numpy(vocabulary.embeddings.copy()),
        "cache_fingerprint": checkpoint.cache_fingerprint,
        "cache_split": checkpoint.cache_split,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # While the file changes its old marker must not vouch for it.
    _marker_of(path).unlink(missing_ok=True)
    fault_point("checkpoint.before_data")
    with atomic_file(path) as file:
        _save_tensors(state, file)
        fault_point("checkpoint.before_rename")
    fault_point("checkpoint.before_marker")
    marker = {
        "size": path.stat().st_size,
        "xxh3_128": hash_file(path),
        "iteration": checkpoint.progress.iteration,
    }
    write_text(_marker_of(path), json.dumps(marker))
    fault_point("checkpoint.after_marker")


def load_checkpoint(path: Path) -> Checkpoint:
    """Returns a checkpoint after checking its size and hash.

    Raises:
        CorruptArtefactError: no marker, another size or hash, or not a checkpoint of ours.
    """
    problem = _problem_of(path)
    if problem:
        raise CorruptArtefactError(f"checkpoint '{path}' {problem}; use an older one of its folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except (UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        first_line = str(error).splitlines()[0]
        raise CorruptArtefactError(f"'{path}' is not a checkpoint: {first_line}") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CorruptArtefactError(
            f"'{path}' is not a checkpoint of this version (format {_FORMAT})"
        )
    return Checkpoint(
        student=state["student"],
        average=state["average"],
        optimizer=state["optimizer"],
        step=state["step"],
        progress=Progress(**state["progress"]),
        config=config_from_dict(json.loads(state["config"])),
        vocabulary=from_metadata(json.loads(state["vocabulary"]), state["text_embeddings"].numpy()),
        cache_fingerprint=state["cache_fingerprint"],
        cache_split=state["cache_split"],
    )


def load_latest(folder: Path) -> tuple[Path, Checkpoint] | None:
    """Returns the newest checkpoint that is whole, read and hashed once, and its path, or None.

    Incomplete and damaged ones are passed over, with a line that says so.
    """
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            return path, load_checkpoint(path)
        except CorruptArtefactError as error:
            print(f"passed over: {error}", file=sys.stderr)
    return None


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint that is whole, or None; incomplete ones are passed over."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        if _problem_of(path) is None:
            return path
    return None


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    """Returns the checkpoint that a run folder or a file name means.

    Raises:
        DataError: there is none.
    """
    if run_or_checkpoint.suffix == ".pt":
        return _existing(run_or_checkpoint)
    latest = latest_checkpoint(_checkpoints_of(run_or_checkpoint))
    if latest is None:
        raise _no_checkpoint(run_or_checkpoint)
    return latest


def open_checkpoint(run_or_checkpoint: Path) -> tuple[Path, Checkpoint]:
    """Returns path and content of the checkpoint that a run folder or a file name means.

    Raises:
        DataError: there is none.
        CorruptArtefactError: the named file is damaged.
    """
    if run_or_checkpoint.suffix == ".pt":
        return _existing(run_or_checkpoint), load_checkpoint(run_or_checkpoint)
    latest = load_latest(_checkpoints_of(run_or_checkpoint))
    if latest is None:
        raise _no_checkpoint(run_or_checkpoint)
    return latest


def load_student(checkpoint: Checkpoint, *, averaged: bool = False) -> DKDETR:
    """Returns the student of a checkpoint, in evaluation mode, on the CPU.

    Args:
        checkpoint: from `open_checkpoint`.
        averaged: with the running average of the weights instead of the last.

    Raises:
        UsageError: the run kept no average.
    """
    if averaged and not checkpoint.average:
        raise UsageError(
            "this run kept no average of its weights: train with --set optim.ema_decay=0.9998, "
            "or leave --ema out"
        )
    text_dim = checkpoint.vocabulary.embeddings.shape[1]
    student = build_student(checkpoint.config, text_dim=text_dim, load_weights=False)
    student.load_state_dict(dict(checkpoint.average if averaged else checkpoint.student))
    return student.eval()


class _RememberingFile:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save_tensors(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Writes a state as torch does, but lets a full disk say so.

    When a write fails, torch's archive writer raises a RuntimeError about file positions instead.
    """
    remembering = _RememberingFile(file)
    try:
        torch.save(state, cast(IO[bytes], remembering))
    except RuntimeError:
        if remembering.error is None:
            raise
        raise remembering.error from None


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"no checkpoint '{file}'")
    return file


def _checkpoints_of(run: Path) -> Path:
    if not run.is_dir():
        raise DataError(f"no run folder '{run}'")
    return run / "checkpoints"


def _no_checkpoint(run: Path) -> DataError:
    return DataError(
        f"'{run}' holds no complete checkpoint; train one: dkdetr train --cache CACHE --run {run}"
    )


def _marker_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _problem_of(path: Path) -> str | None:
    marker_path = _marker_of(path)
    if not marker_path.is_file():
        return "has no marker file: it was not written to its end"
    try:
        marker = json.loads(marker_path.read_bytes())
        wanted = (marker["size"], marker["xxh3_128"])
    except (ValueError, KeyError, TypeError):
        return "has an unreadable marker file"
    if path.stat().st_size != wanted[0]:
        return f"has {path.stat().st_size} bytes, its marker says {wanted[0]}"
    if hash_file(path) != wanted[1]:
        return "does not have the hash its marker says: the file is damaged"
    return None
