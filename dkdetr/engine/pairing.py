"""Between the student's forward pass and the losses: which query learns from which embedding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cache.location import CachePath
from cache.store import CacheReader
from dkdetr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from dkdetr.config import ExperimentConfig
from dkdetr.data.class_frequencies import images_per_base_class
from dkdetr.data.splits import Split
from dkdetr.data.teacher_mean import mean_embedding
from dkdetr.data.vocabulary import from_metadata
from dkdetr.encoders import RegionEncoder
from dkdetr.errors import UsageError
from dkdetr.losses.alignment import AlignedOutput, Alignment
from dkdetr.losses.criterion import Criterion
from dkdetr.structures import OriginalImage, StudentOutput, TrainingBatch


@dataclass(frozen=True)
class TeacherSide:
    """What some options want to know beside the batches.

    `encoder` is the teacher itself (`kd.alignment = "online"`), `mean` the cache's mean embedding
    (`kd.skd.loss = "centred"`), `class_weights` how likely a class is drawn
    (`detection.loss_class = "fed"`).
    """

    encoder: RegionEncoder | None = None
    mean: Float[Tensor, "embed_dim"] | None = None
    class_weights: Float[Tensor, "num_classes"] | None = None


TeacherBuilder = Callable[[CachePath, torch.device], RegionEncoder]
"""Loads the teacher that made the cache of this path."""


def teacher_side(
    config: ExperimentConfig,
    reader: CacheReader,
    split: Split,
    device: torch.device,
    build_teacher: TeacherBuilder | None,
) -> TeacherSide:
    """Returns what an experiment's options want, and nothing more.

    Raises:
        UsageError: `online` is asked for and nobody can load the teacher.
    """
    kd, detection = config.kd, config.detection
    encoder = mean = weights = None
    if kd.enabled and kd.alignment == "online":
        if build_teacher is None:
            raise UsageError("kd.alignment=online needs the teacher: only `dkdetr train` loads it")
        encoder = build_teacher(reader.path, device)
    if kd.enabled and kd.skd.weight > 0 and kd.skd.loss == "centred":
        centre = mean_embedding(reader, regions_per_image=kd.regions_per_image)
        mean = torch.from_numpy(centre).to(device)
    if detection.loss_class == "fed":
        counts = images_per_base_class(split, from_metadata(*reader.text()))
        weights = torch.from_numpy(counts**detection.fed_power * (counts > 0))
    return TeacherSide(encoder, mean, weights)


def pair_with_teacher(
    output: StudentOutput,
    batch: TrainingBatch,
    alignment: Alignment,
    criterion: Criterion,
    encoder: RegionEncoder | None,
) -> AlignedOutput | None:
    """Returns the pairs to distil; None while nothing is distilled."""
    if batch.regions is None:
        return None
    embed = None if encoder is None else partial(embed_own_anchors, encoder, batch.originals)
    matches = criterion.match_last(output, batch.targets) if alignment.wants_matches else None
    return alignment(
        output,
        batch.targets,
        batch.regions,
        batch.images.image_sizes_hw,
        matches=matches,
        embed_anchors=embed,
    )


def embed_own_anchors(
    encoder: RegionEncoder,
    originals: Sequence[OriginalImage],
    boxes_cxcywh: Float[Tensor, "batch num_regions 4"],
    valid: Bool[Tensor, "batch num_regions"],
) -> Float[Tensor, "batch num_regions embed_dim"]:
    """Returns the teacher's embeddings of boxes of the views, cut from the original images.

    The teacher sees the picture upright and at full resolution, whatever the augmentation, as it
    does where a cache is made; of a box that reaches beyond the view it sees what the view shows.
    Empty places get zeros.
    """
    rows: list[np.ndarray] = []
    for original, boxes, filled in zip(originals, boxes_cxcywh, valid, strict=True):
        seen = cxcywh_to_xyxy(boxes[filled].detach().double().cpu()).clamp(0, 1)
        boxes_xyxy = boxes_in_original(xyxy_to_cxcywh(seen), original)
        rows.append(encoder.encode_regions(original.pixels, boxes_xyxy.numpy()))
    embeddings = torch.zeros(*valid.shape, rows[0].shape[1], device=valid.device)
    embeddings[valid] = torch.from_numpy(np.concatenate(rows)).to(valid.device)
    return embeddings


def boxes_in_original(
    boxes_cxcywh: Float[Tensor, "n 4"], original: OriginalImage
) -> Float[Tensor, "n 4"]:
    """Returns normalised boxes of a view as (left, top, right, bottom) pixels of its original."""
    scale = boxes_cxcywh.new_tensor(original.scale_xy * 2)
    offset = boxes_cxcywh.new_tensor(original.offset_xy * 2)
    one, other = (cxcywh_to_xyxy(boxes_cxcywh) * scale + offset).chunk(2, dim=1)
    return torch.cat((torch.minimum(one, other), torch.maximum(one, other)), dim=1)
