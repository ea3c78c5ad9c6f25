"""Denoising queries: base objects with noise, to be told apart from it again (DN-DETR)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dkdetr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from dkdetr.structures import DenoisingQueries, Targets


def make_denoising(
    targets: Sequence[Targets],
    num_classes: int,
    *,
    num_groups: int,
    box_noise: float,
    label_noise: float,
    generator: torch.Generator,
) -> DenoisingQueries:
    """Returns every object `num_groups` times, each time with noise of its own (arXiv 2203.01305).

    A box's centre moves by at most `box_noise` times half its side, its sides change by at most
    that share; what leaves the picture is cut off. Places are filled up to the most objects of an
    image, and to one, so that no batch is without.

    Args:
        targets: base objects.
        num_classes: a changed label is any of these.
        num_groups: groups that do not see each other.
        box_noise: 0: exact boxes.
        label_noise: share of the labels that are drawn anew.
        generator: decides the noise, on the CPU.
    """
    device = targets[0].labels.device
    places = max(1, *(len(target.labels) for target in targets))
    labels = torch.zeros(len(targets), places, dtype=torch.long, device=device)
    boxes = torch.full((len(targets), places, 4), 0.5, device=device)
    boxes = boxes.to(targets[0].boxes_cxcywh.dtype)
    for image, target in enumerate(targets):
        labels[image, : len(target.labels)] = target.labels
        boxes[image, : len(target.labels)] = target.boxes_cxcywh
    counts = torch.tensor([len(target.labels) for target in targets])
    valid = (torch.arange(places)[None] < counts[:, None]).to(device).repeat(1, num_groups)
    labels, boxes = labels.repeat(1, num_groups), boxes.repeat(1, num_groups, 1)

    def draw(*size: int) -> Tensor:
        return torch.rand(*labels.shape, *size, generator=generator).to(device)

    shift = (2 * draw(4) - 1).to(boxes.dtype) * box_noise
    centres = boxes[..., :2] + shift[..., :2] * boxes[..., 2:] / 2
    sides = boxes[..., 2:] * (1 + shift[..., 2:])
    moved = xyxy_to_cxcywh(cxcywh_to_xyxy(torch.cat((centres, sides), dim=-1)).clamp(0, 1))
    other = (draw() * num_classes).long().clamp(max=num_classes - 1)
    return DenoisingQueries(
        boxes_cxcywh=moved,
        labels=torch.where(draw() < label_noise, other, labels),
        valid=valid,
        wanted_boxes_cxcywh=boxes,
        wanted_labels=labels,
        num_groups=num_groups,
    )
