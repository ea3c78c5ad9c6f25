"""The mask head of SOIT: every query writes the parameters of a small attention of its own.

A query's mask is what one deformable attention, over a map of eight channels, says at each place
of that map. All its parameters, 441 numbers, come from the query (method A.4). Shape letters as in
`deformable_attention`; N is a chunk of queries.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from dkdetr.config import MASK_UPSAMPLING
from dkdetr.student.attention_backend import Backend
from dkdetr.student.deformable_attention import deformable_attention
from dkdetr.student.encoder import DeformableEncoder, TokenGrid, token_centres
from dkdetr.student.position_encoding import encode_positions, sines

MASK_CHANNELS = 8
_HEADS, _POINTS = 4, 4
_PLACES = _HEADS * _POINTS
_PART_SIZES = (2 * _PLACES * MASK_CHANNELS, 2 * _PLACES, _PLACES * MASK_CHANNELS, _PLACES,
               MASK_CHANNELS, 1)  # fmt: skip
NUM_DYNAMIC_PARAMETERS = sum(_PART_SIZES)
"""441: offsets 32 x 8 and 32 biases, weights 16 x 8 and 16 biases, output 8 and a bias."""


@dataclass(frozen=True)
class DynamicMasks:
    """The masks of a batch's detection queries, drawn only when asked for.

    `features` are 0 in padding where they are looked at (`values`), and as computed where they ask
    (`queries`); `positions` are (x, y) of the un-padded picture.
    """

    queries: Float[Tensor, "batch num_places channels"]
    values: Float[Tensor, "batch num_places channels"]
    positions: Float[Tensor, "batch num_places 2"]
    reference_points: Float[Tensor, "batch num_places 2"]
    map_hw: tuple[int, int]
    parameters: Float[Tensor, "num_layers batch num_queries num_parameters"]
    centres: Float[Tensor, "num_layers batch num_queries 2"]
    padding_mask: Bool[Tensor, "batch mask_height mask_width"]
    stride: float
    masks_at_once: int
    backend: Backend = "auto"

    def logits(
        self, layer: int, image_index: Int[Tensor, "n"], query_index: Int[Tensor, "n"]
    ) -> Float[Tensor, "n mask_height mask_width"]:
        """Returns the masks of some queries before the sigmoid; memory grows with their number."""
        parameters = self.parameters[layer, image_index, query_index]
        centres = self.centres[layer, image_index, query_index]
        encoding = encode_relative(self.positions[image_index], centres)
        maps = dynamic_attention(
            self.queries[image_index] + encoding,
            self.values[image_index],
            self.reference_points[image_index],
            parameters,
            self.map_hw,
            backend=self.backend,
        )
        return aligned_upsample(maps, MASK_UPSAMPLING)

    def graph_zero(self) -> Float[Tensor, ""]:
        """Returns a zero that ties all of the head's parameters to the graph."""
        return 0.0 * (self.parameters.sum() + self.queries.sum())


class MaskHead(nn.Module):
    """Makes the mask feature of a memory and the dynamic parameters of its queries.

    Args:
        encoder: one deformable layer with one head and one level, over the finest level.
        embed_dim: width of memory and queries.
        stride: pixels of the input to a pixel of a mask.
        masks_at_once: how many masks stand in memory at a time, in training and at inference.
    """

    backend: Backend = "auto"

    def __init__(
        self, encoder: DeformableEncoder, *, embed_dim: int, stride: float, masks_at_once: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(embed_dim, MASK_CHANNELS)
        self.norm = nn.LayerNorm(MASK_CHANNELS)
        self.linear1 = nn.Linear(embed_dim, embed_dim)
        self.linear2 = nn.Linear(embed_dim, embed_dim)
        self.linear3 = nn.Linear(embed_dim, NUM_DYNAMIC_PARAMETERS)
        self.stride, self.masks_at_once = stride, masks_at_once

    def forward(
        self,
        memory: Float[Tensor, "batch num_tokens embed_dim"],
        grid: TokenGrid,
        level_embedding: Float[Tensor, "embed_dim"],
        queries: Float[Tensor, "num_layers batch num_queries embed_dim"],
        boxes_cxcywh: Float[Tensor, "num_layers batch num_queries 4"],
    ) -> DynamicMasks:
        """Returns the masks of the queries, not yet drawn.

        Args:
            memory: the encoder's; its finest level is used.
            grid: where its tokens lie.
            level_embedding: the finest level's, part of its tokens' positions.
            queries: of every decoder layer.
            boxes_cxcywh: the same layers' boxes; no gradient reaches them from here.
        """
        finest = _finest_level(grid)
        height, width = finest.spatial_shapes[0]
        padding = finest.padding_mask.view(-1, height, width)
        dtype = self.projection.weight.dtype
        places = encode_positions(padding, embed_dim=memory.shape[-1], dtype=dtype)
        tokens = memory[:, : height * width]
        tokens = self.encoder(tokens, places.flatten(1, 2) + level_embedding, finest)
        # From here on in full: an offset of half a place shows at a mask's edge.
        with torch.autocast(device_type=memory.device.type, enabled=False):
            features = self.norm(self.projection(tokens.to(dtype)))
            hidden = self.linear1(queries.to(dtype)).relu()
            parameters = self.linear3(self.linear2(hidden).relu())
        return DynamicMasks(
            queries=features,
            values=features.masked_fill(finest.padding_mask[..., None], 0.0),
            positions=picture_positions(padding, dtype).flatten(1, 2),
            reference_points=token_centres(finest) * finest.valid_ratios,
            map_hw=(height, width),
            parameters=parameters,
            centres=boxes_cxcywh[..., :2].detach(),
            padding_mask=padding.repeat_interleave(MASK_UPSAMPLING, 1).repeat_interleave(
                MASK_UPSAMPLING, 2
            ),
            stride=self.stride,
            masks_at_once=self.masks_at_once,
            backend=self.backend,
        )


def dynamic_attention(
    queries: Float[Tensor, "N T C"],
    values: Float[Tensor, "N T C"],
    reference_points: Float[Tensor, "N T 2"],
    parameters: Float[Tensor, "N num_parameters"],
    map_hw: tuple[int, int],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "N height width"]:
    """Returns each query's map: what its own attention gathers, through a ReLU, to one channel.

    Four heads of two channels sample four points each; a weight is a softmax over a head's points.
    """
    N, T, C = queries.shape
    height, width = map_hw
    parts = parameters.split(_PART_SIZES, dim=-1)
    to_offsets, offset_bias, to_weights, weight_bias, to_output, output_bias = parts
    offsets = queries @ to_offsets.view(N, 2 * _PLACES, C).mT + offset_bias[:, None]
    logits = queries @ to_weights.view(N, _PLACES, C).mT + weight_bias[:, None]
    gathered = deformable_attention(
        values.view(N, T, _HEADS, C // _HEADS),
        [map_hw],
        reference_points[:, :, None],
        offsets.view(N, T, _HEADS, 1, _POINTS, 2),
        logits.view(N, T, _HEADS, 1, _POINTS),
        backend=backend,
    )
    output = gathered.relu() @ to_output[..., None] + output_bias[:, None]
    return output.view(N, height, width)


def picture_positions(
    padding_mask: Bool[Tensor, "batch height width"], dtype: torch.dtype
) -> Float[Tensor, "batch height width 2"]:
    """Returns the (x, y) of each place over the un-padded picture, 1 at its last row and column.

    A place stands for its right and bottom edge, unlike in `encode_positions` (no offset of half
    a place: SOIT's configuration); in padding the count stands still.
    """
    # Counted in whole numbers, as in `encode_positions`.
    rows, columns = ((~padding_mask).long().cumsum(axis).to(dtype) for axis in (1, 2))
    rows = rows / (rows[:, -1:, :] + 1e-6)
    columns = columns / (columns[:, :, -1:] + 1e-6)
    return torch.stack((columns, rows), dim=-1)


def encode_relative(
    positions: Float[Tensor, "N T 2"], centres: Float[Tensor, "N 2"]
) -> Float[Tensor, "N T C"]:
    """Returns sines of where each place lies from a centre: four of y, then four of x."""
    x, y = ((positions - centres[:, None]) * (2 * math.pi)).unbind(-1)
    half = MASK_CHANNELS // 2
    return torch.cat((sines(y, half), sines(x, half)), dim=-1)


def aligned_upsample(
    maps: Float[Tensor, "N height width"], factor: int
) -> Float[Tensor, "N tall wide"]:
    """Returns maps `factor` times as large: place o shows the input at (o - factor / 2) / factor.

    Beyond the outermost places the nearest of them is repeated (AdelaiDet's aligned bilinear).
    """
    height, width = maps.shape[-2:]
    padded = functional.pad(maps[:, None], (0, 1, 0, 1), mode="replicate")
    larger = functional.interpolate(
        padded, (factor * height + 1, factor * width + 1), mode="bilinear", align_corners=True
    )
    before = factor // 2
    larger = functional.pad(larger, (before, 0, before, 0), mode="replicate")
    return larger[:, 0, : factor * height, : factor * width]


def _finest_level(grid: TokenGrid) -> TokenGrid:
    height, width = grid.spatial_shapes[0]
    return TokenGrid(
        spatial_shapes=grid.spatial_shapes[:1],
        padding_mask=grid.padding_mask[:, : height * width],
        valid_ratios=grid.valid_ratios[:, :1],
    )
