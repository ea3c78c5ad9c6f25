"""What differs between two caches: what they were made of, and the rows themselves."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.rows import ImageRows
from cache.spec import diff_parts
from cache.store import CacheReader

_ARRAYS = ("boxes_xyxy", "objectness", "max_base_iou", "gt_boxes_xyxy", "gt_category_ids")
_EMBEDDINGS = ("region_embeddings", "image_embedding", "gt_embeddings", "flipped_embeddings")


@dataclass(frozen=True)
class ArrayDifference:
    """How one array differs over the images that both caches hold.

    `worst` is the greatest absolute difference, or, of embeddings, the smallest cosine; it is over
    the images in which both have as many rows. `num_other_counts` counts the other images.
    """

    name: str
    num_images: int
    num_other_counts: int
    worst: float
    first_image: int

    def line(self) -> str:
        """Returns the difference in words."""
        measure = "smallest cosine" if self.name in _EMBEDDINGS else "greatest difference"
        counts = f", {self.num_other_counts:,} of them in number" if self.num_other_counts else ""
        worst = "" if np.isnan(self.worst) else f"; {measure} {self.worst:.6g}"
        return (
            f"{self.name}: differs in {self.num_images:,} images{counts}{worst}; first: image "
            f"{self.first_image}"
        )


@dataclass(frozen=True)
class CacheDiff:
    """All differences; `same_root` says that the sealed bytes are the same."""

    same_root: bool
    parts: tuple[str, ...]
    plan: tuple[str, ...]
    only_in_first: tuple[int, ...]
    only_in_second: tuple[int, ...]
    quarantined_in_one: tuple[int, ...]
    num_common: int
    arrays: tuple[ArrayDifference, ...]

    def lines(self) -> list[str]:
        """Returns the differences as a person reads them."""
        if self.same_root:
            return ["the two caches hold the same bytes (same Merkle root)"]
        text = [f"made of    {line}" for line in self.parts]
        text += [f"planned    {line}" for line in self.plan]
        for name, ids in (
            ("only in the first", self.only_in_first),
            ("only in the second", self.only_in_second),
            ("set aside in one of them", self.quarantined_in_one),
        ):
            if ids:
                shown = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
                text.append(f"images     {len(ids):,} {name}: {shown}")
        text += [f"rows       {each.line()}" for each in self.arrays]
        same = "equal in all rows" if not self.arrays else "compared"
        return [*text, f"{self.num_common:,} images in both, {same}"]

    def as_json(self) -> dict[str, Any]:
        """Returns the differences as plain data."""
        return asdict(self)


def diff_caches(
    first: CacheReader,
    second: CacheReader,
    *,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> CacheDiff:
    """Returns what differs; reads every row of both unless their roots are the same."""
    same_root = first.info.merkle_root == second.info.merkle_root
    ours, theirs = {*first.image_ids.tolist()}, {*second.image_ids.tolist()}
    aside = {*first.quarantined} ^ {*second.quarantined}
    common = sorted((ours & theirs) - {*first.quarantined} - {*second.quarantined})
    tallies = {name: _Tally(name) for name in (*_ARRAYS, *_EMBEDDINGS)}
    if not same_root:
        for done, image_id in enumerate(common, start=1):
            a, b = first.rows(image_id), second.rows(image_id)
            for tally in tallies.values():
                tally.add(image_id, a, b)
            on_image(done, len(common))
    return CacheDiff(
        same_root=same_root,
        parts=tuple(_first_second(diff_parts(first.info.parts, second.info.parts))),
        plan=tuple(_first_second(diff_parts(_shape_of(first), _shape_of(second)))),
        only_in_first=tuple(sorted(ours - theirs)),
        only_in_second=tuple(sorted(theirs - ours)),
        quarantined_in_one=tuple(sorted(aside & ours & theirs)),
        num_common=len(common),
        arrays=tuple(tally.result() for tally in tallies.values() if tally.images),
    )


class _Tally:
    def __init__(self, name: str) -> None:
        self._name = name
        self.images: list[int] = []
        self._other_counts = 0
        self._worst: list[float] = []

    def add(self, image_id: int, first: ImageRows, second: ImageRows) -> None:
        a, b = getattr(first, self._name), getattr(second, self._name)
        if a is None or b is None:
            return  # the plans differ, and say so
        if np.array_equal(a, b, equal_nan=True):
            return
        self.images.append(image_id)
        if a.shape != b.shape:
            self._other_counts += 1
        elif self._name in _EMBEDDINGS:
            self._worst.append(float(_cosines(a, b).min()))
        else:
            self._worst.append(float(np.abs(a - b).max()))

    def result(self) -> ArrayDifference:
        extreme = min if self._name in _EMBEDDINGS else max
        return ArrayDifference(
            name=self._name,
            num_images=len(self.images),
            num_other_counts=self._other_counts,
            worst=extreme(self._worst) if self._worst else float("nan"),
            first_image=self.images[0],
        )


def _cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    a, b = np.atleast_2d(a).astype(np.float64), np.atleast_2d(b).astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)


def _shape_of(reader: CacheReader) -> dict[str, Any]:
    return {key: value for key, value in reader.plan.to_dict().items() if key != "image_ids"}


def _first_second(lines: list[str]) -> list[str]:
    return [
        line.replace("  cache: ", "  first: ").replace("  wanted: ", "  second: ") for line in lines
    ]
