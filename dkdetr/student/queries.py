"""Groups of decoder queries, and which group hears which."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class QueryGroup:
    """Queries that are fed to the decoder beside others.

    `sees` numbers the groups that they hear in self-attention, in the order of the decoder's
    input. Places that are not `valid` are heard by nobody.
    """

    content: Float[Tensor, "batch num_queries embed_dim"]
    positions: Float[Tensor, "batch num_queries embed_dim"]
    boxes_cxcywh: Float[Tensor, "batch num_queries 4"]
    valid: Bool[Tensor, "batch num_queries"]
    sees: tuple[int, ...]

    def __len__(self) -> int:
        return self.boxes_cxcywh.shape[1]


@dataclass(frozen=True)
class KDQueryPlan:
    """How many KD queries a student has, where they stand, and how many contents they have."""

    num_anchored: int
    """KD queries at the boxes of the first so many regions that are given."""
    at_own_anchors: bool
    """Whether there is one at each anchor of a detection query too."""
    num_slots: int
    """Learned contents, one a place: those of anchored queries first. 0: one, which all share."""


def join_groups(
    groups: Sequence[QueryGroup],
) -> tuple[
    Float[Tensor, "batch num_queries embed_dim"],
    Float[Tensor, "batch num_queries embed_dim"],
    Float[Tensor, "batch num_queries 4"],
    Bool[Tensor, "batch num_queries num_queries"] | None,
]:
    """Returns (content, positions, boxes, blocked) for the decoder; one group alone is not masked.

    `blocked[b, i, j]`: query i may not see query j.
    """
    if len(groups) == 1:
        return groups[0].content, groups[0].positions, groups[0].boxes_cxcywh, None
    return (
        torch.cat([group.content for group in groups], dim=1),
        torch.cat([group.positions for group in groups], dim=1),
        torch.cat([group.boxes_cxcywh for group in groups], dim=1),
        blocked_pairs([group.valid for group in groups], [group.sees for group in groups]),
    )


def blocked_pairs(
    valid: Sequence[Bool[Tensor, "batch _"]], sees: Sequence[tuple[int, ...]]
) -> Bool[Tensor, "batch num_queries num_queries"]:
    """Returns which query may not see which (True = blocked).

    Group i sees the filled places of the groups `sees[i]`. Detection queries come first and see
    themselves alone, so that what else is trained does not change them; KD queries see both
    kinds (paper 3.3; method A.6 on the paper's swapped symbols). An empty KD place sees the
    detection queries, so that no row is blocked altogether.
    """
    sizes = [mask.shape[1] for mask in valid]
    # In blocks on the device: nothing is copied there, and no shape depends on a number there.
    rows = [
        torch.cat([valid[0].new_full((height, width), i in sees[row])
                   for i, width in enumerate(sizes)], dim=1)
        for row, height in enumerate(sizes)
    ]  # fmt: skip
    return ~(torch.cat(rows)[None] & torch.cat(list(valid), dim=1)[:, None, :])
