"""Multi-scale deformable attention (arXiv 2010.04159, Eq. 3), in plain PyTorch: the reference.

Shape letters: B batch, T tokens of all levels, Q queries, H heads, C channels a head, L levels,
P points.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

SpatialShapes = Sequence[tuple[int, int]]
"""(height, width) of each level, finest first; their areas sum to the number of tokens."""


def plain_attention(
    value: Float[Tensor, "B T H C"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Tensor, "B Q L two_or_four"],
    offsets: Float[Tensor, "B Q H L P 2"],
    logits: Float[Tensor, "B Q H L P"],
) -> Float[Tensor, "B Q HC"]:
    """Returns `reference_attention` where offsets lead, weighted by the softmax of the logits.

    A softmax is over all levels and points. Gradients flow to every input.
    """
    locations = sampling_locations(reference_points, offsets, spatial_shapes)
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return reference_attention(value, spatial_shapes, locations, weights)


def sampling_locations(
    reference_points: Float[Tensor, "B Q L two_or_four"],
    offsets: Float[Tensor, "B Q H L P 2"],
    spatial_shapes: SpatialShapes,
) -> Float[Tensor, "B Q H L P 2"]:
    """Returns where offsets lead from (x, y), or (x, y, w, h), in coordinates of each level.

    Offsets count tokens of their level or, with a size, half the box over the number of points.
    Locations have the reference points' type, float32, whatever autocast does around them.
    """
    offsets = offsets.to(reference_points.dtype)
    centres = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        return centres + offsets / map_sizes(spatial_shapes, offsets)[:, None]
    half_sizes = reference_points[:, :, None, :, None, 2:] * 0.5
    return centres + offsets / offsets.shape[4] * half_sizes


def map_sizes(spatial_shapes: SpatialShapes, like: Tensor) -> Float[Tensor, "L 2"]:
    """Returns (width, height) of each level, of the type and device of `like`.

    Filled on the device: a copy would be waited for, and an exported graph would hold it as a
    constant, wrong for pictures of another size.
    """
    # Of an empty level 1, or the gradient of offsets would be 0 / 0.
    sides = [like.new_zeros(()) + max(side, 1) for hw in spatial_shapes for side in reversed(hw)]
    return torch.stack(sides).view(-1, 2)


def reference_attention(
    value: Float[Tensor, "B T H C"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Tensor, "B Q H L P 2"],
    attention_weights: Float[Tensor, "B Q H L P"],
) -> Float[Tensor, "B Q HC"]:
    """Returns each query's weighted sum of bilinear samples of the value maps.

    Locations are (x, y) with (0, 0) a level's top left corner and (1, 1) its bottom right;
    samples outside are 0. Gradients flow to values, locations and weights. The result has the
    wider precision of values and locations: half a location is up to half a token wrong.
    """
    value = value.to(torch.promote_types(value.dtype, sampling_locations.dtype))
    B, _, H, C = value.shape
    Q, P = sampling_locations.shape[1], sampling_locations.shape[4]
    grids_BHQLP2 = (2 * sampling_locations - 1).permute(0, 2, 1, 3, 4, 5).to(value.dtype)
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    samples = []
    for level, ((height, width), value_BtHC) in enumerate(zip(spatial_shapes, levels, strict=True)):
        maps = value_BtHC.permute(0, 2, 3, 1).reshape(B * H, C, height, width)
        grid = grids_BHQLP2[:, :, :, level].reshape(B * H, Q, P, 2)
        samples.append(_sample(maps, grid))
    weights = attention_weights.permute(0, 2, 1, 3, 4).reshape(B * H, 1, Q, -1).to(value.dtype)
    summed = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)  # [BH, C, Q]
    return summed.reshape(B, H * C, Q).transpose(1, 2)


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    if maps.shape[-2] * maps.shape[-1] == 0:
        return maps.new_zeros(*maps.shape[:2], *grid.shape[1:3])
    # grid_sample's backward on CUDA adds in whatever order its threads come.
    if maps.is_cuda and torch.are_deterministic_algorithms_enabled():
        return sample_by_gathering(maps, grid)
    return functional.grid_sample(
        maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )


def sample_by_gathering(
    maps: Float[Tensor, "N C height width"], grid: Float[Tensor, "N Q P 2"]
) -> Float[Tensor, "N C Q P"]:
    """Returns what bilinear `grid_sample` does (zeros outside, corners not aligned), by gathering.

    Slower, but its backward has a deterministic form on every device.
    """
    N, C, height, width = maps.shape
    Q, P = grid.shape[1:3]
    flat = maps.flatten(2)
    x = (grid[..., 0] + 1) * (width / 2) - 0.5
    y = (grid[..., 1] + 1) * (height / 2) - 0.5
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    total = maps.new_zeros(N, C, Q, P)
    for corner_x, corner_y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = left + corner_x, top + corner_y
        share = right_share if corner_x else 1 - right_share
        share = share * (bottom_share if corner_y else 1 - bottom_share)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
        picked = flat.gather(2, place.view(N, 1, Q * P).expand(-1, C, -1)).view(N, C, Q, P)
        total = total + picked * torch.where(inside, share, 0.0)[:, None]
    return total
