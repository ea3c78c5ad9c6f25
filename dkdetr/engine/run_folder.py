"""A run's folder: what it was made with, and the refusal to mix two experiments in one."""

import hashlib
import json
import platform
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dkdetr.atomic_file import write_text
from dkdetr.config import ExperimentConfig
from dkdetr.defaults import DEFAULT_RUNS
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError
from dkdetr.experiment_file import config_from_dict, deciding_settings, dump_toml

RUNS = Path(DEFAULT_RUNS)
"""Where runs lie if nothing else is said."""

_AVERAGED = "-ema"
_MARKERS = "step_*.json"
_UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f]+')


@dataclass(frozen=True)
class RunFolder:
    """`config.toml metrics.jsonl checkpoints/ eval/ run.json`, at times `logs/` and more."""

    path: Path

    @classmethod
    def of_checkpoint(cls, path: Path) -> "RunFolder":
        """Returns the run that a checkpoint, or its marker, lies in."""
        return cls(path.parent.parent)

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def dumps(self) -> Path:
        """The folder of reports on steps whose loss was not finite."""
        return self.path / "nonfinite"

    @property
    def provenance(self) -> Path:
        """Cache, seed, device and command of the first start, and `starts`: each, with versions."""
        return self.path / "run.json"

    @property
    def goes_on(self) -> bool:
        """Whether a run is there that has saved: the next start goes on, and keeps its record."""
        return self.config.is_file() and any(self.checkpoints.glob(_MARKERS))

    def read_provenance(self) -> dict[str, Any]:
        """Returns what `provenance` holds; nothing if it is not there: a checkpoint may have been
        brought from elsewhere alone."""
        if not self.provenance.is_file():
            return {}
        return json.loads(self.provenance.read_text(encoding="utf-8"))

    def evaluation(self, split: str, *, averaged: bool = False) -> Path:
        """Returns where what was measured on a split lies; apart, of the average of the weights."""
        return self.path / "eval" / (split_folder_name(split) + (_AVERAGED if averaged else ""))

    def evaluations(self, *, averaged: bool = False) -> list[Path]:
        """Returns the folders there are of the last weights, or of their average, in order."""
        found = sorted(path for path in (self.path / "eval").glob("*") if path.is_dir())
        return [path for path in found if path.name.endswith(_AVERAGED) == averaged]

    def newest_step(self) -> int | None:
        """Returns the iteration of the newest checkpoint, by the markers' names; None without."""
        markers = sorted(self.checkpoints.glob(_MARKERS))
        return int(markers[-1].stem.removeprefix("step_")) if markers else None


def open_run(path: Path, config: ExperimentConfig, provenance: dict[str, Any]) -> RunFolder:
    """Returns the folder, made new or found with the same settings and cache.

    Until a checkpoint is there nothing of a run goes on, and what it is made with is said anew.

    Raises:
        MismatchError: it holds a run with other settings or another cache, lists what differs; or
            a run that began afresh, and this one is to begin from a burn-in.
    """
    run = RunFolder(path)
    if run.config.is_file():
        _refuse_other_settings(run, config)
        _refuse_other_cache(run, provenance)
        if run.goes_on:
            _refuse_late_burn_in(run, provenance)
            return run
    write_text(run.provenance, json.dumps(provenance, indent=2) + "\n")
    write_text(run.config, dump_toml(config))
    return run


def portable_name(name: str) -> str:
    """Returns a name as a folder's on any file system: what Windows refuses becomes `-`."""
    return _UNSAFE.sub("-", name).rstrip(" .") or "-"


def split_folder_name(split: str) -> str:
    """Returns a split's name as a folder's; a user's own is shortened to its file's name."""
    if ":" not in split:
        return split
    kind, _, places = split.partition(":")
    digest = hashlib.sha256(places.encode()).hexdigest()[:6]
    return portable_name(f"{kind}-{Path(places.rpartition(':')[2]).stem}-{digest}")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the versions and the device that figures of this run belong to."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def newest_run(runs: Path) -> Path | None:
    """Returns the run folder with the newest checkpoint below `runs`, or None."""
    markers = sorted(runs.glob(f"*/checkpoints/{_MARKERS}"), key=lambda path: path.stat().st_mtime)
    return RunFolder.of_checkpoint(markers[-1]).path if markers else None


def require_newest_run(hint: str) -> Path:
    """Returns the newest run below `runs/`; raises DataError with a hint if there is none."""
    run = newest_run(RUNS)
    if run is None:
        raise DataError(f"no run below '{RUNS}/'; {hint}")
    return run


def _refuse_other_settings(run: RunFolder, config: ExperimentConfig) -> None:
    try:
        there = tomllib.loads(run.config.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise CorruptArtefactError(f"'{run.config}' is damaged: {error}") from None
    before, now = deciding_settings(config_from_dict(there)), deciding_settings(config)
    different = [
        f"  {key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if different:
        raise MismatchError(
            f"'{run.path}' holds a run with other settings:\n" + "\n".join(different)
            + "\nname another folder with --run, or leave --run out"
        )  # fmt: skip


def _refuse_late_burn_in(run: RunFolder, provenance: dict[str, Any]) -> None:
    if provenance.get("started_from") and run.read_provenance().get("started_from") == "":
        raise MismatchError(
            f"'{run.path}' holds a run that began afresh, and would go on as that: name another "
            f"folder with --run to begin from '{provenance['started_from']}', or leave --from out"
        )


def _refuse_other_cache(run: RunFolder, provenance: dict[str, Any]) -> None:
    before = run.read_provenance()
    for key in ("cache_fingerprint", "vocabulary_hash"):
        if before.get(key) != provenance.get(key):
            raise MismatchError(
                f"'{run.path}' was trained with another cache: {key} {before.get(key)} there, "
                f"{provenance.get(key)} here; its targets would change midway. "
                "Name another folder with --run, or train on the first cache again"
            )
