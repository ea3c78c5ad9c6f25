"""`dkdetr fetch`: what a teacher and an experiment need from the network, once, for good.

Downloads go where the libraries look anyway; a bundle carries them to a machine without a network
and puts them into the same places there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkdetr.errors import UsageError
from dkdetr.experiment_file import load_experiment
from dkdetr.student.backbone import fetch_imagenet_weights, imagenet_folder
from pipeline.bundle import BundleFile, install_bundle, write_bundle
from pipeline.teacher import fetch_teacher
from pipeline.url_weights import url_weights_folder

_TEXT_SUFFIXES = {".json", ".txt", ".model", ".tiktoken"}


@dataclass(frozen=True)
class Fetched:
    """What is there now, and what was written."""

    files: tuple[str, ...]
    new: tuple[str, ...]
    total_bytes: int
    bundle: Path | None

    def lines(self) -> list[str]:
        """Returns it for people."""
        told = [f"{'new' if name in self.new else 'was there'}  {name}" for name in self.files]
        if not self.files:
            told.append("nothing to fetch: no part of this comes from a network")
        if self.bundle:
            told.append(f"{self.bundle}: {self.total_bytes / 1e6:.1f} MB; there: dkdetr fetch "
                        f"--from-bundle {self.bundle.name}")  # fmt: skip
        return told

    def as_json(self) -> dict[str, Any]:
        """Returns the same as a plain table."""
        return {**vars(self), "bundle": str(self.bundle) if self.bundle else None}


def fetch(
    teacher: str | None, experiment: str | None, bundle: Path | None, say: Callable[[str], None]
) -> Fetched:
    """Returns what a teacher and an experiment's backbone need, after downloading what is not here.

    Args:
        teacher: its specification; None: no teacher.
        experiment: a shipped name or a TOML file; None: no backbone.
        bundle: a tar to write, if there is anything to put into it; None: none is wanted.
        say: takes a line before each download.

    Raises:
        DkdetrError: unknown names, or what cannot be reached.
    """
    before = _snapshot()
    files: list[BundleFile] = []
    made_for: dict[str, str] = {}
    if teacher is not None:
        say(f"teacher {teacher}")
        files += _teacher_files(teacher)
        made_for["teacher"] = teacher
    if experiment is not None:
        backbone = load_experiment(experiment).config.student.backbone
        made_for["experiment"] = experiment
        if backbone.arch == "resnet50" and backbone.weights == "imagenet":
            say("ResNet-50 of torchvision")
            weights = fetch_imagenet_weights()
            files.append(BundleFile(f"torch/{weights.name}", weights))
    bundle = bundle if files else None  # an empty one would look like a full one
    manifest = write_bundle(bundle, files, made_for) if bundle else None
    files.sort(key=lambda each: each.name)
    new = tuple(each.name for each in files if each.source not in before)
    return Fetched(
        tuple(each.name for each in files), new, manifest.total_bytes if manifest else 0, bundle
    )


def install(bundle: Path) -> Fetched:
    """Returns what a bundle holds, after putting it where the libraries look.

    Raises:
        DkdetrError: see `install_bundle`.
    """
    manifest, new = install_bundle(bundle, places())
    return Fetched(tuple(sorted(manifest.sizes)), new, manifest.total_bytes, None)


def places() -> dict[str, Path]:
    """Returns the folder of each of a bundle's places: where the loaders look."""
    from huggingface_hub import constants

    return {
        "hub": Path(constants.HF_HUB_CACHE),
        "clip": url_weights_folder(),
        "torch": imagenet_folder(),
    }


def _teacher_files(spec: str) -> list[BundleFile]:
    weights, repositories = fetch_teacher(spec)
    found: dict[str, BundleFile] = {}
    if weights is not None:
        for each in (weights, *_reference_of(weights)):
            found[_name(each)] = BundleFile(_name(each), each)
    for repository in repositories:
        folder = places()["hub"] / f"models--{repository.replace('/', '--')}"
        reference = folder / "refs" / "main"
        if not reference.is_file():
            continue  # it came with the package
        snapshot = folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
        texts = [path for path in snapshot.rglob("*") if path.suffix in _TEXT_SUFFIXES]
        for each in (reference, *texts):
            found[_name(each)] = BundleFile(_name(each), each)
    return list(found.values())


def _reference_of(weights: Path) -> list[Path]:
    """Returns the file that says which revision a repository's `main` is, if it is from a hub."""
    repository = next((each.parent for each in weights.parents if each.name == "snapshots"), None)
    if repository is None or not (repository / "refs" / "main").is_file():
        return []
    return [repository / "refs" / "main"]


def _name(path: Path) -> str:
    for place, folder in places().items():
        if path.is_relative_to(folder):
            return f"{place}/{path.relative_to(folder).as_posix()}"
    raise UsageError(f"'{path}' lies in none of the places where libraries look")


def _snapshot() -> set[Path]:
    return {path for folder in places().values() if folder.is_dir() for path in folder.rglob("*")}
