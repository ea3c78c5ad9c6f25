"""What a loader process knows and does: one image, its targets and its regions, as a pure function.

Novel boxes are left behind in the main process: a loader process never receives them.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from cache.regions import RegionSource
from dkdetr.config import ExperimentConfig
from dkdetr.data.annotations import BoxTable, ImageInfo
from dkdetr.data.device_views import decoded_images
from dkdetr.data.image_files import ImageFolder, read_image
from dkdetr.data.picture_input import decoded_batch, image_batch
from dkdetr.data.region_selection import select_regions
from dkdetr.data.samplers import SampleKey, derive_seed
from dkdetr.data.segmentations import SegmentationTable, read_segmentations, render_masks
from dkdetr.data.splits import Split
from dkdetr.data.transforms import (
    ViewGeometry,
    draw_geometry,
    rendered_images,
    visible_boxes,
)
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import DataError, MismatchError
from dkdetr.structures import (
    DecodedBatch,
    DecodedImages,
    ImageBatch,
    LoadedBatch,
    OriginalImage,
    Targets,
    TeacherRegions,
    TrainingBatch,
)

_SHOWN = 20


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """The images of a split that can be trained on: readable ones with a base box.

    `boxes` holds base boxes only, crowds left out; `labels` index the vocabulary's base rows.
    `segmentations` are the boxes' outlines, row by row, where masks are trained.
    """

    folder: ImageFolder
    images: tuple[ImageInfo, ...]
    boxes: BoxTable
    labels: Int[np.ndarray, "num_boxes"]
    segmentations: SegmentationTable | None = None

    def first(self, count: int | None) -> "TrainingImages":
        """Returns only the first `count` images; all of them for None."""
        if count is None:
            return self
        keep = np.arange(len(self.images)) < count
        boxes = self.boxes.keep_images(keep)
        labels = self.labels[: len(boxes.category_ids)]
        # Outlines are found by a box's row, and the first rows stay where they are.
        return replace(self, images=self.images[:count], boxes=boxes, labels=labels)


@dataclass(frozen=True)
class _View:
    """An image as it was read, and what is to be shown of it."""

    geometry: ViewGeometry
    image_id: int
    original: UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class _Regions:
    boxes_cxcywh: Float[Tensor, "num_regions 4"]
    embeddings: Float[Tensor, "num_regions embed_dim"]
    valid: Bool[Tensor, "num_regions"]


def training_images(
    split: Split,
    vocabulary: Vocabulary,
    *,
    leave_out: Container[int] = (),
    with_masks: bool = False,
) -> TrainingImages:
    """Returns what training may know of a split, without the image ids of `leave_out`.

    Raises:
        DataError: the split is not for training, the vocabulary would train novel names, or
            masks are wanted and an object has none.
        MismatchError: the vocabulary's base names are not the split's.
    """
    if not split.is_train:
        raise DataError(
            f"{split.name} is no training split, as its name or its folder's says: a student "
            "trained on it would be scored on what it has learned by heart"
        )
    base = vocabulary.base()
    _check_vocabulary(split, base)
    table = split.base_table
    pairs = zip(split.images, np.diff(table.offsets), strict=True)
    keep = np.array([count > 0 and image.image_id not in leave_out for image, count in pairs])
    boxes = table.keep_images(keep)
    label_of = {number: base.label_of(number) for number in base.category_ids}
    labels = np.array([label_of[number] for number in boxes.category_ids.tolist()], dtype=np.int64)
    images = tuple(image for image, kept in zip(split.images, keep, strict=True) if kept)
    segmentations = None
    if with_masks:
        segmentations = read_segmentations(split.annotations_path, boxes, images)
    return TrainingImages(split.folder, images, boxes, labels, segmentations)


def _check_vocabulary(split: Split, base: Vocabulary) -> None:
    ours = split.base_category_ids
    known = {each.category_id for each in split.categories}
    leaked = [number for number in base.category_ids if number in known - ours]
    if leaked:
        names = [base.names[base.label_of(number)] for number in leaked[:_SHOWN]]
        raise DataError(
            f"{len(leaked)} novel categories of {split.name} stand as base in the vocabulary: "
            f"{', '.join(names)}; training on them would leak what the score must find unseen"
        )
    if set(base.category_ids) != ours:
        raise MismatchError(
            f"the vocabulary's {len(base)} base categories are not the {len(ours)} of "
            f"{split.name}: it was built for another split"
        )


class TrainingBatches:
    """Makes one rank's training batch of a list of sample keys.

    Args:
        images: what may be trained on.
        config: sizes, augmentation (no longer `auto`: see `settle_views`), selection and the seed.
        regions: the cached regions, handed out from `kd.start_epoch` on; None: never.
    """

    def __init__(
        self, images: TrainingImages, config: ExperimentConfig, regions: RegionSource | None
    ) -> None:
        assert config.data.augment != "auto", "only who knows the device can decide"
        self._images = images
        self._config = config
        self._source = regions

    def __call__(self, keys: Sequence[SampleKey]) -> LoadedBatch:
        """Returns the batch; it depends on the seed and the keys alone."""
        views: list[_View] = []
        targets: list[Targets] = []
        regions: list[_Regions] = []
        for key in keys:
            view, target = self._view_of(key)
            views.append(view)
            targets.append(target)
            if self._source is not None and self._config.kd.begun(key.epoch):
                regions.append(self._regions_of(self._source, view, key.image_index))
        joined = _collate_regions(regions) if regions else None
        online = self._config.kd.alignment == "online" and len(regions) > 0
        originals = tuple(_original(view) for view in views) if online else ()
        pixels = [view.original for view in views]
        geometries = [view.geometry for view in views]
        ids, side = [view.image_id for view in views], self._config.data.image_size
        if self._config.data.augment == "device":
            decoded = decoded_images(pixels, geometries, ids, image_size=side)
            return DecodedBatch(decoded, tuple(targets), joined, originals)
        rendered = rendered_images(pixels, geometries, ids, image_size=side)
        return TrainingBatch(rendered, tuple(targets), joined, originals)

    def _base_boxes_of(self, image_index: int) -> Float[Tensor, "num_boxes 4"]:
        return torch.from_numpy(self._images.boxes.of_image(image_index).boxes_xyxy)

    def _view_of(self, key: SampleKey) -> tuple[_View, Targets]:
        settings = self._config.data
        image = self._images.images[key.image_index]
        original_hw = (image.height, image.width)
        boxes = self._base_boxes_of(key.image_index)
        seed = derive_seed("view", self._config.seed, key.epoch, key.position)
        geometry = draw_geometry(
            original_hw, boxes,
            image_size=settings.image_size,
            scale_range=settings.scale_range,
            flip_probability=settings.flip_probability,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        cut, seen = visible_boxes(geometry, boxes)
        rows = slice(*self._images.boxes.offsets[key.image_index : key.image_index + 2].tolist())
        targets = Targets(
            labels=torch.from_numpy(self._images.labels[rows])[seen],
            boxes_cxcywh=geometry.normalise(cut[seen]),
            masks=self._masks_of(np.arange(rows.start, rows.stop)[seen.numpy()], geometry),
        )
        path = self._images.folder.path(image.file_name)
        pixels = read_image(path, expected_hw=original_hw)
        return _View(geometry, image.image_id, pixels), targets

    def _masks_of(
        self, rows: Int[np.ndarray, "num_boxes"], geometry: ViewGeometry
    ) -> Bool[Tensor, "num_boxes side side"] | None:
        table, student = self._images.segmentations, self._config.student
        if table is None:
            return None
        outlines = [table.of_row(row) for row in rows.tolist()]
        side = student.mask_side(self._config.data.image_size)
        return render_masks(outlines, geometry, side=side, stride=student.mask_stride)

    def _regions_of(self, source: RegionSource, view: _View, image_index: int) -> _Regions:
        kd, geometry = self._config.kd, view.geometry
        places = kd.offered_regions
        if places == 0:  # the teacher will see the student's own anchors
            dim = source.plan.embed_dim
            return _Regions(
                torch.zeros(0, 4), torch.zeros(0, dim), torch.zeros(0, dtype=torch.bool)
            )
        rows = source.regions(view.image_id)
        if tuple(rows.image_size_hw) != geometry.original_hw:
            raise MismatchError(
                f"the cache saw image {rows.image_id} with size {tuple(rows.image_size_hw)}, the "
                f"annotations say {geometry.original_hw} (height, width): made from other files"
            )
        chosen = select_regions(
            torch.tensor(rows.boxes_xyxy),  # copies: the cache's arrays may be read-only
            torch.tensor(rows.objectness),
            torch.tensor(rows.max_base_iou),
            base_boxes_xyxy=self._base_boxes_of(image_index),
            geometry=geometry,
            num_regions=places,
            settings=kd.selection,
        )
        count = len(chosen.indices)
        # Places left empty get an anchor that every later formula survives: the whole view.
        boxes = torch.tensor((0.5, 0.5, 1.0, 1.0)).repeat(places, 1)
        boxes[:count] = chosen.boxes_cxcywh
        embeddings = torch.zeros(places, rows.embed_dim)
        # A mirrored view learns from the mirrored crops, where the cache has them.
        cached = rows.embeddings(chosen.indices.numpy(), flipped=geometry.flip and rows.has_flipped)
        embeddings[:count] = torch.from_numpy(cached)
        return _Regions(boxes, embeddings, torch.arange(places) < count)


class EvaluationBatches:
    """Makes an evaluation batch of a list of image indices: whole images, nothing random."""

    def __init__(
        self, folder: ImageFolder, images: tuple[ImageInfo, ...], *, image_size: int
    ) -> None:
        self._folder = folder
        self._images = images
        self._image_size = image_size

    def __call__(self, indices: Sequence[int]) -> ImageBatch:
        """Returns the images at `indices`."""
        pixels, ids = self._read(indices)
        return image_batch(pixels, ids, image_size=self._image_size)

    def decoded(self, indices: Sequence[int]) -> DecodedImages:
        """Returns the same images, their views still to be made (`device_views`)."""
        pixels, ids = self._read(indices)
        return decoded_batch(pixels, ids, image_size=self._image_size)

    def _read(self, indices: Sequence[int]) -> tuple[list[UInt8[np.ndarray, "_h _w 3"]], list[int]]:
        images = [self._images[index] for index in indices]
        pixels = [
            read_image(self._folder.path(image.file_name), expected_hw=(image.height, image.width))
            for image in images
        ]
        return pixels, [image.image_id for image in images]


def _original(view: _View) -> OriginalImage:
    return OriginalImage(view.original, *view.geometry.to_original())


def _collate_regions(regions: Sequence[_Regions]) -> TeacherRegions:
    return TeacherRegions(
        boxes_cxcywh=torch.stack([each.boxes_cxcywh for each in regions]),
        embeddings=torch.stack([each.embeddings for each in regions]),
        valid=torch.stack([each.valid for each in regions]),
    )
