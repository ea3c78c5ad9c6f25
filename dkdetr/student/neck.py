"""The neck: every level to the student's width, and further levels by striding."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class ChannelMapper(nn.Module):
    """1x1 convolutions with GroupNorm, then stride-2 3x3 ones from the *coarsest backbone map*.

    The first extra level reads the backbone's last map, the next ones the level before them.
    Convolutions carry no bias, as in DK-DETR's configuration; the original Deformable DETR has
    one (`bias=True`).

    Args:
        num_channels: channels of the backbone's maps, finest first.
        embed_dim: width of every level; a multiple of 32, the number of norm groups.
        extra_levels: how many levels are added.
        bias: whether convolutions have a bias.
    """

    def __init__(
        self, num_channels: Sequence[int], embed_dim: int, *, extra_levels: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            _conv_norm(channels, embed_dim, kernel=1, stride=1, bias=bias)
            for channels in num_channels
        )
        extra_in = [num_channels[-1], *[embed_dim] * (extra_levels - 1)][:extra_levels]
        self.extra = nn.ModuleList(
            _conv_norm(channels, embed_dim, kernel=3, stride=2, bias=bias) for channels in extra_in
        )
        self.num_levels = len(self.lateral) + len(self.extra)

    def forward(
        self, maps: Sequence[Float[Tensor, "batch _ _ _"]]
    ) -> list[Float[Tensor, "batch embed_dim _ _"]]:
        """Returns `num_levels` maps of width `embed_dim`, finest first."""
        levels = [convolve(x) for convolve, x in zip(self.lateral, maps, strict=True)]
        x = maps[-1]
        for convolve in self.extra:
            x = convolve(x)
            levels.append(x)
        return levels


def _conv_norm(num_in: int, num_out: int, *, kernel: int, stride: int, bias: bool) -> nn.Sequential:
    conv = nn.Conv2d(num_in, num_out, kernel, stride=stride, padding=kernel // 2, bias=bias)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, num_out))


def downsample_mask(
    padding_mask: Bool[Tensor, "batch height width"], size_hw: tuple[int, int]
) -> Bool[Tensor, "batch h w"]:
    """Returns the padding mask of a coarser map: what `interpolate` finds nearest.

    Written out, since an exported `interpolate` rounds otherwise than PyTorch does.
    """
    device = padding_mask.device
    height, width = padding_mask.shape[1:]
    rows = _nearest(height, size_hw[0], device)
    columns = _nearest(width, size_hw[1], device)
    return padding_mask[:, rows][:, :, columns]


def _nearest(size: int, coarse: int, device: torch.device) -> Int[Tensor, "coarse"]:
    places = torch.arange(coarse, dtype=torch.float32, device=device) * (size / coarse)
    return places.long().clamp(max=size - 1)
