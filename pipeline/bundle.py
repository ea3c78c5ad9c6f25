"""Bundles: files for machines without a network, as one tar with a manifest of hashes in front.

What is unpacked is believed in nothing: names, kinds, sizes and hashes are checked, all of them
before the first file appears.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dkdetr.atomic_file import atomic_file
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError

MANIFEST = "MANIFEST.json"
_FORMAT = "dkdetr-bundle-1"
_LARGEST_MANIFEST = 1 << 20
_PIECE = 1 << 20


@dataclass(frozen=True)
class BundleFile:
    """A file: PLACE/path/in/it, and where it lies here."""

    name: str
    source: Path


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds: sizes and sha256 by name, and what it was made for."""

    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    made_for: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """The bytes of all files."""
        return sum(self.sizes.values())


def write_bundle(path: Path, files: Sequence[BundleFile], made_for: Mapping[str, str]) -> Manifest:
    """Returns the manifest of the bundle that it writes, atomically; same files, same bytes."""
    ordered = sorted(files, key=lambda each: each.name)
    manifest = Manifest(
        {each.name: each.source.stat().st_size for each in ordered},
        {each.name: _sha256(each.source) for each in ordered},
        made_for,
    )
    text = json.dumps({"format": _FORMAT, **vars(manifest)}, indent=2, sort_keys=True).encode()
    with atomic_file(path, large=True) as raw, tarfile.open(fileobj=raw, mode="w|") as tar:
        tar.addfile(_member(MANIFEST, len(text)), io.BytesIO(text))
        for each in ordered:
            with each.source.open("rb") as content:
                tar.addfile(_member(each.name, manifest.sizes[each.name]), content)
    return manifest


def install_bundle(path: Path, places: Mapping[str, Path]) -> tuple[Manifest, tuple[str, ...]]:
    """Returns a bundle's manifest and the names of the files that it put into their places.

    Files that are there already, with the same bytes, are left.

    Args:
        path: the bundle.
        places: the folder of each place that a bundle may name.

    Raises:
        DataError: no such file.
        CorruptArtefactError: no bundle, damaged, or with a name, a link or a file of a kind that
            no bundle has; nothing was written.
        MismatchError: another file of a name is there; nothing was written.
    """
    with _opened(path) as tar:
        manifest = _manifest(tar, path)
        targets = {name: _target(name, places, path) for name in manifest.sizes}
        _refuse_files_as_folders(targets, path)
        for name, content in _contents(tar, manifest, path):
            if _digest(content) != manifest.hashes[name]:
                raise CorruptArtefactError(f"'{path}' is damaged: {name} has another hash")
    missing = {name: target for name, target in targets.items() if not target.exists()}
    for name, target in targets.items():
        if name not in missing and not _is(target, manifest.hashes[name]):
            raise MismatchError(
                f"'{target}' is there and is not the bundle's: move it away, then type it again"
            )
    with _opened(path) as tar:
        _manifest(tar, path)
        for name, content in _contents(tar, manifest, path):
            if name in missing:
                _place(content, missing[name], manifest.hashes[name], path)
    return manifest, tuple(missing)


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    if not path.is_file():
        raise DataError(f"no bundle '{path}'")
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise CorruptArtefactError(f"'{path}' is no bundle: {error}") from None


def _manifest(tar: tarfile.TarFile, path: Path) -> Manifest:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg():
        raise CorruptArtefactError(f"'{path}' is no bundle: {MANIFEST} does not stand in front")
    if first.size > _LARGEST_MANIFEST:
        raise CorruptArtefactError(f"'{path}': its manifest is too large")
    content = tar.extractfile(first)
    assert content is not None
    try:
        found: Any = json.loads(content.read())
        known = found["format"] == _FORMAT
        sizes = {str(name): int(size) for name, size in found["sizes"].items()}
        hashes = {str(name): str(digest) for name, digest in found["hashes"].items()}
        made_for = {str(key): str(value) for key, value in found["made_for"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CorruptArtefactError(f"'{path}': its manifest cannot be read") from None
    if not known or sizes.keys() != hashes.keys():
        raise CorruptArtefactError(f"'{path}': its manifest is of another format")
    return Manifest(sizes, hashes, made_for)


def _contents(
    tar: tarfile.TarFile, manifest: Manifest, path: Path
) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the files behind the manifest, each of which must be in it, and once."""
    awaited = dict(manifest.sizes)
    while (info := tar.next()) is not None:
        if not info.isreg() or info.issparse():
            raise CorruptArtefactError(f"'{path}': {info.name!r} is no plain file: refused")
        if awaited.pop(info.name, None) != info.size:
            raise CorruptArtefactError(f"'{path}': {info.name!r} is not as its manifest says")
        content = tar.extractfile(info)
        assert content is not None
        yield info.name, content
    if awaited:
        raise CorruptArtefactError(f"'{path}' is cut off: {next(iter(awaited))} is missing")


def _target(name: str, places: Mapping[str, Path], path: Path) -> Path:
    place, *parts = name.split("/")
    bad = {"", ".", ".."} & {*parts} or set("\\:\0") & set(name) or not name.isprintable()
    if bad or place not in places or not parts:
        raise CorruptArtefactError(f"'{path}' names a file that is not its own: {name!r}")
    root = places[place]
    target = root.joinpath(*parts)
    if not target.parent.resolve().is_relative_to(root.resolve()):
        raise CorruptArtefactError(f"'{path}': {name!r} leads out of '{root}' by a link")
    return target


def _refuse_files_as_folders(targets: Mapping[str, Path], path: Path) -> None:
    files = set(targets.values())
    for name, target in targets.items():
        if any(folder in files or folder.is_file() for folder in target.parents):
            raise CorruptArtefactError(f"'{path}': {name!r} lies below what is a file")


def _place(content: IO[bytes], target: Path, expected: str, path: Path) -> None:
    digest = hashlib.sha256()
    with atomic_file(target, large=True) as file:
        while piece := content.read(_PIECE):
            digest.update(piece)
            file.write(piece)
        if digest.hexdigest() != expected:
            raise CorruptArtefactError(f"'{path}' changed while it was read")


def _digest(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := content.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _is(path: Path, expected: str) -> bool:
    return path.is_file() and _sha256(path) == expected


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file)
