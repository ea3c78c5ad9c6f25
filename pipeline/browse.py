"""One self-contained HTML page on a cache: regions, their neighbours, the teacher's names.

Nothing in it is fetched from anywhere: pictures are inlined, there are no scripts, and names are
escaped wherever they come from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache.neighbor_lists import load_parameters
from cache.store import open_cache
from dkdetr.atomic_file import write_bytes
from dkdetr.data.annotations import ImageInfo
from dkdetr.data.cached_split import load_cached_split
from dkdetr.data.image_files import UnreadableImageError
from dkdetr.data.splits import Split
from dkdetr.errors import UsageError
from dkdetr.evaluation.inline_pictures import data_uri
from dkdetr.evaluation.page_templates import page_environment
from dkdetr.progress import progress
from pipeline.region_views import RegionView, RegionViews

_REGIONS = 5
_NEIGHBORS = 6
_CROP_SIDE = 160
_PICTURE_SIDE = 480
_PICTURES_KEPT = 64


@dataclass(frozen=True)
class BrowseSummary:
    """What a page shows."""

    page: Path
    image_ids: tuple[int, ...]
    num_regions: int
    num_crops: int
    bytes: int

    def lines(self) -> list[str]:
        """Returns the summary as a person reads it."""
        return [
            f"{self.page}: {len(self.image_ids)} images, {self.num_regions} regions, "
            f"{self.num_crops} crops, {self.bytes / 1e6:.1f} MB"
        ]

    def as_json(self) -> dict[str, Any]:
        """Returns the summary as plain data."""
        return {**asdict(self), "page": str(self.page)}


def browse_cache(path: Path, out: Path, *, images: str, data_root: Path) -> BrowseSummary:
    """Returns the summary of a page on a sealed cache, after writing it.

    Args:
        path: the cache; it needs neighbour lists.
        out: the HTML file, written atomically.
        images: a number of images, spread evenly over those with regions, or ids with commas.
        data_root: where the split's pictures lie.

    Raises:
        CacheError: no lists, or an id that the cache does not hold.
        DataError: the split's annotations or pictures are not there.
        UsageError: `images` is neither.
    """
    browser = CacheBrowser(path, data_root)
    shown = browser.page(images)
    write_bytes(out, shown.html.encode())
    return BrowseSummary(
        page=out,
        image_ids=shown.image_ids,
        num_regions=shown.num_regions,
        num_crops=shown.num_crops,
        bytes=len(shown.html.encode()),
    )


@dataclass(frozen=True)
class BrowsePage:
    """An HTML document, and what it shows."""

    html: str
    image_ids: tuple[int, ...]
    num_regions: int
    num_crops: int


class CacheBrowser:
    """Makes pages on one sealed cache; not for several threads at once.

    Args:
        path: the cache; it needs neighbour lists.
        data_root: where the split's pictures lie.

    Raises:
        CacheError: no such cache, or one without lists.
        DataError: the split's annotations or pictures are not there.
    """

    def __init__(self, path: Path, data_root: Path) -> None:
        self._path = path
        self._views = RegionViews(path)
        split = load_cached_split(self._views.info.split, data_root)
        split.require_images()
        self._crops = _Crops(split)

    def page(self, images: str, *, served: bool = False) -> BrowsePage:
        """Returns the page of some images.

        Args:
            images: a number of images, spread evenly over those with regions, or ids with commas.
            served: whether a server shows it: neighbours then lead to their own images, and a
                field asks for others.

        Raises:
            CacheError: an id that the cache does not hold.
            UsageError: `images` is neither.
        """
        image_ids, rule = _choose(self._views, images)
        pictures: list[dict[str, Any]] = []
        with progress("browse", len(image_ids), quiet=served or len(image_ids) < 50) as advance:
            for done, image_id in enumerate(image_ids, start=1):
                pictures.append(_picture(self._views, self._crops, image_id))
                advance(done, "")
        regions = [region for picture in pictures for region in picture["regions"]]
        template = page_environment({"browse.html": "pipeline"}).get_template("browse.html")
        html = template.render(
            info=self._views.info,
            how=load_parameters(self._path),
            pictures=pictures,
            rule=rule,
            quarantined=len(open_cache(self._path).quarantined),
            served=served,
            asked=images,
        )
        num_crops = len(regions) + sum(len(region["neighbors"]) for region in regions)
        return BrowsePage(html, tuple(image_ids), len(regions), num_crops)


def _choose(views: RegionViews, images: str) -> tuple[list[int], str]:
    """Returns image ids and, in words, how they were chosen."""
    words = [word.strip() for word in images.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise UsageError(f"--images {images}: give a number of images, or ids as in 17,42,99")
    numbers = [int(word) for word in words]
    if "," in images:
        return list(dict.fromkeys(numbers)), "The images asked for."
    if numbers[0] < 1:
        raise UsageError(f"--images {images}: at least one image")
    useful = [int(i) for row, i in enumerate(views.image_ids) if views.num_objects(row)]
    at = np.linspace(0, len(useful) - 1, min(numbers[0], len(useful))).round().astype(int)
    rule = "Images are spread evenly over the cache, in the order of their ids."
    return [useful[i] for i in np.unique(at).tolist()], rule


def _picture(views: RegionViews, crops: "_Crops", image_id: int) -> dict[str, Any]:
    found = views.objects(image_id, most=_REGIONS, neighbors=_NEIGHBORS)
    regions = [
        {
            "view": each.region,
            "crop": crops.crop(each.region),
            "neighbors": [
                {"view": near.region, "cosine": near.cosine, "crop": crops.crop(near.region)}
                for near in each.neighbors
            ],
        }
        for each in found.objects
    ]
    info = crops.info(image_id)
    return {
        "image_id": image_id,
        "file_name": info.file_name,
        "width": info.width,
        "height": info.height,
        "thumbnail": crops.whole(image_id),
        "regions": regions,
        "boxes": _outlines([each.region for each in found.objects]),
    }


def _outlines(regions: Sequence[RegionView]) -> list[dict[str, float]]:
    """Returns the rectangles to draw on the whole picture, in its pixels."""
    return [
        {
            "region": each.region,
            "x": each.box_xyxy[0],
            "y": each.box_xyxy[1],
            "width": each.box_xyxy[2] - each.box_xyxy[0],
            "height": each.box_xyxy[3] - each.box_xyxy[1],
        }
        for each in regions
    ]


class _Crops:
    """Cuts pictures of a split and holds those it read last."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._read = lru_cache(maxsize=_PICTURES_KEPT)(self._decode)

    def info(self, image_id: int) -> ImageInfo:
        """Returns what the annotations say of an image."""
        try:
            return self._split.image_of(image_id)
        except KeyError:
            raise UsageError(f"{self._split.name} has no image {image_id}") from None

    def whole(self, image_id: int) -> str:
        """Returns the whole picture as a data URI, or '' where it cannot be read."""
        picture = self._read(image_id)
        return _data_uri(picture, _PICTURE_SIDE) if picture is not None else ""

    def crop(self, view: RegionView) -> str:
        """Returns the region's pixels as a data URI, or '' where they cannot be read."""
        picture = self._read(view.image_id)
        if picture is None:
            return ""
        x1, y1, x2, y2 = view.box_xyxy
        left, top = int(x1), int(y1)
        right, bottom = max(left + 1, int(np.ceil(x2))), max(top + 1, int(np.ceil(y2)))
        return _data_uri(picture.crop((left, top, right, bottom)), _CROP_SIDE)

    def _decode(self, image_id: int) -> Image.Image | None:
        info = self.info(image_id)
        try:
            pixels = self._split.read(info)
        except UnreadableImageError:
            return None
        return Image.fromarray(pixels)


def _data_uri(picture: Image.Image, longest_side: int) -> str:
    """Returns a picture, no larger than that, as a data URI: JPEG, or PNG where that is small."""
    picture = picture.copy()
    picture.thumbnail((longest_side, longest_side))
    return data_uri(picture, png_up_to=64)
