"""How well the teacher names base objects, by crop mode: the number to choose a mode by.

Of the mode that was cached the answer lies in the cache. For the others the teacher looks at a
sample of base objects again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

import numpy as np
from jaxtyping import Float, Int

from cache.store import CacheReader
from dkdetr.data.splits import Split
from dkdetr.engine.distributed import pick_device
from dkdetr.errors import UsageError
from pipeline.crops import CropMode, rule_from_parts
from pipeline.recorded_teacher import load_recorded_teacher

_MAX_OBJECTS = 1000
_MAX_IMAGES = 2000


@dataclass(frozen=True)
class ZeroShot:
    """The shares of base objects whose name is the teacher's first, or among its first five."""

    mode: str
    num_objects: int
    num_names: int
    top1: float
    top5: float

    def line(self) -> str:
        """Returns the figures as a person reads them."""
        return (
            f"zero-shot {self.mode} ({self.num_objects:,} base objects, {self.num_names} base "
            f"names): {self.top1:.1%} top-1, {self.top5:.1%} top-5"
        )


def parse_modes(words: str) -> tuple[CropMode, ...]:
    """Returns the crop modes of a list with commas, or of `all`; raises UsageError."""
    known = tuple(mode for mode in get_args(CropMode) if mode != "native")
    if not words:
        return ()
    chosen = known if words == "all" else tuple(words.split(","))
    for word in chosen:
        if word not in known:
            raise UsageError(f"--crop-modes {word}: choose of {', '.join(known)}, or all")
    return cast("tuple[CropMode, ...]", chosen)


def cached_accuracy(reader: CacheReader) -> ZeroShot | None:
    """Returns the accuracy of the cached crops of base objects; None where there is no object."""
    names = _Names(reader)
    crops = reader.info.parts["crops"]
    mode = crops.get("mode", "unknown") if isinstance(crops, dict) else "unknown"  # an import
    vectors: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for image_id in _spread(reader, _MAX_IMAGES):
        rows = reader.rows(image_id)
        vectors.append(rows.gt_embeddings)
        labels.append(names.labels_of(rows.gt_category_ids))
    return names.score(f"{mode}, as cached", vectors, labels)


def accuracy_by_mode(
    reader: CacheReader, split: Split, modes: Sequence[CropMode], device: str
) -> tuple[ZeroShot, ...]:
    """Returns the accuracy of the teacher's own look at some base objects, once for each mode.

    Scales and their combination are the cache's.

    Raises:
        MismatchError: the teacher that is found is not the cache's.
    """
    info = reader.info
    teacher = load_recorded_teacher(info, pick_device(device))
    names = _Names(reader)
    cached = rule_from_parts(info.parts["crops"])
    vectors: dict[CropMode, list[np.ndarray]] = {mode: [] for mode in modes}
    labels: list[np.ndarray] = []
    count = 0
    for image_id in _spread(reader, _MAX_OBJECTS):
        base = split.base_boxes(image_id)
        if not len(base.category_ids):
            continue
        pixels = split.read(split.image_of(image_id))
        for mode in modes:
            rule = replace(cached, mode=mode)
            vectors[mode].append(teacher.encode_regions(pixels, base.boxes_xyxy, rule))
        labels.append(names.labels_of(base.category_ids))
        count += len(base.category_ids)
        if count >= _MAX_OBJECTS:
            break
    found = (names.score(mode, vectors[mode], labels) for mode in modes)
    return tuple(each for each in found if each is not None)


class _Names:
    """The base names of a cache and their vectors."""

    def __init__(self, reader: CacheReader) -> None:
        metadata, embeddings = reader.text()
        is_base = np.array(metadata["is_base"], dtype=bool)
        self._embeddings = embeddings[is_base]
        ids = np.array(metadata["category_ids"])[is_base]
        self._label_of = {int(number): label for label, number in enumerate(ids)}

    def labels_of(self, category_ids: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """Returns the rows of these categories."""
        return np.array([self._label_of[int(number)] for number in category_ids], dtype=np.int64)

    def score(
        self,
        mode: str,
        vectors: Sequence[Float[np.ndarray, "_ embed_dim"]],
        labels: Sequence[Int[np.ndarray, "_"]],
    ) -> ZeroShot | None:
        """Returns the shares of right answers; None of no object."""
        wanted = np.concatenate([np.zeros(0, dtype=np.int64), *labels])
        if not len(wanted):
            return None
        similarity = np.concatenate(vectors) @ self._embeddings.T
        right = np.take_along_axis(similarity, wanted[:, None], axis=1)
        rank = (similarity > right).sum(axis=1)
        return ZeroShot(
            mode, len(wanted), len(self._embeddings),
            top1=float((rank < 1).mean()), top5=float((rank < 5).mean()),
        )  # fmt: skip


def _spread(reader: CacheReader, count: int) -> list[int]:
    """Returns at most `count` good images, spread over the cache."""
    ids = [int(number) for number in reader.image_ids if int(number) not in reader.quarantined]
    places = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)
    return [ids[place] for place in places]
