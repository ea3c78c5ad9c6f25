"""Which classes a batch's focal loss looks at where annotations are federated (as in LVIS)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dkdetr.structures import Targets


def draw_classes(
    targets: Sequence[Targets],
    class_weights: Float[Tensor, "num_classes"],
    *,
    num_drawn: int,
    generator: torch.Generator,
) -> Bool[Tensor, "num_classes"]:
    """Returns the classes that take part in a batch: its own, and others up to `num_drawn`.

    An image of a federated data set is annotated for some classes only; that another class is not
    there is then no evidence. Drawing few negatives, in proportion to how often a class is
    annotated, keeps false ones rare (FedLoss of Zhou et al., arXiv 2103.07461).

    Args:
        targets: of one rank's batch. Its classes always take part, even if more than `num_drawn`.
        class_weights: what the others are drawn in proportion to, without replacement, on the CPU;
            a class of weight 0 is never drawn.
        num_drawn: classes that take part in all, where there are so many.
        generator: decides the draw.
    """
    chosen = torch.zeros(len(class_weights), dtype=torch.bool)
    chosen[torch.cat([target.labels for target in targets]).cpu()] = True
    weights = class_weights.double().masked_fill(chosen, 0.0)
    missing = min(num_drawn - int(chosen.sum()), int((weights > 0).sum()))
    if missing > 0:
        drawn = torch.multinomial(weights, missing, replacement=False, generator=generator)
        chosen[drawn] = True
    return chosen
