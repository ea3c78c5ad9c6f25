"""Mask losses of matched queries: sums, in chunks whose activations never stand together."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from dkdetr.losses.matcher import Matches
from dkdetr.structures import InstanceMasks, Targets

_DICE_EPSILON = 1e-5


def matched_mask_losses(
    masks: InstanceMasks,
    layer: int,
    matches: Matches,
    targets: Bool[Tensor, "num_targets mask_height mask_width"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Returns the summed (dice, cross-entropy) losses of one decoder layer's matched queries.

    A chunk of `masks.masks_at_once` masks is drawn, judged and forgotten; the backward pass draws
    it again. Without a match the two are zeros tied to the graph.

    Args:
        masks: the student's.
        layer: the decoder layer that `matches` are of.
        matches: pairs of queries and targets.
        targets: the batch's masks laid end to end, in the order that `matches` counts.
    """
    zero = masks.graph_zero()
    dice, cross_entropy = zero, zero
    for start in range(0, len(matches.query_index), masks.masks_at_once):
        chunk = slice(start, start + masks.masks_at_once)
        losses = checkpoint(
            _chunk_losses,
            masks,
            layer,
            matches.image_index[chunk],
            matches.query_index[chunk],
            targets,
            matches.target_index[chunk],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        dice, cross_entropy = dice + losses[0], cross_entropy + losses[1]
    return dice, cross_entropy


def _chunk_losses(
    masks: InstanceMasks,
    layer: int,
    image_index: Tensor,
    query_index: Tensor,
    targets: Tensor,
    target_index: Tensor,
) -> tuple[Tensor, Tensor]:
    logits = masks.logits(layer, image_index, query_index)
    inside = ~masks.padding_mask[image_index]
    wanted = targets[target_index].to(logits.dtype)
    return dice_loss(logits, wanted, inside), mask_cross_entropy(logits, wanted, inside)


def dice_loss(
    logits: Float[Tensor, "num_masks height width"],
    targets: Float[Tensor, "num_masks height width"],
    inside: Bool[Tensor, "num_masks height width"],
) -> Float[Tensor, ""]:
    """Returns the sum over masks of 1 - 2 sum(pt) / (sum p² + sum t² + 1e-5), p the sigmoid.

    Args:
        logits: before the sigmoid.
        targets: 0 or 1, or a share.
        inside: pixels that count; False in padding.
    """
    probability = (logits.sigmoid() * inside).flatten(1)
    wanted = (targets * inside).flatten(1)
    overlap = (probability * wanted).sum(1)
    sizes = (probability**2).sum(1) + (wanted**2).sum(1)
    return (1 - 2 * overlap / (sizes + _DICE_EPSILON)).sum()


def mask_cross_entropy(
    logits: Float[Tensor, "num_masks height width"],
    targets: Float[Tensor, "num_masks height width"],
    inside: Bool[Tensor, "num_masks height width"],
) -> Float[Tensor, ""]:
    """Returns the sum over masks of the mean binary cross-entropy of the pixels `inside`."""
    terms = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    counts = inside.flatten(1).sum(1).clamp(min=1)
    return ((terms * inside).flatten(1).sum(1) / counts).sum()


def stacked_masks(
    targets: Sequence[Targets], size_hw: tuple[int, int]
) -> Bool[Tensor, "num_targets mask_height mask_width"]:
    """Returns the masks of a batch's targets laid end to end.

    Raises:
        ValueError: an image has none, or of another size than the student's.
    """
    masks_of_images: list[Tensor] = []
    for target in targets:
        masks = target.masks
        if masks is None or tuple(masks.shape[1:]) != size_hw:
            found = "none" if masks is None else f"{tuple(masks.shape[1:])}"
            raise ValueError(f"the student draws masks of {size_hw}, the targets hold {found}")
        masks_of_images.append(masks)
    return torch.cat(masks_of_images)
