"""A convolution and the norm after it as one convolution, where the norm's statistics stand still.

Frozen batch norm, and any batch norm in evaluation mode, multiplies each channel by a number and
adds another. Both go into the convolution: nothing is read or written for them, and under
autocast they are rounded once, with the weights. The residual blocks here are torchvision's, with
its parameters' names.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d


def conv_norm(
    conv: nn.Module, norm: nn.Module, x: Float[Tensor, "batch _ _ _"]
) -> Float[Tensor, "batch _ _ _"]:
    """Returns norm(conv(x)); as one convolution where the norm's statistics do not move."""
    assert isinstance(conv, nn.Conv2d)
    if isinstance(norm, nn.Identity) or (norm.training and not isinstance(norm, FrozenBatchNorm2d)):
        return norm(conv(x))
    weight, bias = _folded(conv, norm)
    return nn.functional.conv2d(
        x,
        weight,
        bias,
        conv.stride,
        conv.padding,  # pyright: ignore[reportArgumentType]  a str or a tuple, as it came
        conv.dilation,
        conv.groups,
    )


def fold_norms(module: nn.Module) -> None:
    """Puts the norms of the blocks here into their convolutions for good, as they stand now.

    The same numbers come out as in evaluation mode. Parameters then have other names: not for a
    student that is trained or saved.
    """
    for part in list(module.modules()):
        if isinstance(part, Stem):
            _fold(part, "0", "1")
        elif isinstance(part, FoldingBasicBlock | FoldingBottleneck):
            for number in (1, 2, 3):
                if hasattr(part, f"conv{number}"):
                    _fold(part, f"conv{number}", f"bn{number}")
            if part.downsample is not None:
                _fold(part.downsample, "0", "1")


def _fold(block: nn.Module, conv_name: str, norm_name: str) -> None:
    conv = getattr(block, conv_name)
    with torch.no_grad():
        weight, bias = _folded(conv, getattr(block, norm_name))
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    setattr(block, norm_name, nn.Identity())


def _folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns the weight and the bias of the convolution that is both."""
    assert conv.bias is None
    still: Any = norm  # one of torch's batch norms: all call these parts alike
    scale = still.weight * (still.running_var + still.eps).rsqrt()
    return conv.weight * scale[:, None, None, None], still.bias - still.running_mean * scale


class FoldingBasicBlock(BasicBlock):
    """Torchvision's block of two 3x3 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map after the block."""
        out = conv_norm(self.conv1, self.bn1, x).relu()
        return _add_shortcut(self, conv_norm(self.conv2, self.bn2, out), x)


class FoldingBottleneck(Bottleneck):
    """Torchvision's block of a 1x1, a 3x3 (with the stride) and a 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map after the block."""
        out = conv_norm(self.conv1, self.bn1, x).relu()
        out = conv_norm(self.conv2, self.bn2, out).relu()
        return _add_shortcut(self, conv_norm(self.conv3, self.bn3, out), x)


class Stem(nn.Sequential):
    """A convolution, its norm, and whatever follows."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the map after the last part."""
        conv, norm, *rest = self
        x = conv_norm(conv, norm, input)
        for part in rest:
            x = part(x)
        return x


def _add_shortcut(block: BasicBlock | Bottleneck, out: Tensor, x: Tensor) -> Tensor:
    if block.downsample is not None:
        assert isinstance(block.downsample, nn.Sequential)
        conv, norm = block.downsample
        x = conv_norm(conv, norm, x)
    return torch.relu(out + x)
