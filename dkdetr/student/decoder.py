"""The decoder: self-attention among queries, deformable attention to memory, boxes refined."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dkdetr.boxes import inverse_sigmoid
from dkdetr.student.deformable_attention import MultiScaleDeformableAttention
from dkdetr.student.encoder import FeedForward, TokenGrid
from dkdetr.student.heads import BoxHead


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; norms after the residuals."""

    def __init__(
        self,
        self_attention: nn.MultiheadAttention,
        cross_attention: MultiScaleDeformableAttention,
        feed_forward: FeedForward,
        dropout: float,
    ) -> None:
        super().__init__()
        embed_dim = self_attention.embed_dim
        self.self_attention = self_attention
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = cross_attention
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Float[Tensor, "batch num_queries embed_dim"],
        positions: Float[Tensor, "batch num_queries embed_dim"],
        reference_points: Float[Tensor, "batch num_queries num_levels 4"],
        memory: Float[Tensor, "batch num_tokens embed_dim"],
        grid: TokenGrid,
        blocked: Bool[Tensor, "batch_heads num_queries num_queries"] | None,
    ) -> Float[Tensor, "batch num_queries embed_dim"]:
        """Returns the queries after one layer; `blocked[i, j]`: query i may not see query j."""
        placed = content + positions
        heard, _ = self.self_attention(
            placed, placed, content, attn_mask=blocked, need_weights=False
        )
        content = self.self_norm(content + self.dropout(heard))
        seen = self.cross_attention(
            content + positions, reference_points, memory, grid.padding_mask, grid.spatial_shapes
        )
        return self.feed_forward(self.cross_norm(content + self.dropout(seen)))


class DeformableDecoder(nn.Module):
    """A stack of decoder layers, each with a box head that refines the boxes of the one before."""

    def __init__(self, layers: Sequence[DecoderLayer], box_heads: Sequence[BoxHead]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.box_heads = nn.ModuleList(box_heads)

    def forward(
        self,
        content: Float[Tensor, "batch num_queries embed_dim"],
        positions: Float[Tensor, "batch num_queries embed_dim"],
        anchors_cxcywh: Float[Tensor, "batch num_queries 4"],
        memory: Float[Tensor, "batch num_tokens embed_dim"],
        grid: TokenGrid,
        blocked: Bool[Tensor, "batch_heads num_queries num_queries"] | None,
    ) -> tuple[
        Float[Tensor, "num_layers batch num_queries embed_dim"],
        Float[Tensor, "num_layers batch num_queries 4"],
    ]:
        """Returns every layer's queries and boxes.

        A layer's boxes pass no gradient to the boxes of the layer before (method A.2).
        """
        queries: list[Tensor] = []
        boxes: list[Tensor] = []
        reference = anchors_cxcywh
        ratios = torch.cat((grid.valid_ratios, grid.valid_ratios), dim=-1)
        for layer, box_head in zip(self.layers, self.box_heads, strict=True):
            padded_reference = reference[:, :, None] * ratios[:, None]
            content = layer(content, positions, padded_reference, memory, grid, blocked)
            refined = (box_head(content) + inverse_sigmoid(reference)).sigmoid()
            queries.append(content)
            boxes.append(refined)
            reference = refined.detach()
        return torch.stack(queries), torch.stack(boxes)
