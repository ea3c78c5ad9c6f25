"""What travels between the rooms: batches, targets, teacher regions and the student's output.

Boxes called `boxes_cxcywh` are normalised by the *un-padded* size of the network's input (the
`image_sizes_hw` of its batch), so that 1.0 is the picture's edge and padding has no say.
"""

from dataclasses import dataclass, fields
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


class _Movable:
    """Gives a frozen dataclass of tensors `to` and `pin_memory`, through tuples and parts too."""

    def to(self, device: torch.device | str) -> Self:
        """Returns a copy on `device`; the copy does not block where memory is pinned."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Returns a copy in page-locked memory (called by the DataLoader)."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, function) for item in value)
    if isinstance(value, _Movable):
        parts = {f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)}  # pyright: ignore[reportArgumentType]
        return type(value)(**parts)
    return value


@dataclass(frozen=True)
class ImageBatch(_Movable):
    """Images padded to one size, normalised as the backbone expects.

    `padding_mask` is True on padding. `image_sizes_hw` is the un-padded size in the network's
    input, `original_sizes_hw` that of the file on disk; both in pixels.
    """

    pixels: Float[Tensor, "batch 3 height width"]
    padding_mask: Bool[Tensor, "batch height width"]
    image_sizes_hw: Int[Tensor, "batch 2"]
    original_sizes_hw: Int[Tensor, "batch 2"]
    image_ids: tuple[int, ...]


@dataclass(frozen=True)
class DecodedImages(_Movable):
    """Images as they were decoded, and the views that a device is to make of them.

    `pixels` holds the rows of RGB of one image after the other, without padding. A view is its
    image resized to `resized_sizes_hw`, cut at `corners_yx`, mirrored where `flipped`, and padded
    to `view_side`; the sizes are those of `ImageBatch`. `decoded_hw` repeats the images' sizes on
    the CPU, so that nobody has to ask a device for them.
    """

    pixels: UInt8[Tensor, "num_bytes"]
    resized_sizes_hw: Int[Tensor, "batch 2"]
    corners_yx: Int[Tensor, "batch 2"]
    flipped: Bool[Tensor, "batch"]
    image_sizes_hw: Int[Tensor, "batch 2"]
    original_sizes_hw: Int[Tensor, "batch 2"]
    decoded_hw: tuple[tuple[int, int], ...]
    image_ids: tuple[int, ...]
    view_side: int


@dataclass(frozen=True)
class Targets(_Movable):
    """The base-category ground truth of one image: labels index the vocabulary's base rows.

    `masks` are there where the student has a mask head: of the padded view, at the masks' stride.
    """

    labels: Int[Tensor, "num_boxes"]
    boxes_cxcywh: Float[Tensor, "num_boxes 4"]
    masks: Bool[Tensor, "num_boxes mask_height mask_width"] | None = None


@dataclass(frozen=True)
class TeacherRegions(_Movable):
    """Regions chosen for distillation, a fixed number of places an image; `valid` marks the filled.

    `embeddings` are the teacher's, of unit norm; boxes are anchors in the augmented view.
    """

    boxes_cxcywh: Float[Tensor, "batch num_regions 4"]
    embeddings: Float[Tensor, "batch num_regions embed_dim"]
    valid: Bool[Tensor, "batch num_regions"]


@dataclass(frozen=True)
class OriginalImage:
    """An image as it was read, and how a place of its augmented view lies in it.

    A normalised point p of the view lies at `scale_xy * p + offset_xy`, in pixels of the original;
    a scale is negative where the view is mirrored. It stays on the CPU: the teacher cuts its crops
    there.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    scale_xy: tuple[float, float]
    offset_xy: tuple[float, float]


@dataclass(frozen=True)
class TrainingBatch(_Movable):
    """One rank's share of a step; `regions` is None while nothing is distilled.

    With `kd.alignment = "online"` the regions have no places, and `originals` are there.
    """

    images: ImageBatch
    targets: tuple[Targets, ...]
    regions: TeacherRegions | None
    originals: tuple[OriginalImage, ...] = ()


@dataclass(frozen=True)
class DecodedBatch(_Movable):
    """A `TrainingBatch` whose views are still to be made (`dkdetr.data.device_views`)."""

    images: DecodedImages
    targets: tuple[Targets, ...]
    regions: TeacherRegions | None
    originals: tuple[OriginalImage, ...] = ()


LoadedBatch = TrainingBatch | DecodedBatch


@dataclass(frozen=True)
class DenoisingQueries(_Movable):
    """Base objects with noise, and what they were; group after group along the second axis."""

    boxes_cxcywh: Float[Tensor, "batch num_queries 4"]
    labels: Int[Tensor, "batch num_queries"]
    valid: Bool[Tensor, "batch num_queries"]
    wanted_boxes_cxcywh: Float[Tensor, "batch num_queries 4"]
    wanted_labels: Int[Tensor, "batch num_queries"]
    num_groups: int


@dataclass(frozen=True)
class QueryOutput:
    """What a group of decoder queries says after every decoder layer."""

    features: Float[Tensor, "num_layers batch num_queries embed_dim"]
    """The projections to the teacher's space, not normalised."""
    boxes_cxcywh: Float[Tensor, "num_layers batch num_queries 4"]


@dataclass(frozen=True)
class EncoderOutput:
    """The first stage: one objectness logit and one box for each token of the memory.

    Boxes of tokens that are not `valid` (padding, or too near the border) mean nothing.
    """

    objectness_logits: Float[Tensor, "batch num_tokens"]
    boxes_cxcywh: Float[Tensor, "batch num_tokens 4"]
    valid: Bool[Tensor, "batch num_tokens"]


@runtime_checkable
class InstanceMasks(Protocol):
    """The masks of all detection queries, drawn only for those that are asked for."""

    @property
    def padding_mask(self) -> Bool[Tensor, "batch mask_height mask_width"]:
        """True where a mask lies in padding."""
        ...

    @property
    def stride(self) -> float:
        """Pixels of the input to a pixel of a mask."""
        ...

    @property
    def masks_at_once(self) -> int:
        """How many to ask for at a time, so that memory stays bounded."""
        ...

    def logits(
        self, layer: int, image_index: Int[Tensor, "n"], query_index: Int[Tensor, "n"]
    ) -> Float[Tensor, "n mask_height mask_width"]:
        """Returns the masks of some queries after one decoder layer, before the sigmoid."""
        ...

    def graph_zero(self) -> Float[Tensor, ""]:
        """Returns a zero tied to all that makes masks: for a batch without an object."""
        ...


@dataclass(frozen=True)
class SkdCalibration:
    """The learnable scale and bias of similarity logits (`kd.skd.loss = "siglip_bias"`)."""

    scale: Float[Tensor, ""]
    bias: Float[Tensor, ""]


@dataclass(frozen=True)
class ExtraDetections:
    """What a group of training-only detection queries says."""

    queries: QueryOutput
    logits: Float[Tensor, "num_layers batch num_queries num_classes"]


@dataclass(frozen=True)
class StudentOutput:
    """Everything the student says.

    `distillation` is None unless regions were given, `masks` unless there is a mask head.
    """

    detection: QueryOutput
    logits: Float[Tensor, "num_layers batch num_queries num_classes"]
    encoder: EncoderOutput
    anchors_cxcywh: Float[Tensor, "batch num_queries 4"]
    anchor_objectness: Float[Tensor, "batch num_queries"]
    distillation: QueryOutput | None
    """KD queries: those anchored at cached boxes, then those at the student's own anchors."""
    calibration: SkdCalibration | None = None
    hybrid: ExtraDetections | None = None
    denoised: ExtraDetections | None = None
    masks: InstanceMasks | None = None
