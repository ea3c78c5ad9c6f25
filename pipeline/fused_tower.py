"""An image tower of open_clip's plain ViT kind, computed with fewer and larger kernels.

The same weights and the same formulas: patches as one matrix product, query, key and value as one,
attention without a copy of its layout, weights kept in the precision that computes, and of the last
block only the class token, which alone is read.
"""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

_HOME = "open_clip.transformer"  # known by name: only pipeline.teacher imports open_clip


class FusedTower(nn.Module):
    """The image tower of a CLIP: pixels in, features out.

    Args:
        visual: a tower for which `can_be_fused` is true; its weights are copied.
        dtype: what they are kept and computed in. Layer norms compute in float32.
    """

    def __init__(self, visual: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv = visual.conv1
        self.patch_size = conv.kernel_size[0]
        self.patches = _frozen(conv.weight.flatten(1), dtype)
        positions = visual.positional_embedding
        self.class_token = _frozen(visual.class_embedding + positions[0], dtype)
        self.positions = _frozen(positions[1:], dtype)
        self.norm_before = _norm(visual.ln_pre, dtype)
        self.blocks = nn.ModuleList([_Block(b, dtype) for b in visual.transformer.resblocks])
        self.norm_after = _norm(visual.ln_post, dtype)
        self.projection = _frozen(visual.proj, dtype)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b embed_dim"]:
        """Returns the features, of any length, in the tower's precision."""
        side = self.patch_size
        cut = pixels.to(self.patches.dtype).unflatten(2, (-1, side)).unflatten(4, (-1, side))
        flat = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [b, patches, 3 side side]
        tokens = functional.linear(flat, self.patches) + self.positions
        x = torch.cat((self.class_token.expand(len(tokens), 1, -1), tokens), dim=1)
        x = self.norm_before(x)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x = block(x, class_token_only=number == last)
        return self.norm_after(x[:, 0]) @ self.projection


class FromCrops(nn.Module):
    """A tower and what comes before it: grey levels in, of which a compiler makes one kernel.

    Args:
        tower: takes normalised pixels.
        scale: multiplies grey levels, a number a channel.
        shift: is subtracted after that.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        tower: nn.Module,
        scale: Float[Tensor, "1 3 1 1"],
        shift: Float[Tensor, "1 3 1 1"],
    ) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, crops: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b embed_dim"]:
        """Returns the tower's features."""
        return self.tower(crops.float() * self.scale - self.shift)


class _Block(nn.Module):
    """One residual block: attention, then a perceptron, each behind its norm."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention = block.attn
        self.num_heads = attention.num_heads
        self.norm_1, self.norm_2 = _norm(block.ln_1, dtype), _norm(block.ln_2, dtype)
        self.qkv = _linear(attention.in_proj_weight, attention.in_proj_bias, dtype)
        self.out = _linear(attention.out_proj.weight, attention.out_proj.bias, dtype)
        self.widen = _linear(block.mlp.c_fc.weight, block.mlp.c_fc.bias, dtype)
        self.activation = block.mlp.gelu
        self.narrow = _linear(block.mlp.c_proj.weight, block.mlp.c_proj.bias, dtype)

    def forward(
        self, x: Float[Tensor, "b tokens width"], *, class_token_only: bool
    ) -> Float[Tensor, "b seen width"]:
        qkv = self.qkv(self.norm_1(x)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if class_token_only:
            query, x = query[:, :, :1], x[:, :1]
        seen = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(self.activation(self.widen(self.norm_2(x))))


class _Norm(nn.Module):
    """A layer norm with weights in half precision where the tower has them, sums in float32."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = _frozen(norm.weight, dtype), _frozen(norm.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def can_be_fused(visual: nn.Module) -> bool:
    """Returns True for open_clip's own ViT without any of its options that change the formulas."""
    tower: Any = visual
    return (
        _is(tower, "VisionTransformer")
        and tower.attn_pool is None
        and tower.pool_type == "tok"
        and not tower.output_tokens
        and tower.proj is not None
        and (isinstance(tower.ln_pre, nn.Identity) or _is_norm(tower.ln_pre))
        and _is_norm(tower.ln_post)
        and tower.conv1.bias is None
        and tower.conv1.kernel_size[0] == tower.conv1.kernel_size[1]
        and all(_is_plain(block) for block in tower.transformer.resblocks)
    )


def _is_plain(block: Any) -> bool:
    return (
        _is(block, "ResidualAttentionBlock")
        and type(block.attn) is nn.MultiheadAttention
        and block.attn.batch_first
        and block.attn.in_proj_weight is not None
        and block.attn.in_proj_bias is not None
        and block.attn.bias_k is None
        and not block.attn.add_zero_attn
        and (type(block.mlp.gelu) is nn.GELU or _is(block.mlp.gelu, "QuickGELU"))
        and _is_norm(block.ln_1)
        and _is_norm(block.ln_2)
        and all(isinstance(scale, nn.Identity) for scale in (block.ls_1, block.ls_2))
    )


def _is(module: nn.Module, name: str) -> bool:
    return (type(module).__module__, type(module).__name__) == (_HOME, name)


def _is_norm(module: nn.Module) -> bool:
    return _is(module, "LayerNorm") or _is(module, "LayerNormFp32")


def _frozen(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype).clone(), requires_grad=False)


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = _frozen(weight, dtype), _frozen(bias, dtype)
    return linear


def _norm(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    return _Norm(norm, dtype) if isinstance(norm, nn.LayerNorm) else nn.Identity()
