"""Makes a cache of ours out of another project's: `dkdetr cache import`."""

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError

from cache.damage import Damage, uncommit
from cache.layout import changed_rows
from cache.plan import make_plan
from cache.rows import ImageRows
from cache.spec import SCHEMA
from cache.store import open_cache
from cache.writer import create_or_resume
from dkdetr.data.annotations import ImageInfo
from dkdetr.data.splits import Split, load_split
from dkdetr.defaults import DEFAULT_TEACHER
from dkdetr.errors import DataError, UsageError
from dkdetr.progress import progress
from pipeline.file_proposals import parse_file_options, read_boxes
from pipeline.fingerprint import split_parts
from pipeline.foreign_caches import (
    NEEDS_BOXES,
    ForeignFormat,
    ForeignImage,
    PthFiles,
    read_image,
    refuse_shared_stems,
    stem_of,
)
from pipeline.foreign_tensors import unit_rows
from pipeline.places import absolute, absolute_split
from pipeline.shard_worker import max_base_iou
from pipeline.text_bank import Background, import_vocabulary

_MIN_SIDE = 1.0


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What to import, and under which split."""

    layout: ForeignFormat
    source: Path
    split: str
    out: Path
    text_bank: Path
    """Embeddings of the split's names, of the same teacher."""
    background: Background | None = None
    boxes: str | None = None
    """Proposals of detpro and hdovd, in the order of their embeddings: a COCO results json, or
    mmdet's LIST.pkl?order=image_id|annotations."""
    image_source: Path | None = None
    """Embeddings of whole images, one .pth each (OADP's `globals`)."""
    use_gt: bool = True
    """Whether ground-truth embeddings are taken over where there are any."""
    teacher: str = DEFAULT_TEACHER
    """What embedded it all, by its maker's word; nothing here can check it."""
    keep: int = 300
    storage: Literal["fp16", "int8"] = "fp16"
    data_root: Path = Path("data")
    command: str = ""

    def __post_init__(self) -> None:
        if (self.layout in NEEDS_BOXES) != (self.boxes is not None):
            raise UsageError(
                f"{self.layout} keeps its boxes apart: name them with --boxes RESULTS.json, "
                "or LIST.pkl?order=image_id"
                if self.boxes is None
                else f"{self.layout} has its own boxes: leave --boxes out"
            )
        if self.keep < 1:
            raise UsageError(f"--keep {self.keep}: keep at least one region an image")


@dataclass(frozen=True)
class ImportSummary:
    """What was taken over."""

    path: Path
    num_images: int
    num_absent: int
    num_regions: int
    merkle_root: str

    def lines(self) -> list[str]:
        """Returns the summary as a person reads it."""
        absent = f", {self.num_absent:,} images set aside: not in it" if self.num_absent else ""
        return [
            f"imported   {self.path}: {self.num_images:,} images, {self.num_regions:,} regions"
            f"{absent}",
            f"root       {self.merkle_root}",
            "its embeddings were not made here: nothing but their numbers could be checked",
        ]

    def as_json(self) -> dict[str, Any]:
        """Returns the summary as plain data."""
        return dict(vars(self))


def import_cache(
    request: ImportRequest,
    say: Callable[[str], None] = lambda _: None,
    damage: Damage | None = None,
) -> ImportSummary:
    """Returns the summary of a sealed cache with another project's boxes and embeddings.

    Vectors are normalised; boxes are cut at the image and sorted by objectness, and those without
    a pixel left are dropped; `max_base_iou` is computed from the split. Resumes like any cache.
    `damage` of the cache that is there is taken out once it is known to be made of the same files.

    Raises:
        DataError: counts or lengths differ, a vector is zero, half of the images are absent, or
            two images of the split have one stem.
        CorruptArtefactError: a file is damaged, or asks for code to be run.
        CacheError: as `create_or_resume`.
    """
    request = _placed(request)
    split = load_split(request.split, request.data_root)
    source = _Source(request, split)
    say(f"{request.layout}: {split.name}, vectors of {source.embed_dim} numbers")
    vocabulary = import_vocabulary(
        request.text_bank,
        split.categories,
        teacher=f"imported:{request.teacher}",
        embed_dim=source.embed_dim,
        background=request.background,
    )
    counts = np.diff(split.base_table.offsets)
    plan = make_plan(
        [image.image_id for image in split.images],
        max_regions=request.keep,
        embed_dim=source.embed_dim,
        max_gt=int(counts.max(initial=0)) if source.has_gt else 0,
        storage=request.storage,
        batch_layout={"imported": request.layout},
        image_embeddings=source.has_image_embeddings,
    )
    parts = {**source.parts(), "batch_layout": dict(plan.batch_layout)}
    parts["text"] = {"imported": vocabulary.hash}
    if damage is not None:
        uncommit(damage, parts)
    with create_or_resume(
        request.out, parts=parts, plan=plan, provenance=_provenance(request)
    ) as writer:
        missing = writer.missing_shards()
        with progress("importing", len(missing)) as advance:
            for done, shard in enumerate(missing, start=1):
                images = [split.image_of(image_id) for image_id in plan.shard_image_ids(shard)]
                absent = {
                    i.image_id: "not in the imported cache" for i in images if i not in source
                }
                rows = [source.rows(image) for image in images if image in source]
                writer.commit_shard(shard, rows, quarantined=absent)
                advance(done, "")
        if not writer.text_is_current():
            writer.write_text(vocabulary.metadata(), vocabulary.embeddings)
        for note in changed_rows(request.out, writer.old_roots, writer.seal()):
            say(note)
    info = open_cache(request.out).info
    return ImportSummary(
        request.out, info.num_images, source.num_absent, info.num_regions, info.merkle_root
    )


class _Source:
    """A foreign cache beside the split it is imported for."""

    def __init__(self, request: ImportRequest, split: Split) -> None:
        self._request, self._split = request, split
        refuse_shared_stems(split)
        self._files = PthFiles(request.source)
        self._wholes = PthFiles(request.image_source) if request.image_source else None
        self._boxes = _read_boxes(request.boxes, split) if request.boxes else None
        present = [image for image in split.images if image in self]
        self.num_absent = len(split.images) - len(present)
        if 2 * self.num_absent > len(split.images):
            raise DataError(
                f"{request.source} has {len(present):,} of the {len(split.images):,} images of "
                f"{split.name}: it belongs to another split"
            )
        first = next((found for found in map(self._read, present) if len(found.embeddings)), None)
        if first is None:
            raise DataError(f"{request.source} holds no embedding for any image of {split.name}")
        self.embed_dim = first.embeddings.shape[1]
        self.has_gt = request.use_gt and first.gt_embeddings is not None
        self.has_image_embeddings = self._wholes is not None or first.image_embedding is not None

    def __contains__(self, image: ImageInfo) -> bool:
        return stem_of(image) in self._files

    def parts(self) -> dict[str, Any]:
        """Returns what the fingerprint records; the text and batches come apart."""
        request = self._request
        wholes = {"wholes_xxh3_128": self._wholes.identity()} if self._wholes else {}
        boxes = xxhash.xxh3_128()
        for number, (table, scores) in sorted((self._boxes or {}).items()):
            boxes.update(f"{number}\n".encode() + table.tobytes() + scores.tobytes())
        return {
            "schema": SCHEMA,
            "split": split_parts(self._split),
            "images": {"content": "not seen"},
            "proposals": {
                "source": f"imported:{request.layout}",
                "files_xxh3_128": self._files.identity(),
                "boxes_xxh3_128": boxes.hexdigest() if self._boxes else "in the files",
                "keep": request.keep,
                **wholes,
            },
            "crops": {"mode": f"imported:{request.layout}"},
            "teacher": {"name": f"imported:{request.teacher}"},
            "storage": {"region_embeddings": request.storage, "gt": self.has_gt},
        }

    def rows(self, image: ImageInfo) -> ImageRows:
        """Returns what is cached of an image."""
        found, where = self._read(image), f"{self._request.source}: image {stem_of(image)}"
        boxes, scores = self._boxes_of(image, found, where)
        if found.embeddings.shape[1] != self.embed_dim:
            raise DataError(
                f"{where} has vectors of {found.embeddings.shape[1]} numbers, others of "
                f"{self.embed_dim}"
            )
        limit = np.array([image.width, image.height] * 2, dtype=np.float32)
        boxes = boxes.clip(0, limit)
        usable = ((boxes[:, 2:] - boxes[:, :2]) >= _MIN_SIDE).all(axis=1) & np.isfinite(scores)
        order = np.flatnonzero(usable)[np.argsort(-scores[usable], kind="stable")]
        order = order[: self._request.keep]
        base = self._split.base_boxes(image.image_id)
        truth = self._gt_of(found, len(base.boxes_xyxy), where)
        num_gt = len(truth)
        return ImageRows(
            image_id=image.image_id,
            image_size_hw=(image.height, image.width),
            boxes_xyxy=boxes[order],
            objectness=scores[order],
            max_base_iou=max_base_iou(boxes[order], base.boxes_xyxy),
            region_embeddings=found.embeddings[order],
            image_embedding=self._whole_of(image, found, where),
            gt_boxes_xyxy=base.boxes_xyxy[:num_gt].astype(np.float32),
            gt_category_ids=base.category_ids[:num_gt].astype(np.int64),
            gt_embeddings=truth,
        )

    def _read(self, image: ImageInfo) -> ForeignImage:
        return read_image(self._files, stem_of(image), self._request.layout)

    def _boxes_of(
        self, image: ImageInfo, found: ForeignImage, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        if found.boxes_xyxy is not None and found.objectness is not None:
            return found.boxes_xyxy, found.objectness
        assert self._boxes is not None
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        boxes, scores = self._boxes.get(image.image_id, none)
        if len(boxes) != len(found.embeddings):
            raise DataError(
                f"{where} has {len(found.embeddings)} embeddings, and {self._request.boxes} "
                f"{len(boxes)} boxes: they are not of one run, or not in one order"
            )
        return boxes, scores

    def _gt_of(self, found: ForeignImage, num_base: int, where: str) -> np.ndarray:
        if not self.has_gt:
            return np.zeros((0, self.embed_dim), np.float32)
        given = found.gt_embeddings
        if given is None or given.shape != (num_base, self.embed_dim):
            shape = "none" if given is None else list(given.shape)
            raise DataError(
                f"{where} has ground-truth embeddings {shape}, the split {num_base} base boxes; "
                "leave them out with --no-gt"
            )
        return given

    def _whole_of(self, image: ImageInfo, found: ForeignImage, where: str) -> np.ndarray:
        whole = found.image_embedding
        if self._wholes is not None:
            loaded = self._wholes.load(stem_of(image)) if stem_of(image) in self._wholes else None
            table = loaded["embeddings"] if isinstance(loaded, dict) else loaded
            if table is not None:
                whole = unit_rows(np.reshape(table, (1, -1)), where)[0]
        if whole is None and not self.has_image_embeddings:
            return np.full(self.embed_dim, np.nan, np.float32)
        if whole is None or whole.shape != (self.embed_dim,):
            raise DataError(f"{where} has no embedding of the whole image, and others have")
        return whole


def _read_boxes(spec: str, split: Split) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    path, options = parse_file_options(spec)
    if options.novel:
        raise UsageError(
            f"--boxes {spec}: an imported cache counts as having seen novel names; drop 'novel='"
        )
    return read_boxes(Path(path), options, split)


def recorded_import(record: Any, where: Path) -> ImportRequest:
    """Returns the request that a cache's provenance kept.

    Raises:
        UsageError: there is none, or not one of this version.
    """
    try:
        return TypeAdapter(ImportRequest).validate_python(record)
    except ValidationError:
        raise UsageError(
            f"the provenance of {where} does not say from where it was imported: import it anew "
            "into another folder"
        ) from None


def _placed(request: ImportRequest) -> ImportRequest:
    """Returns the request with its paths from the root down: a later command runs elsewhere."""
    return replace(
        request,
        split=absolute_split(request.split),
        source=request.source.resolve(),
        text_bank=request.text_bank.resolve(),
        boxes=absolute(request.boxes) if request.boxes else None,
        image_source=request.image_source.resolve() if request.image_source else None,
        data_root=request.data_root.resolve(),
    )


def _provenance(request: ImportRequest) -> dict[str, Any]:
    return {
        "imported": request.layout,
        "source": str(request.source),
        "command": request.command,
        "request": TypeAdapter(ImportRequest).dump_python(request, mode="json"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "split": request.split,
        # Nobody can tell what made the proposals.
        "uses_novel_names": True,
    }
