"""The student: two-stage Deformable DETR with a text classifier and auxiliary KD queries."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dkdetr.structures import (
    EncoderOutput,
    ImageBatch,
    QueryOutput,
    StudentOutput,
    TeacherRegions,
)
from dkdetr.student.backbone import Backbone
from dkdetr.student.decoder import DeformableDecoder, one_way_mask
from dkdetr.student.encoder import DeformableEncoder, TokenGrid, valid_ratio
from dkdetr.student.heads import TextClassifier
from dkdetr.student.mask_head import MaskHead
from dkdetr.student.neck import ChannelMapper, downsample_mask
from dkdetr.student.position_encoding import encode_boxes, encode_positions
from dkdetr.student.query_selection import QuerySelection, select_anchors


class ProposingTrunk(nn.Module):
    """Backbone, neck, encoder and first stage: all of the student before its decoder.

    Stage 1's proposal network is this part alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: ChannelMapper,
        encoder: DeformableEncoder,
        query_selection: QuerySelection,
        *,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.query_selection = query_selection
        self.level_embeddings = nn.Parameter(torch.empty(neck.num_levels, embed_dim))
        nn.init.normal_(self.level_embeddings)

    def forward(self, images: ImageBatch) -> tuple[Tensor, TokenGrid, EncoderOutput]:
        """Returns the memory [batch, num_tokens, embed_dim], its grid and every proposal."""
        levels = self.neck(self.backbone(images.pixels))
        # The parameters' own: float32 under autocast, float64 for a float64 student.
        dtype = self.level_embeddings.dtype
        tokens, positions, masks, shapes = [], [], [], []
        for level, embedding in zip(levels, self.level_embeddings, strict=True):
            height, width = level.shape[-2:]
            mask = downsample_mask(images.padding_mask, (height, width))
            place = encode_positions(mask, embed_dim=level.shape[1], dtype=dtype)
            tokens.append(level.flatten(2).transpose(1, 2))
            positions.append(place.flatten(1, 2) + embedding)
            masks.append(mask)
            shapes.append((height, width))
        grid = TokenGrid(
            spatial_shapes=tuple(shapes),
            padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            valid_ratios=torch.stack([valid_ratio(mask, dtype=dtype) for mask in masks], dim=1),
        )
        memory = self.encoder(torch.cat(tokens, dim=1), torch.cat(positions, dim=1), grid)
        return memory, grid, self.query_selection(memory, grid)


class DKDETR(nn.Module):
    """DK-DETR (ICCV 2023): boxes and, with a mask head, masks.

    Args:
        trunk: everything before the decoder.
        decoder: with one box head a layer.
        classifiers: one a decoder layer.
        num_queries: detection queries.
        num_heads: of the decoder's self-attention.
        embed_dim: width of a query.
        auxiliary_queries: whether the student has the KD queries' content vector.
        mask_head: None for boxes only.
    """

    def __init__(
        self,
        trunk: ProposingTrunk,
        decoder: DeformableDecoder,
        classifiers: Sequence[TextClassifier],
        *,
        num_queries: int,
        num_heads: int,
        embed_dim: int,
        auxiliary_queries: bool,
        mask_head: MaskHead | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.decoder = decoder
        self.classifiers = nn.ModuleList(classifiers)
        self.num_queries = num_queries
        self.num_heads = num_heads
        self.embed_dim = embed_dim
        self.anchor_projection = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.anchor_norm = nn.LayerNorm(2 * embed_dim)
        self.kd_content = nn.Parameter(torch.randn(embed_dim)) if auxiliary_queries else None
        self.mask_head = mask_head

    def forward(
        self,
        images: ImageBatch,
        text_embeddings: Float[Tensor, "num_classes text_dim"],
        regions: TeacherRegions | None = None,
    ) -> StudentOutput:
        """Returns boxes, logits and, where regions are given, the KD queries' features.

        Args:
            images: the batch.
            text_embeddings: unit vectors of the classes to score.
            regions: anchors of the KD queries. They change nothing about the detections.
        """
        memory, grid, proposals = self.trunk(images)
        anchors = select_anchors(proposals, self.num_queries)
        content, positions = self.encode_anchors(anchors.boxes_cxcywh)
        boxes, blocked = anchors.boxes_cxcywh, None
        num_detection = boxes.shape[1]
        if regions is not None:
            if self.kd_content is None:
                raise ValueError("this student was built without auxiliary queries")
            _, region_positions = self.encode_anchors(regions.boxes_cxcywh)
            region_content = self.kd_content.expand_as(region_positions)
            content = torch.cat((content, region_content), dim=1)
            positions = torch.cat((positions, region_positions), dim=1)
            boxes = torch.cat((boxes, regions.boxes_cxcywh), dim=1)
            blocked = one_way_mask(num_detection, regions.valid)
            blocked = blocked.repeat_interleave(self.num_heads, dim=0)
        queries, refined = self.decoder(content, positions, boxes, memory, grid, blocked)
        heads = cast("list[TextClassifier]", list(self.classifiers))
        features = torch.stack(
            [head.project(layer) for head, layer in zip(heads, queries, strict=True)]
        )
        detection, distillation = _split(features, refined, num_detection)
        logits = torch.stack(
            [
                head.logits(layer, text_embeddings)
                for head, layer in zip(heads, detection.features, strict=True)
            ]
        )
        masks = None
        if self.mask_head is not None:
            seen = queries[:, :, :num_detection]
            embedding = self.trunk.level_embeddings[0]
            masks = self.mask_head(memory, grid, embedding, seen, detection.boxes_cxcywh)
        return StudentOutput(
            detection=detection,
            logits=logits,
            encoder=proposals,
            anchors_cxcywh=anchors.boxes_cxcywh,
            anchor_objectness=anchors.objectness,
            distillation=distillation if regions is not None else None,
            masks=masks,
        )

    def encode_anchors(
        self, boxes_cxcywh: Float[Tensor, "batch num_boxes 4"]
    ) -> tuple[
        Float[Tensor, "batch num_boxes embed_dim"], Float[Tensor, "batch num_boxes embed_dim"]
    ]:
        """Returns (content, position) of queries at these boxes.

        The *first* half of the projection is the position, the second the content (method A.2).
        """
        encoded = encode_boxes(boxes_cxcywh, embed_dim=self.embed_dim)
        position, content = self.anchor_norm(self.anchor_projection(encoded)).chunk(2, dim=-1)
        return content, position


def _split(features: Tensor, boxes: Tensor, num_detection: int) -> tuple[QueryOutput, QueryOutput]:
    return (
        QueryOutput(features[:, :, :num_detection], boxes[:, :, :num_detection]),
        QueryOutput(features[:, :, num_detection:], boxes[:, :, num_detection:]),
    )
