"""What the encoder carries between layers: half precision under autocast, sums of norms exact."""

import copy
from collections import Counter

import pytest
import torch
from cuda_autocast import as_on_cuda, on_fake_cuda
from tiny_student import image_batch, shake, text_embeddings, tiny_config, tiny_student
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dkdetr.student.attention_backend import use_backend
from dkdetr.student.deformable_attention import MultiScaleDeformableAttention
from dkdetr.student.encoder import (
    DeformableEncoder,
    EncoderLayer,
    FeedForward,
    TokenGrid,
    token_centres,
)

SHAPES = ((12, 8), (6, 4))
WIDTH, FFN, LAYERS = 64, 128, 6
HALVES = [torch.bfloat16, torch.float16]


def encoder_of_layers() -> DeformableEncoder:
    return DeformableEncoder([
        EncoderLayer(
            MultiScaleDeformableAttention(WIDTH, num_heads=4, num_levels=2, num_points=2),
            FeedForward(WIDTH, FFN, 0.0),
            0.0,
        )
        for _ in range(LAYERS)
    ])  # fmt: skip


def encoder_of(seed: int = 0) -> DeformableEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = encoder_of_layers()
        shake(encoder, 0.03)
    return encoder


def inputs_of(
    dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, TokenGrid]:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(height * width for height, width in SHAPES)
    tokens, positions = torch.randn(2, 2, num_tokens, WIDTH, generator=generator).to(dtype)
    padding = torch.zeros(2, num_tokens, dtype=torch.bool)
    return tokens, positions, TokenGrid(SHAPES, padding, torch.ones(2, 2, 2, dtype=dtype))


def carried_in_full(
    encoder: DeformableEncoder, tokens: Tensor, positions: Tensor, grid: TokenGrid
) -> Tensor:
    """The same encoder, which rounds nothing between layers: as Deformable DETR writes it."""
    reference_points = token_centres(grid)[:, :, None] * grid.valid_ratios[:, None]
    for layer in encoder.layers:
        assert isinstance(layer, EncoderLayer)
        feed_forward = layer.feed_forward
        gathered = layer.self_attention(
            tokens + positions, reference_points, tokens, grid.padding_mask, grid.spatial_shapes
        )
        inner = layer.norm(tokens + gathered)
        outer = feed_forward.linear2(feed_forward.linear1(inner).relu())
        tokens = feed_forward.norm(inner + outer)
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_autocast_nothing_is_rounded(dtype: torch.dtype):
    encoder = encoder_of().to(dtype)
    args = inputs_of(dtype)
    found, wanted = encoder(*args), carried_in_full(encoder, *args)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    weights = list(encoder.parameters())
    one, other = (torch.autograd.grad(each.square().sum(), weights) for each in (found, wanted))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))


def test_autocast_leaves_float64_alone():
    encoder, args = encoder_of().double(), inputs_of(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(*args), carried_in_full(encoder, *args))


@pytest.mark.parametrize("dtype", HALVES)
def test_between_layers_tokens_are_half_and_norms_see_the_exact_sum(dtype: torch.dtype):
    encoder, args = encoder_of(), inputs_of()
    given: list[Tensor] = []
    parts: list[Tensor] = []
    normed: list[Tensor] = []
    for layer in encoder.layers:
        assert isinstance(layer, EncoderLayer)
        layer.register_forward_pre_hook(lambda _, args: given.extend(args[:2]))
        layer.self_attention.register_forward_hook(
            lambda _, args, out: parts.extend((args[2], out))
        )
        layer.feed_forward.register_forward_pre_hook(lambda _, args: parts.append(args[0]))
        layer.feed_forward.linear2.register_forward_hook(lambda _, args, out: parts.append(out))
        for norm in (layer.norm, layer.feed_forward.norm):
            norm.register_forward_pre_hook(lambda _, args: normed.append(args[0]))
    with torch.autocast("cpu", dtype=dtype):
        memory = encoder(*args)
    assert {tensor.dtype for tensor in (*given, *parts, memory)} == {dtype}
    assert len({id(tensor) for tensor in given[1::2]}) == 1  # positions: rounded once
    assert len(normed) == 2 * LAYERS
    for place, seen in enumerate(normed):
        residual, change = parts[2 * place : 2 * place + 2]
        assert seen.dtype == torch.float32
        assert torch.equal(seen, residual.float() + change.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_rounded_costs_little_beside_what_was(dtype: torch.dtype):
    """Errors against float64, beside those of an encoder that carries float32.

    Measured (torch 2.14.1, AMD EPYC, November 2026): the memory's 1.18 times as large, gradients'
    1.08 (bfloat16); 1.17 and 1.11 (float16).
    """

    def errors(carry: str, seed: int) -> tuple[float, float]:
        encoder, args = encoder_of(seed), inputs_of(seed=seed)
        exact = copy.deepcopy(encoder).double()
        results: list[tuple[Tensor, ...]] = []
        for each, inputs in ((exact, inputs_of(torch.float64, seed)), (encoder, args)):
            with as_on_cuda(dtype):
                memory = each(*inputs) if carry == "half" else carried_in_full(each, *inputs)
            down = torch.randn(memory.shape, generator=torch.Generator().manual_seed(seed))
            loss = (memory * down.to(inputs[0].dtype)).sum()
            gradients = torch.autograd.grad(loss, list(each.parameters()))
            results.append((memory, torch.cat([gradient.flatten() for gradient in gradients])))
        wanted, found = results
        return tuple(  # pyright: ignore[reportReturnType]
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(found, wanted, strict=True)
        )

    before, after = (
        torch.tensor([errors(carry, seed) for seed in range(4)]).mean(0)
        for carry in ("full", "half")
    )
    print(f"{dtype}: memory and gradients {before.tolist()} -> {after.tolist()}")
    assert (after < 1.35 * before).all()


def kept_for_backward(carry: str) -> Counter[torch.dtype]:
    """Tensors as large as the tokens that autograd keeps on a GPU, each memory counted once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == tokens.numel():
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(), torch.device("cuda"):
        encoder = encoder_of_layers()
        use_backend(encoder, "torch", torch.device("cuda"))
        num_tokens = sum(height * width for height, width in SHAPES)
        tokens, positions = torch.randn(2, num_tokens, WIDTH), torch.randn(2, num_tokens, WIDTH)
        padding = torch.zeros(2, num_tokens, dtype=torch.bool)
        grid = TokenGrid(SHAPES, padding, torch.ones(2, 2, 2))
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, on_fake_cuda(torch.bfloat16):
            if carry == "half":
                encoder(tokens, positions, grid)
            else:
                carried_in_full(encoder, tokens, positions, grid)
    return Counter(tensor.dtype for tensor in kept.values())


def test_backward_keeps_one_copy_of_what_a_layer_reads():
    """In float32 nothing but what the norms are given; in half what each product is given."""
    found, before = kept_for_backward("half"), kept_for_backward("full")
    assert found[torch.float32] == 2 * LAYERS
    # Tokens, tokens with positions, what is gathered, what the feed-forward part is given.
    assert found[torch.bfloat16] == 4 * LAYERS
    # Tokens with positions are read twice: they were rounded, and kept, for each.
    assert before == {torch.float32: 2 * LAYERS, torch.bfloat16: 5 * LAYERS}


def test_all_who_read_the_memory_read_the_same_tensor():
    student = tiny_student(tiny_config(mask_head=True))
    seen: dict[str, Tensor] = {}
    for name, part in student.named_modules():
        if isinstance(part, MultiScaleDeformableAttention) and name.startswith("decoder"):
            part.value_proj.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0]})
            )
    student.trunk.encoder.register_forward_hook(lambda _, args, out: seen.update(memory=out))
    student.decoder.register_forward_hook(lambda _, args, out: seen.update(queries=out[0]))
    with as_on_cuda(torch.bfloat16):
        student(image_batch(), text_embeddings())
    memory, queries = seen.pop("memory"), seen.pop("queries")
    assert memory.dtype == torch.bfloat16
    assert queries.dtype == torch.float32  # the decoder's own stream
    assert len(seen) == 2
    assert all(tensor is memory for tensor in seen.values())
