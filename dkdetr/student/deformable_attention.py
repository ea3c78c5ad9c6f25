"""Multi-scale deformable attention (arXiv 2010.04159, Eq. 3): the function and the module.

Shape letters: B batch, T tokens of all levels, Q queries, H heads, C channels a head, L levels,
P points.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dkdetr.student.attention_backend import Backend, picks_triton
from dkdetr.student.attention_reference import SpatialShapes, plain_attention


def deformable_attention(
    value: Float[Tensor, "B T H C"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Tensor, "B Q L two_or_four"],
    offsets: Float[Tensor, "B Q H L P 2"],
    logits: Float[Tensor, "B Q H L P"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "B Q HC"]:
    """Returns each query's weighted sum of bilinear samples of the value maps.

    Args:
        value: of all tokens.
        spatial_shapes: of the levels that the tokens are of.
        reference_points: (x, y), or (x, y, w, h); (0, 0) is a level's top left corner and (1, 1)
            its bottom right.
        offsets: of the samples, in tokens of their level or, of points with a size, in units of
            half of it over the number of points. Samples outside are 0.
        logits: of the samples' weights, a softmax over all levels and points.
        backend: of the code.

    Gradients flow to values, offsets and logits. Sampling places, the softmax and sums are float32
    at least; the Triton kernel rounds results to the type of `value`.

    Raises:
        UsageError: `backend` is "triton", and it cannot run here.
        ValueError: reference points want a gradient of the Triton kernel.
    """
    inputs = (value, spatial_shapes, reference_points, offsets, logits)
    H, C = value.shape[2:]
    L, P = logits.shape[3:]
    # Atomic additions come in whatever order the threads do.
    if not torch.are_deterministic_algorithms_enabled() and picks_triton(
        backend, value.device, value.dtype, (H, C, L, P)
    ):
        from dkdetr.student.attention_op import triton_attention

        return triton_attention(*inputs)
    return plain_attention(*inputs)


class MultiScaleDeformableAttention(nn.Module):
    """Attention that looks at a few learned places around a reference point on each level."""

    backend: Backend = "auto"

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        places = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, places * 2)
        self.attention_weights = nn.Linear(embed_dim, places)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self._reset()

    def _reset(self) -> None:
        """Heads start looking in as many directions, point p at p + 1 steps; weights are even."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None, :] * steps[None, None, :, None]
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Float[Tensor, "B Q D"],
        reference_points: Float[Tensor, "B Q L two_or_four"],
        tokens: Float[Tensor, "B T D"],
        padding_mask: Bool[Tensor, "B T"],
        spatial_shapes: SpatialShapes,
    ) -> Float[Tensor, "B Q D"]:
        """Returns what each query gathers from the tokens.

        `reference_points` are (x, y), or (x, y, w, h), in padded coordinates of each level; with
        a size, offsets are in units of half the box over the number of points.
        """
        B, Q, _ = query.shape
        H, L, P = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(tokens).masked_fill(padding_mask[..., None], 0.0)
        value = value.view(B, tokens.shape[1], H, -1)
        offsets = self.sampling_offsets(query).view(B, Q, H, L, P, 2)
        logits = self.attention_weights(query).view(B, Q, H, L, P)
        gathered = deformable_attention(
            value, spatial_shapes, reference_points, offsets, logits, backend=self.backend
        )
        return self.output_proj(gathered)
