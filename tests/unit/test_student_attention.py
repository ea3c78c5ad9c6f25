"""Deformable attention against plain loops, its gradients, and its start."""

import math

import torch
from torch import Tensor

from dkdetr.student.attention_reference import (
    SpatialShapes,
    reference_attention,
    sample_by_gathering,
    sampling_locations,
)
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
    out = reference_attention(value, SHAPES, locations, weights)
    expected = looped_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences():
    value, locations, weights = random_inputs()
    few = (value[:1], locations[:1, :3], weights[:1, :3])
    inputs = [tensor.clone().requires_grad_() for tensor in few]
    assert torch.autograd.gradcheck(
        lambda v, loc, w: reference_attention(v, SHAPES, loc, w), inputs, eps=1e-7, atol=1e-5
    )


def test_offsets_count_tokens_or_shares_of_half_a_box():
    """By hand: levels of 4 x 3 and 2 x 2 tokens, two points."""
    offsets = torch.zeros(1, 2, 1, 2, 2, 2)
    offsets[0, 0, 0, 0, 0] = torch.tensor([1.0, -1.5])
    offsets[0, 0, 0, 1, 1] = torch.tensor([0.5, 3.0])
    points = torch.tensor([[0.5, 0.25], [0.75, 0.5]]).expand(1, 2, 2, 2)
    found = sampling_locations(points, offsets, SHAPES)
    torch.testing.assert_close(found[0, 0, 0, 0, 0], torch.tensor([0.5 + 1 / 4, 0.25 - 1.5 / 3]))
    torch.testing.assert_close(found[0, 0, 0, 1, 1], torch.tensor([0.75 + 0.5 / 2, 0.5 + 3 / 2]))
    assert torch.equal(found[0, 1, 0, 1, 0], points[0, 1, 1])
    boxes = torch.cat((points, torch.tensor([0.4, 0.2]).expand_as(points)), dim=-1)
    around = sampling_locations(boxes, offsets, SHAPES)
    edge = torch.tensor([0.5 + 1.0 / 2 * 0.2, 0.25 - 1.5 / 2 * 0.1])
    torch.testing.assert_close(around[0, 0, 0, 0, 0], edge)


def test_weights_are_a_softmax_over_all_levels_and_points():
    value, _, _ = random_inputs()
    generator = torch.Generator().manual_seed(1)
    offsets = torch.randn(2, 5, 2, 2, 2, 2, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, 5, 2, 2, 2, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 5, 2, 2, generator=generator, dtype=torch.float64)
    weights = logits.exp() / logits.exp().sum((-2, -1), keepdim=True)
    locations = sampling_locations(points, offsets, SHAPES)
    wanted = looped_attention(value, SHAPES, locations, weights)
    found = deformable_attention(value, SHAPES, points, offsets, logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_half_values_are_sampled_at_float32_places():
    value, locations, weights = random_inputs(torch.float32)
    half = reference_attention(value.bfloat16(), SHAPES, locations, weights)
    assert half.dtype == torch.float32
    rounded = reference_attention(value.bfloat16().float(), SHAPES, locations, weights)
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
