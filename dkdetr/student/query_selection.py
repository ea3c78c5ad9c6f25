"""The first stage: every token proposes a box and an objectness; the best become queries."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dkdetr.boxes import inverse_sigmoid
from dkdetr.structures import EncoderOutput
from dkdetr.student.encoder import TokenGrid, token_centres
from dkdetr.student.heads import BoxHead

_BASE_SIZE = 0.05
_BORDER = 0.01
_BELOW_ALL = -1e6
"""Less than any logit, and float32 still tells the places of a million tokens apart below it."""


@dataclass(frozen=True)
class SelectedAnchors:
    """The chosen tokens' boxes (without gradient) and objectness logits, best first."""

    boxes_cxcywh: Float[Tensor, "batch num_queries 4"]
    objectness: Float[Tensor, "batch num_queries"]


class QuerySelection(nn.Module):
    """Objectness and box of every token (Deformable DETR's first stage, one logit a token)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.objectness = nn.Linear(embed_dim, 1)
        self.box_head = BoxHead(embed_dim)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        # The focal loss's usual start: one token in a hundred is an object.
        nn.init.constant_(self.objectness.bias, -4.595)

    def forward(
        self, memory: Float[Tensor, "batch num_tokens embed_dim"], grid: TokenGrid
    ) -> EncoderOutput:
        """Returns every token's proposal; tokens in padding or at the border are not valid."""
        start_unactivated, valid = token_boxes(grid)
        memory = memory.masked_fill(~valid[..., None], 0.0)
        memory = self.norm(self.projection(memory))
        # In half precision the 300th best of 20,000 logits has hundreds of equals.
        with torch.autocast(device_type=memory.device.type, enabled=False):
            logits = self.objectness(memory.to(self.objectness.weight.dtype))[..., 0]
        boxes = (self.box_head(memory) + start_unactivated).sigmoid()
        return EncoderOutput(objectness_logits=logits, boxes_cxcywh=boxes, valid=valid)


def token_boxes(
    grid: TokenGrid,
) -> tuple[Float[Tensor, "batch num_tokens 4"], Bool[Tensor, "batch num_tokens"]]:
    """Returns where each token's box starts, before the sigmoid, and whether it may propose.

    A token of level l starts with a square of side 0.05 * 2^l around its centre. It may propose
    if it lies in the picture and all its box's coordinates lie in (0.01, 0.99).
    """
    centres = token_centres(grid)
    sides = [
        centres.new_full((height * width,), _BASE_SIZE * 2.0**level)
        for level, (height, width) in enumerate(grid.spatial_shapes)
    ]
    side = torch.cat(sides)[None, :, None].expand(centres.shape[0], -1, 2)
    boxes = torch.cat((centres, side), dim=-1)
    inside = ((boxes > _BORDER) & (boxes < 1 - _BORDER)).all(-1)
    valid = inside & ~grid.padding_mask
    # Tokens that may not propose get a finite box all the same: an infinite one (as in the
    # original) turns into NaN wherever it is chosen for want of better ones.
    start = inverse_sigmoid(boxes.clamp(_BORDER, 1 - _BORDER))
    return start, valid


def select_anchors(encoder: EncoderOutput, num_queries: int) -> SelectedAnchors:
    """Returns the `num_queries` proposals of highest objectness, those that are not valid last.

    A picture with fewer tokens gives as many queries as it has tokens. The objectness of a token
    that is not valid is minus infinity; of these the earlier come first.
    """
    logits = encoder.objectness_logits.detach()
    # topk leaves open which of several equals it takes, and every device and runtime takes others.
    places = torch.arange(logits.shape[1], dtype=logits.dtype, device=logits.device)
    ranking = torch.where(encoder.valid, logits, _BELOW_ALL - places)
    chosen = ranking.topk(min(num_queries, logits.shape[1]), dim=1).indices
    scores = logits.masked_fill(~encoder.valid, -torch.inf)
    boxes = encoder.boxes_cxcywh.detach().gather(1, chosen[..., None].expand(-1, -1, 4))
    return SelectedAnchors(boxes_cxcywh=boxes, objectness=scores.gather(1, chosen))
