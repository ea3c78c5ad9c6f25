"""The caches of other projects: one .pth an image, in a folder or in one zip.

detpro  a tensor (boxes, dim): sums of the vectors of two crops, not normalised; boxes elsewhere
oadp    {embeddings, bboxes, objectness}, half floats, boxes in pixels xyxy
hdovd   {proposal_clip_image_embedding, gt_clip_image_embedding, clip_full_image_embedding};
        boxes elsewhere
"""

import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import xxhash

from cache.durable import hash_file
from dkdetr.data.annotations import ImageInfo
from dkdetr.data.splits import Split
from dkdetr.errors import CorruptArtefactError, DataError
from dkdetr.progress import progress
from pipeline.foreign_tensors import load_pth, unit_rows

ForeignFormat = Literal["detpro", "oadp", "hdovd"]
NEEDS_BOXES = ("detpro", "hdovd")
_MAX_MEMBER_BYTES = 1 << 28
_THREADS = 8


@dataclass(frozen=True, eq=False)
class ForeignImage:
    """What a foreign cache holds of an image, vectors of unit norm; None: it has none of that."""

    boxes_xyxy: np.ndarray | None
    objectness: np.ndarray | None
    embeddings: np.ndarray
    gt_embeddings: np.ndarray | None
    image_embedding: np.ndarray | None


class PthFiles:
    """The .pth files of a folder or zip, by the stem of the image's file name.

    Raises:
        DataError: there are none, or two of one stem.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = zipfile.ZipFile(path) if path.is_file() and zipfile.is_zipfile(path) else None
        if self._zip is None and not path.is_dir():
            raise DataError(f"{path} is neither a folder nor a zip of .pth files")
        self._names: dict[str, str] = {}
        for name in self._listing():
            stem = PurePosixPath(name).stem
            if stem in self._names:
                raise DataError(
                    f"{path} has two files for image {stem}: {self._names[stem]}, {name}"
                )
            self._names[stem] = name
        if not self._names:
            raise DataError(f"{path} holds no .pth files")

    def _listing(self) -> list[str]:
        if self._zip is not None:
            names = self._zip.namelist()
        else:
            names = [str(file.relative_to(self.path)) for file in self.path.rglob("*.pth")]
        return sorted(name for name in names if name.endswith(".pth"))

    def __contains__(self, stem: str) -> bool:
        return stem in self._names

    def identity(self) -> str:
        """Returns a hash of all names and contents; of a zip, of its own sizes and checksums.

        A folder is read whole: files of one shape are of one size, whatever they hold.
        """
        digest = xxhash.xxh3_128()
        names = sorted(self._names.values())
        if self._zip is not None:
            for info in map(self._zip.getinfo, names):
                name = PurePosixPath(info.filename).name
                digest.update(f"{name} {info.file_size} {info.CRC}\n".encode())
            return digest.hexdigest()
        with (
            ThreadPoolExecutor(_THREADS) as pool,
            progress("hashing files", len(names), quiet=len(names) < 500) as advance,
        ):
            hashes = pool.map(lambda name: hash_file(self.path / name), names)
            for done, (name, hashed) in enumerate(zip(names, hashes, strict=True), start=1):
                digest.update(f"{PurePosixPath(name).name} {hashed}\n".encode())
                advance(done, "")
        return digest.hexdigest()

    def load(self, stem: str) -> Any:
        """Returns the content of one image's file; raises CorruptArtefactError."""
        name = self._names[stem]
        where = f"{self.path}: {name}"
        if self._zip is None:
            return load_pth((self.path / name).read_bytes(), where)
        if self._zip.getinfo(name).file_size > _MAX_MEMBER_BYTES:
            raise CorruptArtefactError(f"{where} claims more bytes than any image's file can have")
        try:
            return load_pth(self._zip.read(name), where)
        except zipfile.BadZipFile as error:
            raise CorruptArtefactError(f"{where}: {error}") from None


def read_image(files: PthFiles, stem: str, layout: ForeignFormat) -> ForeignImage:
    """Returns one image of a foreign cache.

    Raises:
        DataError: a part is missing, or the parts differ in number.
        CorruptArtefactError: the file is damaged, or asks for code.
    """
    where = f"{files.path}: image {stem}"
    loaded = files.load(stem)
    if layout == "detpro":
        rows = loaded[0] if isinstance(loaded, list) and loaded else loaded
        return ForeignImage(None, None, _vectors(rows, where), None, None)
    if layout == "oadp":
        table = _table(loaded, ("embeddings", "bboxes", "objectness"), where)
        embeddings = _vectors(table["embeddings"], where)
        boxes = np.asarray(table["bboxes"], dtype=np.float32).reshape(-1, 4)
        scores = np.asarray(table["objectness"], dtype=np.float32).reshape(-1)
        if not len(embeddings) == len(boxes) == len(scores):
            raise DataError(
                f"{where} has {len(embeddings)} embeddings, {len(boxes)} boxes and {len(scores)} "
                "scores"
            )
        return ForeignImage(boxes, scores, embeddings, None, None)
    table = _table(loaded, ("proposal_clip_image_embedding",), where)
    truth = table.get("gt_clip_image_embedding")
    whole = table.get("clip_full_image_embedding")
    return ForeignImage(
        None,
        None,
        _vectors(table["proposal_clip_image_embedding"], where),
        None if truth is None else _vectors(truth, where),
        None if whole is None else _vectors(np.reshape(whole, (1, -1)), where)[0],
    )


def stem_of(image: ImageInfo) -> str:
    """Returns the name by which a foreign cache knows an image: without folder and ending."""
    return Path(image.file_name).stem


def refuse_shared_stems(split: Split) -> None:
    """Raises DataError if two images of the split would share a file."""
    file_of: dict[str, str] = {}
    for image in split.images:
        other = file_of.setdefault(stem_of(image), image.file_name)
        if other != image.file_name:
            raise DataError(
                f"{split.name}: '{other}' and '{image.file_name}' are one name without folder and "
                f"ending; a foreign cache keeps one file for both, {stem_of(image)}.pth, so one of "
                "them would get the other's regions"
            )


def _table(loaded: Any, keys: tuple[str, ...], where: str) -> Mapping[str, Any]:
    missing = [key for key in keys if not isinstance(loaded, dict) or key not in loaded]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}: another layout?")
    return loaded


def _vectors(rows: Any, where: str) -> np.ndarray:
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f":
        raise DataError(f"{where} holds no matrix of embeddings: another layout?")
    return unit_rows(rows, where)
