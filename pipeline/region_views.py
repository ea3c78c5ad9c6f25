"""What the teacher sees in a region: its names for it, and the regions most like it elsewhere."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cache.neighbor_lists import load_parameters
from cache.neighbors import NeighborSettings
from cache.rows import ImageRows
from cache.spec import CacheError, StaleCacheError
from cache.store import open_cache
from dkdetr.errors import UsageError
from pipeline.neighbor_stage import NeighborsBuilt, ensure_neighbors

_TOP_NAMES = 3
_ROWS_KEPT = 256


@dataclass(frozen=True)
class NameScore:
    """One of the cache's names and the cosine of its text embedding with a region's."""

    name: str
    is_base: bool
    cosine: float


@dataclass(frozen=True)
class RegionView:
    """A cached region; the box is in pixels of the image file."""

    image_id: int
    region: int
    box_xyxy: tuple[float, ...]
    objectness: float
    max_base_iou: float
    names: tuple[NameScore, ...]
    """The teacher's best names, best first."""

    def line(self) -> str:
        """Returns the region as a person reads it."""
        box = " ".join(f"{side:.0f}" for side in self.box_xyxy)
        name = f"{self.names[0].name} {self.names[0].cosine:.3f}" if self.names else "-"
        return f"image {self.image_id:>8} box {self.region:>3}  [{box}]  {name}"


@dataclass(frozen=True)
class NeighborView:
    """A region of another image and its cosine with the one asked about."""

    region: RegionView
    cosine: float


@dataclass(frozen=True)
class RegionNeighbors:
    """A region and its neighbours, most similar first."""

    region: RegionView
    neighbors: tuple[NeighborView, ...]

    def lines(self) -> list[str]:
        """Returns the table as a person reads it."""
        head = [f"       {self.region.line()}   (asked about)"]
        return head + [f"{each.cosine:.3f}  {each.region.line()}" for each in self.neighbors]

    def as_json(self) -> dict[str, Any]:
        """Returns the table as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class ImageObjects:
    """The regions of one image that take part in the neighbour lists."""

    image_id: int
    objects: tuple[RegionNeighbors, ...]

    def lines(self) -> list[str]:
        """Returns a line a region, with its nearest neighbour."""
        text = [f"image {self.image_id}: {len(self.objects)} regions take part; --box shows one"]
        for each in self.objects:
            nearest = each.neighbors[0] if each.neighbors else None
            near = f"   nearest {nearest.cosine:.3f} {nearest.region.line()}" if nearest else ""
            text.append(each.region.line() + near)
        return text

    def as_json(self) -> dict[str, Any]:
        """Returns the regions as plain data."""
        return asdict(self)


class RegionViews:
    """Looks regions of a sealed cache up, by image id and region.

    Raises:
        StaleCacheError: the cache has no neighbour lists.
    """

    def __init__(self, path: Path) -> None:
        self._reader = open_cache(path)
        lists = self._reader.neighbors()
        if lists is None:
            raise StaleCacheError(
                f"{path} has no neighbour lists; next: dkdetr cache neighbors {path}"
            )
        self._lists = lists
        metadata, self._texts = self._reader.text()
        self._names: list[str] = metadata["names"]
        self._is_base: list[bool] = metadata.get("is_base") or [True] * len(self._names)
        self.info = self._reader.info
        self.image_ids = self._reader.image_ids
        self._rows = lru_cache(maxsize=_ROWS_KEPT)(self._reader.rows)

    def region(self, image_id: int, region: int) -> RegionView:
        """Returns a region in words; raises CacheError where there is none."""
        rows = self._rows_of(image_id)
        if not 0 <= region < rows.num_regions:
            raise CacheError(f"image {image_id} has regions 0 to {rows.num_regions - 1}")
        scores = self._texts @ rows.region_embeddings[region]
        best = np.argsort(-scores, kind="stable")[:_TOP_NAMES]
        return RegionView(
            image_id=image_id,
            region=region,
            box_xyxy=tuple(round(float(side), 2) for side in rows.boxes_xyxy[region]),
            objectness=round(float(rows.objectness[region]), 4),
            max_base_iou=round(float(rows.max_base_iou[region]), 4),
            names=tuple(
                NameScore(self._names[i], bool(self._is_base[i]), round(float(scores[i]), 4))
                for i in best.tolist()
            ),
        )

    def neighbors(self, image_id: int, region: int, *, most: int = 1 << 30) -> RegionNeighbors:
        """Returns the neighbours of a region; raises CacheError where it takes no part."""
        asked = self.region(image_id, region)
        row = self._reader.plan.row_of[image_id]
        at = self._lists.object_of(row, region)
        if at is None:
            raise CacheError(
                f"region {region} of image {image_id} takes no part in the neighbour lists (its "
                f"IoU with a base object is {asked.max_base_iou:.2f}, or others of the image are "
                f"more object-like); next: dkdetr cache neighbors {self.info.path} "
                f"--image {image_id}"
            )
        found: list[NeighborView] = []
        for other, cosine in zip(self._lists.indices[at], self._lists.sims[at], strict=True):
            if other >= 0 and len(found) < most:
                image = int(self.image_ids[self._lists.object_rows[other]])
                view = self.region(image, int(self._lists.object_regions[other]))
                found.append(NeighborView(view, round(float(cosine), 4)))
        return RegionNeighbors(asked, tuple(found))

    def objects(self, image_id: int, *, most: int = 1 << 30, neighbors: int = 1) -> ImageObjects:
        """Returns up to `most` regions of an image that take part, best objectness first."""
        self._rows_of(image_id)
        objects = self._lists.objects_of(self._reader.plan.row_of[image_id])[:most]
        regions = (int(self._lists.object_regions[at]) for at in objects)
        return ImageObjects(
            image_id, tuple(self.neighbors(image_id, each, most=neighbors) for each in regions)
        )

    def num_objects(self, row: int) -> int:
        """Returns how many regions of an image, by its row, take part."""
        return len(self._lists.objects_of(row))

    def _rows_of(self, image_id: int) -> ImageRows:
        if image_id not in self._reader.plan.row_of:
            first, last = self.image_ids[0], self.image_ids[-1]
            raise CacheError(
                f"{self.info.path} holds no image {image_id}; its ids are from {first} to {last}"
            )
        return self._rows(image_id)


def neighbors_command(
    path: Path,
    image: int | None,
    box: int | None,
    settings: Mapping[str, Any],
    *,
    rebuild: bool,
) -> NeighborsBuilt | ImageObjects | RegionNeighbors:
    """Returns what `dkdetr cache neighbors` says: the lists built, or a part of them shown.

    Args:
        path: a sealed cache.
        image: the image to show; None: build the lists.
        box: the region of the image to show; None: all.
        settings: those of NeighborSettings that are named; the others have their defaults.
        rebuild: build even if whole lists of these settings are there.

    Raises:
        UsageError: lists are to be shown, and those that are there are of other settings.
    """
    if image is None and box is not None:
        raise UsageError("--box is a region of an image: give --image too")
    if image is None or rebuild:
        built = ensure_neighbors(path, NeighborSettings(**settings), rebuild=rebuild)
        if image is None:
            return built
    else:
        _refuse_other_lists(path, settings)
    views = RegionViews(path)
    return views.objects(image) if box is None else views.neighbors(image, box)


def _refuse_other_lists(path: Path, settings: Mapping[str, Any]) -> None:
    """Returns if the lists that are there are as asked for; showing builds none by itself."""
    there = load_parameters(path)
    if there is None:
        return  # the views say so
    other = [
        "--" + {"k": "neighbors"}.get(name, name.replace("_", "-"))
        for name, value in settings.items()
        if there.get(name) != value
    ]
    if other:
        raise UsageError(
            f"--image shows the neighbour lists that {path} has, which were not made with "
            f"{', '.join(other)} as given here: add --rebuild to build them anew, or leave it out"
        )
