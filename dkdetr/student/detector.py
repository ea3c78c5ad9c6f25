"""The student: two-stage Deformable DETR with a text classifier and auxiliary KD queries."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dkdetr.structures import (
    DenoisingQueries,
    EncoderOutput,
    ExtraDetections,
    ImageBatch,
    QueryOutput,
    StudentOutput,
    TeacherRegions,
)
from dkdetr.student.backbone import Backbone
from dkdetr.student.decoder import DeformableDecoder
from dkdetr.student.encoder import DeformableEncoder, TokenGrid, valid_ratio
from dkdetr.student.heads import SimilarityCalibration, TextClassifier
from dkdetr.student.mask_head import MaskHead
from dkdetr.student.neck import ChannelMapper, downsample_mask
from dkdetr.student.position_encoding import encode_boxes, encode_positions
from dkdetr.student.queries import KDQueryPlan, QueryGroup, join_groups
from dkdetr.student.query_selection import QuerySelection, SelectedAnchors, select_anchors

KD_PREFIX = "kd_"
"""How the names of parameters begin that have a gradient only where something is distilled."""


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
        classifiers: one a decoder layer; fewer speak for the last layers, and of the others nothing
            is said.
        num_queries: detection queries.
        num_heads: of the decoder's self-attention.
        embed_dim: width of a query.
        kd: the KD queries; None: there are none.
        calibration: of SKD's logits, if they have a learnable one.
        num_hybrid: extra detection queries, where `forward` is asked for them.
        denoising_content: makes a denoising query's content of its label's text embedding.
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
        kd: KDQueryPlan | None,
        calibration: SimilarityCalibration | None = None,
        num_hybrid: int = 0,
        denoising_content: nn.Linear | None = None,
        mask_head: MaskHead | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.decoder = decoder
        self.classifiers = nn.ModuleList(classifiers)
        self.num_queries = num_queries
        self.num_heads = num_heads
        self.embed_dim = embed_dim
        self.num_hybrid = num_hybrid
        self.anchor_projection = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.anchor_norm = nn.LayerNorm(2 * embed_dim)
        self._kd = kd
        self.kd_content = None
        if kd is not None:
            shape = (kd.num_slots, embed_dim) if kd.num_slots else (embed_dim,)
            self.kd_content = nn.Parameter(torch.randn(shape))
        self.kd_calibration = calibration
        self.denoising_content = denoising_content
        self.mask_head = mask_head

    def kd_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that have a gradient only where something is distilled."""
        return [weight for name, weight in self.named_parameters() if name.startswith(KD_PREFIX)]

    def forward(
        self,
        images: ImageBatch,
        text_embeddings: Float[Tensor, "num_classes text_dim"],
        regions: TeacherRegions | None = None,
        *,
        hybrid: bool = False,
        denoising: DenoisingQueries | None = None,
    ) -> StudentOutput:
        """Returns boxes, logits and, where regions are given, the KD queries' features.

        Args:
            images: the batch.
            text_embeddings: unit vectors of the classes to score.
            regions: say that KD queries are wanted, and anchor them. They change nothing about
                the detections.
            hybrid: whether the extra detection queries are wanted. Neither do they.
            denoising: objects with noise. Neither do they.
        """
        memory, grid, proposals = self.trunk(images)
        num_extra = self.num_hybrid if hybrid else 0
        own, extra = _split_anchors(
            select_anchors(proposals, self.num_queries + num_extra), self.num_queries
        )
        groups = [self._detection_group(own.boxes_cxcywh, number=0)]
        if regions is not None:
            groups.append(self._kd_group(groups[0], regions))
        if hybrid:
            groups.append(self._detection_group(extra.boxes_cxcywh, number=len(groups)))
        first_denoising = len(groups)
        if denoising is not None:
            groups += self._denoising_groups(denoising, text_embeddings, first_denoising)
        content, positions, boxes, blocked = join_groups(groups)
        if blocked is not None:
            blocked = blocked.repeat_interleave(self.num_heads, dim=0)
        queries, refined = self.decoder(content, positions, boxes, memory, grid, blocked)
        heads = cast("list[TextClassifier]", list(self.classifiers))
        if len(heads) < len(queries):
            queries, refined = queries[-len(heads) :], refined[-len(heads) :]
        features = torch.stack(
            [head.project(layer) for head, layer in zip(heads, queries, strict=True)]
        )
        outputs = _split(features, refined, [len(group) for group in groups])
        extra = outputs[first_denoising - hybrid : first_denoising]
        masks = None
        if self.mask_head is not None:
            seen = queries[:, :, : len(groups[0])]
            embedding = self.trunk.level_embeddings[0]
            masks = self.mask_head(memory, grid, embedding, seen, outputs[0].boxes_cxcywh)
        return StudentOutput(
            detection=outputs[0],
            logits=self._score(outputs[0], text_embeddings),
            encoder=proposals,
            anchors_cxcywh=own.boxes_cxcywh,
            anchor_objectness=own.objectness,
            distillation=outputs[1] if regions is not None else None,
            calibration=None if self.kd_calibration is None else self.kd_calibration(),
            hybrid=self._extra(extra, text_embeddings),
            denoised=self._extra(outputs[first_denoising:], text_embeddings),
            masks=masks,
        )

    def _extra(self, groups: list[QueryOutput], text_embeddings: Tensor) -> ExtraDetections | None:
        """Returns what groups of further queries found, as one; None without any."""
        if not groups:
            return None
        joined = QueryOutput(
            torch.cat([group.features for group in groups], dim=2),
            torch.cat([group.boxes_cxcywh for group in groups], dim=2),
        )
        return ExtraDetections(joined, self._score(joined, text_embeddings))

    def _score(self, queries: QueryOutput, text_embeddings: Tensor) -> Tensor:
        heads = cast("list[TextClassifier]", list(self.classifiers))
        pairs = zip(heads, queries.features, strict=True)
        return torch.stack([head.logits(layer, text_embeddings) for head, layer in pairs])

    def _detection_group(self, boxes_cxcywh: Tensor, *, number: int) -> QueryGroup:
        content, positions = self.encode_anchors(boxes_cxcywh)
        valid = torch.ones(boxes_cxcywh.shape[:2], dtype=torch.bool, device=boxes_cxcywh.device)
        return QueryGroup(content, positions, boxes_cxcywh, valid, sees=(number,))

    def _denoising_groups(
        self, denoising: DenoisingQueries, text_embeddings: Tensor, first: int
    ) -> list[QueryGroup]:
        """Returns groups that see the detection queries and themselves."""
        if self.denoising_content is None:
            raise ValueError("this student was built without denoising queries")
        content = self.denoising_content(text_embeddings.to(denoising.boxes_cxcywh))
        content = content[denoising.labels]
        _, positions = self.encode_anchors(denoising.boxes_cxcywh)
        tensors = (content, positions, denoising.boxes_cxcywh, denoising.valid)
        parts = zip(*(tensor.chunk(denoising.num_groups, dim=1) for tensor in tensors), strict=True)
        return [QueryGroup(*part, sees=(0, first + i)) for i, part in enumerate(parts)]

    def _kd_group(self, detection: QueryGroup, regions: TeacherRegions) -> QueryGroup:
        """Returns the KD queries: anchored ones, then those at the detection queries' anchors.

        The latter share the detection queries' positions; all have learned contents.
        """
        if self._kd is None or self.kd_content is None:
            raise ValueError("this student was built without auxiliary queries")
        planned = self._kd.num_anchored
        boxes, valid = regions.boxes_cxcywh[:, :planned], regions.valid[:, :planned]
        num_anchored = boxes.shape[1]
        parts: list[Tensor] = []
        if planned:
            parts.append(self.encode_anchors(boxes)[1])
        if self._kd.at_own_anchors:
            parts.append(detection.positions)
            boxes = torch.cat((boxes, detection.boxes_cxcywh), dim=1)
            valid = torch.cat((valid, detection.valid), dim=1)
        positions = torch.cat(parts, dim=1)
        content = self.kd_content
        if self._kd.num_slots:
            num_own = boxes.shape[1] - num_anchored
            content = torch.cat((content[:num_anchored], content[planned : planned + num_own]))
        return QueryGroup(content.expand_as(positions), positions, boxes, valid, sees=(0, 1))

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


def _split(features: Tensor, boxes: Tensor, sizes: list[int]) -> list[QueryOutput]:
    pairs = zip(features.split(sizes, dim=2), boxes.split(sizes, dim=2), strict=True)
    return [QueryOutput(feature, box) for feature, box in pairs]


def _split_anchors(anchors: SelectedAnchors, num_queries: int) -> list[SelectedAnchors]:
    places = (slice(num_queries), slice(num_queries, None))
    return [
        SelectedAnchors(anchors.boxes_cxcywh[:, place], anchors.objectness[:, place])
        for place in places
    ]
