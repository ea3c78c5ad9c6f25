"""Which query stands for which teacher region, by hand and by property."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_student import tiny_config, unit_rows

from dkdetr.boxes import cxcywh_to_xyxy, pairwise_iou
from dkdetr.config import KDConfig
from dkdetr.losses.alignment import Alignment
from dkdetr.losses.matcher import Matches
from dkdetr.losses.region_assignment import (
    assign_by_overlap,
    first_by_rank,
    overlaps_base,
    select_own_anchors,
)
from dkdetr.structures import EncoderOutput, QueryOutput, StudentOutput, Targets, TeacherRegions

SIZES = torch.tensor([[100, 100]])
NOBODY = Matches(*(torch.zeros(0, dtype=torch.long) for _ in range(3)))


def row_of_boxes(*centres: float, width: float = 0.2) -> torch.Tensor:
    return torch.tensor([[[centre, 0.5, width, 0.2] for centre in centres]])


def kd_settings(**changes: Any) -> KDConfig:
    return replace(tiny_config().kd, **{"regions_per_image": 4, **changes})


def test_the_greatest_overlap_goes_first_and_nobody_is_taken_twice():
    regions = row_of_boxes(0.30, 0.35, 0.80)
    anchors = row_of_boxes(0.34, 0.26, 0.50)
    # Overlaps: region 0: 2/3 with both; region 1: .905 with anchor 0; region 2: none.
    everything = torch.ones(1, 3, 3, dtype=torch.bool)
    query, found = assign_by_overlap(anchors, regions, everything, min_iou=0.5)
    assert found.tolist() == [[True, True, False]]
    assert query[0, :2].tolist() == [1, 0]
    query, found = assign_by_overlap(anchors, regions, everything, min_iou=0.9)
    assert found.tolist() == [[False, True, False]]
    everything[0, 1, 0] = False
    query, found = assign_by_overlap(anchors, regions, everything, min_iou=0.5)
    assert found.tolist() == [[True, False, False]]
    assert query[0, 0] == 0  # equal overlaps: the first query


@given(seed=st.integers(0, 10**6), regions=st.integers(0, 6), queries=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_assignment_equals_the_plain_greedy_one(seed: int, regions: int, queries: int):
    generator = torch.Generator().manual_seed(seed)

    def boxes(count: int) -> torch.Tensor:
        return 0.3 + 0.3 * torch.rand(2, count, 4, generator=generator)

    ours, theirs = boxes(regions), boxes(queries)
    allowed = torch.rand(2, regions, queries, generator=generator) < 0.8
    query, found = assign_by_overlap(theirs, ours, allowed, min_iou=0.4)
    for image in range(2):
        overlap = pairwise_iou(cxcywh_to_xyxy(ours[image]), cxcywh_to_xyxy(theirs[image]))
        pairs = sorted(
            (-overlap[r, q].item(), r, q)
            for r in range(regions)
            for q in range(queries)
            if allowed[image, r, q] and overlap[r, q] >= 0.4
        )
        expected: dict[int, int] = {}
        for _, r, q in pairs:
            if r not in expected and q not in expected.values():
                expected[r] = q
        got = {r: int(query[image, r]) for r in range(regions) if found[image, r]}
        assert got == expected


def test_the_best_ranked_queries_are_kept():
    query = torch.tensor([[5, 0, 2, 9]])
    found = torch.tensor([[True, False, True, True]])
    assert first_by_rank(query, found, 3).tolist() == [[2, 0, 3]]
    assert first_by_rank(query, found, 9).tolist() == [[2, 0, 3, 1]]


def test_own_anchors_for_the_teacher():
    boxes = torch.tensor(
        [[0, 0, 40, 40], [1, 1, 40, 40], [50, 50, 90, 60], [50, 0, 90, 40]], dtype=torch.float32
    )
    eligible = torch.tensor([True, True, True, True])
    chosen = select_own_anchors(boxes, eligible, count=5, nms_iou=0.5, min_side=16)
    assert chosen.tolist() == [0, 3]  # a duplicate and a flat one are left out
    eligible[0] = False
    chosen = select_own_anchors(boxes, eligible, count=5, nms_iou=1.0, min_side=0)
    assert chosen.tolist() == [1, 2, 3]
    assert select_own_anchors(boxes, eligible, count=1, nms_iou=1.0, min_side=0).tolist() == [1]


def test_overlap_with_base_objects():
    anchors = row_of_boxes(0.3, 0.5)[0]
    assert overlaps_base(anchors, row_of_boxes(0.32)[0], max_base_iou=0.5).tolist() == [True, False]
    assert not overlaps_base(anchors, torch.zeros(0, 4), max_base_iou=0.5).any()


def output_at(anchors: torch.Tensor, num_anchored: int, auxiliary: bool) -> StudentOutput:
    """Features tell who they are: 100 and on for detection, 200 and on for KD queries."""
    num_queries = anchors.shape[1]
    own = torch.arange(num_queries, dtype=torch.float32).view(1, 1, -1, 1)
    detection = QueryOutput(100 + own, anchors[None])
    total = num_anchored + num_queries
    numbers = torch.arange(total, dtype=torch.float32).view(1, 1, -1, 1)
    boxes = torch.cat((torch.zeros(1, num_anchored, 4), anchors), dim=1)[None]
    none = torch.zeros(1, 0)
    return StudentOutput(
        detection=detection,
        logits=torch.zeros(1, 1, num_queries, 2),
        encoder=EncoderOutput(none, torch.zeros(1, 0, 4), none.bool()),
        anchors_cxcywh=anchors,
        anchor_objectness=-own[0, ..., 0],
        distillation=QueryOutput(200 + numbers, boxes) if auxiliary else None,
    )


def regions_at(boxes: torch.Tensor, num_valid: int | None = None) -> TeacherRegions:
    count = boxes.shape[1]
    valid = torch.arange(count)[None] < (count if num_valid is None else num_valid)
    return TeacherRegions(boxes, unit_rows(1, count, 8), valid)


def no_targets() -> list[Targets]:
    return [Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))]


def carried(aligned) -> list[float]:
    return aligned.output.distillation.features[0, 0, aligned.regions.valid[0], 0].tolist()


def test_cached_is_left_alone():
    output = output_at(row_of_boxes(0.3), 2, auxiliary=True)
    regions = regions_at(row_of_boxes(0.1, 0.9))
    aligned = Alignment(kd_settings())(output, no_targets(), regions, SIZES)
    assert aligned.output is output
    assert aligned.regions is regions
    assert not Alignment(kd_settings()).wants_matches


def test_without_auxiliary_queries_unmatched_detection_queries_carry_the_cached_regions():
    anchors = row_of_boxes(0.30, 0.31, 0.60, 0.80)
    regions = regions_at(row_of_boxes(0.30, 0.60, 0.10), num_valid=3)
    align = Alignment(kd_settings(auxiliary_queries=False, regions_per_image=3))
    assert align.wants_matches
    matched = Matches(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    output = output_at(anchors, 0, auxiliary=False)
    # The matched query overlaps a base object; it alone is left out.
    base = [Targets(torch.tensor([0]), row_of_boxes(0.31)[0])]
    aligned = align(output, base, regions, SIZES, matches=matched)
    assert carried(aligned) == [101, 102]
    assert aligned.num_dropped == 1
    assert torch.equal(aligned.regions.embeddings[0, :2], regions.embeddings[0, :2])
    free = align(output, base, regions, SIZES, matches=NOBODY)
    assert carried(free) == [100, 102]


def test_iou_gives_own_anchors_the_cached_regions_and_keeps_the_best_ranked():
    anchors = row_of_boxes(0.80, 0.31, 0.60, 0.10)
    regions = regions_at(row_of_boxes(0.30, 0.60, 0.80, 0.45), num_valid=3)
    output = output_at(anchors, 0, auxiliary=True)
    align = Alignment(kd_settings(alignment="iou", regions_per_image=2))
    assert not align.wants_matches
    aligned = align(output, no_targets(), regions, SIZES)
    assert carried(aligned) == [200, 201]
    assert torch.equal(aligned.regions.embeddings[0], regions.embeddings[0, [2, 0]])
    assert torch.equal(aligned.regions.boxes_cxcywh[0], regions.boxes_cxcywh[0, [2, 0]])
    assert aligned.num_dropped == 0
    base = [Targets(torch.tensor([0]), row_of_boxes(0.82)[0])]
    assert carried(align(output, base, regions, SIZES)) == [201, 202]
    by_match = Alignment(kd_settings(alignment="iou", regions_per_image=2, exclude="matched"))
    assert carried(by_match(output, base, regions, SIZES, matches=NOBODY)) == [200, 201]
    matched = Matches(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    assert carried(by_match(output, base, regions, SIZES, matches=matched)) == [200, 202]


def test_hybrid_is_half_anchored_and_half_own_without_a_region_twice():
    anchors = row_of_boxes(0.30, 0.60)
    regions = regions_at(row_of_boxes(0.30, 0.10, 0.60, 0.90), num_valid=3)
    output = output_at(anchors, 2, auxiliary=True)
    align = Alignment(kd_settings(alignment="hybrid"))
    aligned = align(output, no_targets(), regions, SIZES)
    # KD queries 0 and 1 are anchored, 2 and 3 stand at the own anchors; region 0 is not given
    # to the second kind once more.
    assert carried(aligned) == [200, 201, 203]
    assert torch.equal(aligned.regions.embeddings[0, :3], regions.embeddings[0, [0, 1, 2]])


@pytest.mark.parametrize("auxiliary", [True, False])
def test_online_asks_the_teacher_about_own_anchors(auxiliary: bool):
    anchors = row_of_boxes(0.30, 0.31, 0.60, 0.80)
    asked = []

    def embed(boxes: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        asked.append((boxes, valid))
        return unit_rows(1, 3, 8)

    output = output_at(anchors, 0, auxiliary=auxiliary)
    offered = regions_at(torch.zeros(1, 0, 4))
    base = [Targets(torch.tensor([0]), row_of_boxes(0.80)[0])]
    wanted = kd_settings(alignment="online", auxiliary_queries=auxiliary, regions_per_image=3)
    aligned = Alignment(wanted)(output, base, offered, SIZES, matches=NOBODY, embed_anchors=embed)
    first = 200 if auxiliary else 100
    assert carried(aligned) == [first, first + 2]  # NMS takes 1, the base object 3
    boxes, valid = asked[0]
    assert torch.equal(boxes[0, valid[0]], anchors[0, [0, 2]])
    assert torch.equal(aligned.regions.embeddings, unit_rows(1, 3, 8))
    # The paper: whoever is not matched, by rank alone.
    matched = Matches(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    printed = Alignment(replace(wanted, exclude="matched"))
    aligned = printed(output, base, offered, SIZES, matches=matched, embed_anchors=embed)
    assert carried(aligned) == [first + 1, first + 2, first + 3]
    with pytest.raises(ValueError, match="teacher"):
        printed(output, base, offered, SIZES, matches=matched)
