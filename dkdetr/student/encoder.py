"""The encoder: deformable self-attention over the tokens of all levels."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dkdetr.student.attention_reference import SpatialShapes
from dkdetr.student.deformable_attention import MultiScaleDeformableAttention


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of all levels lie: what attention must know beside the tokens."""

    spatial_shapes: SpatialShapes
    padding_mask: Bool[Tensor, "batch num_tokens"]
    valid_ratios: Float[Tensor, "batch num_levels 2"]
    """(x, y) share of each level's padded map that is picture."""


class FeedForward(nn.Module):
    """Two linear layers with ReLU, a residual and a norm after it."""

    def __init__(self, embed_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Float[Tensor, "*batch embed_dim"]) -> Float[Tensor, "*batch embed_dim"]:
        """Returns norm(x + linear2(relu(linear1(x)))), with dropout in training."""
        inner = self.linear2(self.dropout(self.linear1(x).relu()))
        return norm_of_sum(self.norm, x, self.dropout(inner))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward part, norms after the residuals."""

    def __init__(
        self, attention: MultiScaleDeformableAttention, feed_forward: FeedForward, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(feed_forward.linear1.in_features)
        self.feed_forward = feed_forward

    def forward(
        self, tokens: Tensor, positions: Tensor, reference_points: Tensor, grid: TokenGrid
    ) -> Tensor:
        """Returns the tokens [batch, num_tokens, embed_dim] after one layer, of the type given."""
        gathered = self.self_attention(
            tokens + positions, reference_points, tokens, grid.padding_mask, grid.spatial_shapes
        )
        inner = norm_of_sum(self.norm, tokens, self.dropout(gathered)).to(tokens.dtype)
        return self.feed_forward(inner).to(tokens.dtype)


class DeformableEncoder(nn.Module):
    """A stack of encoder layers; each token refers to its own place on every level."""

    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        tokens: Float[Tensor, "batch num_tokens embed_dim"],
        positions: Float[Tensor, "batch num_tokens embed_dim"],
        grid: TokenGrid,
    ) -> Float[Tensor, "batch num_tokens embed_dim"]:
        """Returns the memory. `positions` are the places' encodings plus the level's.

        Under autocast the tokens are of its type between layers, and so is the memory.
        """
        stored = _stored_type(tokens)
        tokens, positions = tokens.to(stored), positions.to(stored)
        centres = token_centres(grid)
        reference_points = centres[:, :, None] * grid.valid_ratios[:, None]
        for layer in self.layers:
            tokens = layer(tokens, positions, reference_points, grid)
        return tokens


def norm_of_sum(norm: nn.LayerNorm, x: Tensor, change: Tensor) -> Tensor:
    """Returns norm(x + change), of the norm's type: not even the sum is rounded under autocast."""
    return norm(x.to(norm.weight.dtype) + change)


def _stored_type(tokens: Tensor) -> torch.dtype:
    """Returns autocast's type where it would round such tokens, else their own."""
    kind = tokens.device.type
    if tokens.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tokens.dtype


def token_centres(grid: TokenGrid) -> Float[Tensor, "batch num_tokens 2"]:
    """Returns each token's (x, y), normalised by the un-padded picture; beyond 1 in padding."""
    ratios = grid.valid_ratios
    per_level: list[Tensor] = []
    for level, (height, width) in enumerate(grid.spatial_shapes):
        y = torch.arange(0.5, height, dtype=ratios.dtype, device=ratios.device)
        x = torch.arange(0.5, width, dtype=ratios.dtype, device=ratios.device)
        x = x / (ratios[:, level, :1] * width)
        y = y / (ratios[:, level, 1:] * height)
        places = (x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width))
        per_level.append(torch.stack(places, dim=-1).flatten(1, 2))
    return torch.cat(per_level, dim=1)


def valid_ratio(
    padding_mask: Bool[Tensor, "batch height width"], *, dtype: torch.dtype
) -> Float[Tensor, "batch 2"]:
    """Returns the (x, y) share of a padded map that is picture, from its first row and column."""
    _, height, width = padding_mask.shape
    rows = (~padding_mask[:, :, 0]).sum(1).to(dtype) / height
    columns = (~padding_mask[:, 0, :]).sum(1).to(dtype) / width
    return torch.stack((columns, rows), dim=-1)
