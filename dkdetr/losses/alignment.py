"""What is distilled: pairs of a query's feature and a teacher's embedding (method B.2).

Anchored at cached boxes, query and embedding belong together from the start. Everywhere else the
student's own anchors have to be given a teacher's embedding first, after the forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dkdetr.boxes import cxcywh_to_xyxy
from dkdetr.config import KDConfig
from dkdetr.losses.matcher import Matches
from dkdetr.losses.region_assignment import (
    assign_by_overlap,
    first_by_rank,
    overlaps_base,
    select_own_anchors,
)
from dkdetr.structures import QueryOutput, StudentOutput, Targets, TeacherRegions

EmbedAnchors = Callable[[Tensor, Tensor], Tensor]
"""(boxes_cxcywh [batch, n, 4], valid [batch, n]) -> unit embeddings [batch, n, embed_dim]."""


@dataclass(frozen=True)
class AlignedOutput:
    """The student's output with `distillation` paired, place by place, with `regions`."""

    output: StudentOutput
    regions: TeacherRegions
    num_dropped: Float[Tensor, ""]
    """Regions that were wanted, of those offered, and that no query carries."""


class Alignment:
    """Pairs queries with teacher regions, by the settings.

    Args:
        kd: `alignment`, `auxiliary_queries`, `exclude`, `align_iou` and `selection`.
    """

    def __init__(self, kd: KDConfig) -> None:
        self._kd = kd

    @property
    def wants_matches(self) -> bool:
        """True if the pairs depend on which detection queries are matched to base objects."""
        return not self._kd.auxiliary_queries or (
            self._kd.alignment != "cached" and self._kd.exclude == "matched"
        )

    def __call__(
        self,
        output: StudentOutput,
        targets: Sequence[Targets],
        regions: TeacherRegions,
        image_sizes_hw: Int[Tensor, "batch 2"],
        *,
        matches: Matches | None = None,
        embed_anchors: EmbedAnchors | None = None,
    ) -> AlignedOutput:
        """Returns the pairs to distil.

        Args:
            output: of the student that was given these regions.
            targets: base objects.
            regions: as offered by the loader.
            image_sizes_hw: un-padded, for what is too small.
            matches: of the last layer's detections; needed where `wants_matches`.
            embed_anchors: the teacher; needed for `online`.
        """
        kd = self._kd
        if kd.paired_from_start:
            nothing = torch.zeros((), device=regions.valid.device)
            return AlignedOutput(output, regions, nothing)
        eligible = self._eligible(output, targets, matches)
        if kd.alignment == "online":
            if embed_anchors is None:
                raise ValueError("kd.alignment = online needs a teacher in training")
            return self._online(output, eligible, image_sizes_hw, embed_anchors)
        return self._by_overlap(output, regions, eligible)

    def _eligible(
        self, output: StudentOutput, targets: Sequence[Targets], matches: Matches | None
    ) -> Bool[Tensor, "batch num_queries"]:
        kd, anchors = self._kd, output.anchors_cxcywh
        eligible = output.anchor_objectness.isfinite()
        if self.wants_matches:
            if matches is None:
                raise ValueError("this alignment needs the matches of the last layer")
            eligible[matches.image_index, matches.query_index] = False
        if kd.alignment != "cached" and kd.exclude == "iou":
            limit = kd.selection.max_base_iou
            boxes = [target.boxes_cxcywh for target in targets]
            pairs = zip(anchors, boxes, strict=True)
            base = [overlaps_base(anchor, box, max_base_iou=limit) for anchor, box in pairs]
            eligible &= ~torch.stack(base)
        return eligible

    def _by_overlap(
        self, output: StudentOutput, regions: TeacherRegions, eligible: Tensor
    ) -> AlignedOutput:
        kd = self._kd
        anchored = min(kd.anchored_regions, regions.valid.shape[1])
        pool = _places(regions, slice(anchored, None))
        allowed = pool.valid[:, :, None] & eligible[:, None, :]
        query, found = assign_by_overlap(
            output.anchors_cxcywh, pool.boxes_cxcywh, allowed, min_iou=kd.align_iou
        )
        wanted = kd.regions_per_image - kd.anchored_regions
        kept = first_by_rank(query, found, wanted)
        query, found = query.gather(1, kept), found.gather(1, kept)
        chosen = replace(_gather_regions(pool, kept), valid=found)
        carried = _gather_queries(self._carriers(output), query)
        dropped = pool.valid.sum(1).clamp(max=wanted).sum() - found.sum()
        if anchored > 0:
            assert output.distillation is not None
            carried = _join(_first(output.distillation, anchored), carried)
            chosen = _join_regions(_places(regions, slice(anchored)), chosen)
        return AlignedOutput(replace(output, distillation=carried), chosen, dropped.float())

    def _online(
        self,
        output: StudentOutput,
        eligible: Tensor,
        image_sizes_hw: Tensor,
        embed_anchors: EmbedAnchors,
    ) -> AlignedOutput:
        kd, anchors = self._kd, output.anchors_cxcywh
        batch, count = len(anchors), kd.regions_per_image
        query = torch.zeros(batch, count, dtype=torch.long, device=anchors.device)
        valid = torch.zeros_like(query, dtype=torch.bool)
        as_printed = kd.exclude == "matched"
        for image in range(batch):
            height, width = image_sizes_hw[image].to(anchors.device).unbind()
            scale = torch.stack((width, height, width, height)).to(anchors.dtype)
            selected = select_own_anchors(
                cxcywh_to_xyxy(anchors[image]) * scale,
                eligible[image],
                count=count,
                nms_iou=1.0 if as_printed else kd.selection.nms_iou,
                min_side=0.0 if as_printed else kd.selection.min_side,
            )
            query[image, : len(selected)] = selected
            valid[image, : len(selected)] = True
        boxes = anchors.gather(1, query[..., None].expand(-1, -1, 4))
        carried = _gather_queries(self._carriers(output), query)
        regions = TeacherRegions(boxes, embed_anchors(boxes, valid), valid)
        nothing = torch.zeros((), device=anchors.device)
        return AlignedOutput(replace(output, distillation=carried), regions, nothing)

    def _carriers(self, output: StudentOutput) -> QueryOutput:
        """Returns the queries at the student's own anchors that learn from the teacher."""
        if not self._kd.auxiliary_queries:
            return output.detection
        if output.distillation is None:
            raise ValueError("regions were given but the student made no KD features")
        first = output.distillation.features.shape[2] - output.anchors_cxcywh.shape[1]
        features, boxes = output.distillation.features, output.distillation.boxes_cxcywh
        return QueryOutput(features[:, :, first:], boxes[:, :, first:])


def _places(regions: TeacherRegions, which: slice) -> TeacherRegions:
    return TeacherRegions(
        regions.boxes_cxcywh[:, which], regions.embeddings[:, which], regions.valid[:, which]
    )


def _gather_regions(regions: TeacherRegions, index: Tensor) -> TeacherRegions:
    boxes = regions.boxes_cxcywh.gather(1, index[..., None].expand(-1, -1, 4))
    wide = index[..., None].expand(-1, -1, regions.embeddings.shape[2])
    return TeacherRegions(boxes, regions.embeddings.gather(1, wide), regions.valid.gather(1, index))


def _gather_queries(queries: QueryOutput, index: Tensor) -> QueryOutput:
    def pick(tensor: Tensor) -> Tensor:
        num_layers, width = tensor.shape[0], tensor.shape[-1]
        return tensor.gather(2, index[None, :, :, None].expand(num_layers, -1, -1, width))

    return QueryOutput(pick(queries.features), pick(queries.boxes_cxcywh))


def _first(queries: QueryOutput, count: int) -> QueryOutput:
    return QueryOutput(queries.features[:, :, :count], queries.boxes_cxcywh[:, :, :count])


def _join(one: QueryOutput, other: QueryOutput) -> QueryOutput:
    return QueryOutput(
        torch.cat((one.features, other.features), dim=2),
        torch.cat((one.boxes_cxcywh, other.boxes_cxcywh), dim=2),
    )


def _join_regions(one: TeacherRegions, other: TeacherRegions) -> TeacherRegions:
    return TeacherRegions(
        torch.cat((one.boxes_cxcywh, other.boxes_cxcywh), dim=1),
        torch.cat((one.embeddings, other.embeddings), dim=1),
        torch.cat((one.valid, other.valid), dim=1),
    )
