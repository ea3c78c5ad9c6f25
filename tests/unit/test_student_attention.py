"""Deformable attention against plain loops, its gradients, and its start."""

import math

import torch
from torch import Tensor

from dkdetr.student.attention_reference import SpatialShapes, sample_by_gathering
from dkdetr.student.deformable_attention import (
    MultiScaleDeformableAttention,
    deformable_attention,
)

SHAPES = ((3, 4), (2, 2))


def looped_attention(
    value: Tensor, shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """The definition, one bilinear sample at a time: pixel centres at +0.5, zeros outside."""
    num_images, _, num_heads, channels = value.shape
    _, num_queries, _, num_levels, num_points, _ = locations.shape
    out = torch.zeros(num_images, num_queries, num_heads, channels, dtype=value.dtype)
    first_token = [0]
    for height, width in shapes:
        first_token.append(first_token[-1] + height * width)
    for b in range(num_images):
        for q in range(num_queries):
            for h in range(num_heads):
                for level in range(num_levels):
                    height, width = shapes[level]
                    for p in range(num_points):
                        x = locations[b, q, h, level, p, 0].item() * width - 0.5
                        y = locations[b, q, h, level, p, 1].item() * height - 0.5
                        left, top = math.floor(x), math.floor(y)
                        for column, row in (
                            (left, top),
                            (left + 1, top),
                            (left, top + 1),
                            (left + 1, top + 1),
                        ):
                            if not (0 <= column < width and 0 <= row < height):
                                continue
                            share = (1 - abs(x - column)) * (1 - abs(y - row))
                            token = first_token[level] + row * width + column
                            scale = share * weights[b, q, h, level, p]
                            out[b, q, h] += scale * value[b, token, h]
    return out.flatten(2)


def random_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in SHAPES)
    value = torch.randn(2, tokens, 2, 3, generator=generator, dtype=dtype)
    # A third of the places lie outside.
    locations = 1.4 * torch.rand(2, 5, 2, 2, 2, 2, generator=generator, dtype=dtype) - 0.2
    weights = torch.rand(2, 5, 2, 2, 2, generator=generator, dtype=dtype)
    return value, locations, weights


def test_equals_plain_loops():
    value, locations, weights = random_inputs()
    out = deformable_attention(value, SHAPES, locations, weights)
    expected = looped_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences():
    value, locations, weights = random_inputs()
    few = (value[:1], locations[:1, :3], weights[:1, :3])
    inputs = [tensor.clone().requires_grad_() for tensor in few]
    assert torch.autograd.gradcheck(
        lambda v, loc, w: deformable_attention(v, SHAPES, loc, w), inputs, eps=1e-7, atol=1e-5
    )


def test_half_values_are_sampled_at_float32_places():
    value, locations, weights = random_inputs(torch.float32)
    half = deformable_attention(value.bfloat16(), SHAPES, locations, weights)
    assert half.dtype == torch.float32
    rounded = deformable_attention(value.bfloat16().float(), SHAPES, locations, weights)
    assert torch.equal(half, rounded)


def test_heads_start_looking_in_their_own_directions():
    attention = MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=3)
    offsets = attention.sampling_offsets.bias.view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for point in range(3):
        for level in range(2):
            expected = (point + 1) * directions
            torch.testing.assert_close(offsets[:, level, point], expected, rtol=0, atol=1e-6)


def test_padding_is_never_read():
    generator = torch.Generator().manual_seed(0)
    attention = MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=2)
    tokens = torch.randn(1, 16, 32, generator=generator)
    padding = torch.rand(1, 16, generator=generator) < 0.5
    query = torch.randn(1, 3, 32, generator=generator)
    reference = torch.rand(1, 3, 2, 4, generator=generator)
    spoilt = torch.where(padding[..., None], 1e6, tokens)
    out = attention(query, reference, tokens, padding, SHAPES)
    assert torch.equal(out, attention(query, reference, spoilt, padding, SHAPES))


def test_gathering_samples_as_grid_sample_does() -> None:
    """Outside and on the border too, with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    grid = 3 * torch.rand(2, 11, 4, 2, generator=generator, dtype=torch.float64) - 1.5
    grid[0, 0] = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [1.2, 0.0]])
    grid.requires_grad_()
    wanted = torch.nn.functional.grid_sample(
        maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    found = sample_by_gathering(maps, grid)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (maps, grid)),
        torch.autograd.grad((wanted * weights).sum(), (maps, grid)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
