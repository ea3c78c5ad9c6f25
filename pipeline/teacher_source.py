"""What a teacher's spec names: a model of open_clip and where its weights come from.

MODEL:PRETRAINED    open_clip's tag, from its cache or the hub
MODEL:/path/FILE    .safetensors, .pt, .bin or .pth
MODEL:/path/FOLDER  weights, with `open_clip_config.json` or `MODEL.json` if open_clip does
                    not know MODEL
MODEL:random        seeded random weights, for trials
pictograms          the small teacher that comes with the package
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dkdetr.errors import CorruptArtefactError, DataError, UsageError

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_FAVOURITES = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")


@dataclass(frozen=True)
class TeacherSource:
    """A spec, taken apart; `path` is the weights' file, a tag's once it is loaded."""

    spec: str
    model: str
    kind: Literal["tag", "file", "random"]
    tag: str = ""
    path: Path | None = None
    model_json: Path | None = None
    """A model configuration in open_clip's form that defines `model`."""
    folder_config: Mapping[str, Any] | None = None
    """What an `open_clip_config.json` beside the weights says."""


def parse_teacher_spec(spec: str) -> TeacherSource:
    """Returns what `spec` names.

    Raises:
        UsageError: the spec has another form.
        DataError: a path that holds no weights.
    """
    if spec == "pictograms":
        spec = _shipped_spec()
    model, colon, source = spec.partition(":")
    if not colon or not model or not source:
        raise UsageError(
            f"teacher '{spec}' is not MODEL:PRETRAINED, MODEL:/path/to/weights, MODEL:random or "
            "'pictograms'; for example ViT-B-32-quickgelu:openai"
        )
    if source == "random":
        return TeacherSource(spec, model, "random")
    if not names_files(source):
        return TeacherSource(spec, model, "tag", tag=source)
    weights = _weights_file(Path(source).expanduser(), spec)
    folder = weights.parent
    model_json = folder / f"{model}.json"
    return TeacherSource(
        spec,
        model,
        "file",
        path=weights,
        model_json=model_json if model_json.is_file() else None,
        folder_config=_folder_config(folder),
    )


def names_files(source: str) -> bool:
    """Returns True if what follows MODEL: is a path, not `random` nor a tag."""
    return source not in ("", "random") and ("/" in source or Path(source).exists())


def openai_evidence(path: Path, known_sha256: frozenset[str]) -> str | None:
    """Returns why the weights in `path` must be OpenAI's, which want QuickGELU; else None.

    Args:
        path: the weights.
        known_sha256: hashes of the files that OpenAI published.
    """
    # A hub's cache names the repository three folders up: models--timm--X.openai/snapshots/HASH.
    for part in path.parts[-4:]:
        if "openai" in part.lower():
            return f"'{part}' is in their path"
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() in known_sha256:
                return "their sha256 is that of OpenAI's file"
    return None


def _shipped_spec() -> str:
    folder = Path(str(files("pipeline.pictograms"))) / "assets"
    configs = [
        path for path in sorted(folder.glob("*.json")) if "vision_cfg" in _read_json(path, {})
    ]
    if not configs:
        raise DataError(
            f"the shipped pictogram teacher is missing from '{folder}': reinstall the package"
        )
    return f"{configs[0].stem}:{configs[0].with_suffix('.safetensors')}"


def _weights_file(path: Path, spec: str) -> Path:
    if path.is_file():
        if path.suffix not in _WEIGHT_SUFFIXES:
            known = ", ".join(_WEIGHT_SUFFIXES)
            raise DataError(f"teacher '{spec}': '{path.name}' is none of {known}")
        return path
    if not path.is_dir():
        raise DataError(f"teacher '{spec}': no file or folder '{path}'")
    found = sorted(entry for entry in path.iterdir() if entry.suffix in _WEIGHT_SUFFIXES)
    chosen = [
        entry
        for stem in _FAVOURITES
        for suffix in _WEIGHT_SUFFIXES
        for entry in found
        if entry.name == stem + suffix
    ]
    candidates = chosen[:1] or [entry for entry in found if entry.suffix == ".safetensors"] or found
    if len(candidates) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise DataError(
            f"teacher '{spec}': the folder must hold one file of weights, found {names}; "
            f"name the file itself: --teacher {spec.partition(':')[0]}:{path}/FILE"
        )
    return candidates[0]


def _folder_config(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "open_clip_config.json"
    if not path.is_file():
        return None
    config = _read_json(path, None)
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise CorruptArtefactError(f"'{path}' is no open_clip configuration: no 'model_cfg' in it")
    return config


def _read_json(path: Path, fallback: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        return fallback
