"""Proposals: boxes that may hold an object of any name, and where they come from.

Every source gives raw boxes with an objectness; one rule then clips, drops the small, suppresses
duplicates and keeps the best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
import torch
import xxhash
from jaxtyping import Float, UInt8
from torchvision.ops import nms

from dkdetr.errors import CorruptArtefactError, DataError, UsageError

_PRE_NMS_PER_KEPT = 5
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class SourceImage:
    """One decoded picture: RGB, uint8, as it is on the disk."""

    image_id: int
    pixels: UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True, eq=False)
class Proposals:
    """Boxes of one image in pixels of the file, best objectness first."""

    boxes_xyxy: Float[np.ndarray, "num_boxes 4"]
    objectness: Float[np.ndarray, "num_boxes"]


class ProposalSource(Protocol):
    """Anything that proposes boxes."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that decides a proposal, as the cache's fingerprint records it."""
        ...

    @property
    def seen(self) -> Mapping[str, Any]:
        """What the source has learned from, for the cache's provenance."""
        ...

    def propose(self, images: Sequence[SourceImage]) -> list[Proposals]:
        """Returns raw proposals, one entry an image, in the order of `images`."""
        ...


@dataclass(frozen=True)
class ProposalRule:
    """What is kept of the raw proposals."""

    keep: int = 300
    nms_iou: float = 0.7
    min_side: float = 4.0
    """Pixels of the file; the selection for training is stricter, in pixels of the view."""

    def parts(self) -> dict[str, Any]:
        """Returns the rule as the cache's fingerprint records it."""
        return {
            "keep": self.keep,
            "nms_iou": self.nms_iou,
            "min_side": self.min_side,
            "pre_nms": _PRE_NMS_PER_KEPT * self.keep,
        }


def apply_rule(raw: Proposals, rule: ProposalRule, *, height: int, width: int) -> Proposals:
    """Returns the proposals that the rule keeps: clipped, float32, objectness falling.

    Equal objectness keeps the order of `raw`.
    """
    limit = np.array([width, height, width, height], dtype=np.float32)
    boxes = np.asarray(raw.boxes_xyxy, dtype=np.float32).reshape(-1, 4).clip(0, limit)
    scores = np.asarray(raw.objectness, dtype=np.float32)
    least = np.minimum(rule.min_side, limit[:2])
    usable = np.isfinite(scores) & ((boxes[:, 2:] - boxes[:, :2]) >= least).all(axis=1)
    order = np.flatnonzero(usable)[np.argsort(-scores[usable], kind="stable")]
    order = order[: _PRE_NMS_PER_KEPT * rule.keep]
    boxes, scores = boxes[order], scores[order]
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), rule.nms_iou).numpy()
    kept = np.sort(kept)[: rule.keep]
    return Proposals(boxes[kept], scores[kept])


class FileProposals:
    """Proposals read from a file that `pack_results` made of a COCO results json.

    Args:
        path: the packed file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as packed:
                self._image_ids = packed["image_ids"]
                self._offsets = packed["offsets"]
                self._boxes = packed["boxes_xyxy"]
                self._scores = packed["scores"]
                self._hash = str(packed["source_xxh3"])
        except (OSError, ValueError, KeyError) as error:
            raise CorruptArtefactError(
                f"the packed proposals '{path}' cannot be read ({error}); delete the file"
            ) from None

    @property
    def identity(self) -> Mapping[str, Any]:
        """Names the file by its content."""
        return {"source": "file", "xxh3_128": self._hash}

    @property
    def seen(self) -> Mapping[str, Any]:
        """Nobody knows what made a file."""
        return {"source": "file", "novel_boxes": "unknown"}

    @property
    def image_ids(self) -> frozenset[int]:
        """The images that the file has boxes of."""
        return frozenset(self._image_ids.tolist())

    def propose(self, images: Sequence[SourceImage]) -> list[Proposals]:
        """Returns the file's boxes of each image; none where it has none."""
        found: list[Proposals] = []
        for image in images:
            place = int(np.searchsorted(self._image_ids, image.image_id))
            known = place < len(self._image_ids) and self._image_ids[place] == image.image_id
            rows = slice(self._offsets[place], self._offsets[place + 1]) if known else slice(0, 0)
            found.append(Proposals(self._boxes[rows], self._scores[rows]))
        return found


def pack_results(path: Path, folder: Path) -> Path:
    """Returns a packed copy of a COCO results json ([{image_id, bbox: [x, y, w, h], score}]).

    The copy lies in `folder` under a name made of the json's hash; workers read it in no time.

    Raises:
        UsageError: a pickle or another kind of file.
        DataError: missing or malformed; names the first 20 bad records.
    """
    if path.suffix in {".pkl", ".pickle"}:
        raise UsageError(
            f"'{path}' is a pickle, which can run any code and is not read; write it as a COCO "
            "results json: [{image_id, bbox: [x, y, w, h], score}, ...]"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"proposals '{path}': {error.strerror or error}") from None
    digest = xxhash.xxh3_128(data).hexdigest()
    packed = folder / f"file-{digest[:16]}.npz"
    if packed.is_file():
        return packed
    try:
        records = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise DataError(f"proposals '{path}' are not JSON: {error}") from None
    image_ids, boxes, scores = _read_records(records, path)
    order = np.argsort(image_ids, kind="stable")
    unique, first = np.unique(image_ids[order], return_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = packed.with_suffix(".partial.npz")
    np.savez(
        temporary,
        image_ids=unique,
        offsets=np.append(first, len(image_ids)).astype(np.int64),
        boxes_xyxy=boxes[order],
        scores=scores[order],
        source_xxh3=np.array(digest),
    )
    temporary.replace(packed)
    return packed


def _read_records(records: Any, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not isinstance(records, list) or not records:
        raise DataError(f"proposals '{path}': not a list of COCO results, or an empty one")
    _refuse([i for i, record in enumerate(records) if not _is_result(record)], path)
    xywh = np.array([record["bbox"] for record in records], dtype=np.float64)
    scores = np.array([record["score"] for record in records], dtype=np.float32)
    fine = np.isfinite(xywh).all(axis=1) & (xywh[:, 2:] >= 0).all(axis=1) & np.isfinite(scores)
    _refuse(np.flatnonzero(~fine).tolist(), path)
    image_ids = np.array([record["image_id"] for record in records], dtype=np.int64)
    boxes = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    return image_ids, boxes.astype(np.float32), scores


def _refuse(bad: Sequence[int], path: Path) -> None:
    if bad:
        raise DataError(
            f"proposals '{path}': {len(bad)} records lack a whole image_id, a finite bbox "
            "[x, y, w, h] or a finite score; first: "
            + ", ".join(f"/{index}" for index in bad[:_SHOWN])
        )


def _is_result(record: Any) -> bool:
    if not isinstance(record, dict) or type(record.get("image_id")) is not int:
        return False
    box, score = record.get("bbox"), record.get("score")
    numbers = (int, float)
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in numbers for value in box)
        and type(score) in numbers
    )
