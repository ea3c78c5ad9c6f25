"""Sine encodings: of a map's positions and of boxes."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_TEMPERATURE = 10_000.0


def _wavelengths(num_feats: int, like: Tensor) -> Tensor:
    index = torch.arange(num_feats, dtype=like.dtype, device=like.device)
    return _TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / num_feats)


def sines(angles: Tensor, num_feats: int) -> Tensor:
    """Returns [..., num_feats] of [...]: sine and cosine in turn, over falling frequencies."""
    phases = angles[..., None] / _wavelengths(num_feats, angles)
    return torch.stack((phases[..., 0::2].sin(), phases[..., 1::2].cos()), dim=-1).flatten(-2)


def encode_positions(
    padding_mask: Bool[Tensor, "batch height width"], *, embed_dim: int, dtype: torch.dtype
) -> Float[Tensor, "batch height width embed_dim"]:
    """Returns the encoding of each place: first half its row, second half its column.

    Rows and columns are counted over the picture, not over padding, at pixel centres (offset
    -0.5), and scaled to (0, 2 pi) (Deformable DETR).
    """
    # Counted in whole numbers: of others a GPU has no deterministic `cumsum`.
    rows, columns = ((~padding_mask).long().cumsum(axis).to(dtype) for axis in (1, 2))
    rows = (rows - 0.5) / (rows[:, -1:, :] + 1e-6) * (2 * math.pi)
    columns = (columns - 0.5) / (columns[:, :, -1:] + 1e-6) * (2 * math.pi)
    half = embed_dim // 2
    return torch.cat((sines(rows, half), sines(columns, half)), dim=-1)


def encode_boxes(
    boxes_cxcywh: Float[Tensor, "*batch 4"], *, embed_dim: int
) -> Float[Tensor, "*batch twice_embed_dim"]:
    """Returns the encoding of normalised boxes, `embed_dim / 2` sines for each coordinate."""
    return sines(boxes_cxcywh * (2 * math.pi), embed_dim // 2).flatten(-2)
