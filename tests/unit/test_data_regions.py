import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkdetr.boxes import cxcywh_to_xyxy, pairwise_iou, visible_fraction
from dkdetr.config import RegionSelectionConfig
from dkdetr.data.region_selection import select_regions
from dkdetr.data.transforms import ViewGeometry, draw_geometry

SETTINGS = RegionSelectionConfig()
WHOLE = ViewGeometry((200, 400), (200, 400), 0, 0, (200, 400), flip=False)
NONE = torch.zeros(0, 4)


def select(boxes, objectness=None, cached=None, base=NONE, geometry=WHOLE, k=20, **changes):
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    if objectness is None:
        objectness = torch.linspace(1, 0.1, len(boxes))
    if cached is None:
        cached = torch.zeros(len(boxes))
    return select_regions(
        boxes,
        torch.as_tensor(objectness),
        torch.as_tensor(cached),
        base_boxes_xyxy=torch.as_tensor(base, dtype=torch.float32),
        geometry=geometry,
        num_regions=k,
        settings=dataclasses.replace(SETTINGS, **changes),
    )


def test_each_reason_to_drop_a_region():
    boxes = [
        [10, 10, 50, 50],  # kept
        [100, 10, 140, 50],  # is the base object
        [200, 10, 240, 50],  # overlaps one by what stage 1 saw
        [300, 10, 310, 80],  # 10 pixels wide
        [11, 11, 50, 50],  # overlaps the first
        [390, 100, 430, 150],  # a quarter visible
        [60, 100, 100, 150],  # kept
    ]
    cached = [0, 0, 0.5, 0, 0, 0, 0.49]
    chosen = select(boxes, cached=cached, base=[[100, 10, 140, 50]])
    assert chosen.indices.tolist() == [0, 6]
    expected = torch.tensor([[30 / 400, 30 / 200, 0.1, 0.2], [0.2, 125 / 200, 0.1, 0.25]])
    torch.testing.assert_close(chosen.boxes_cxcywh, expected)


def test_the_best_by_objectness_are_taken_in_order_and_ties_keep_the_order_of_the_cache():
    boxes = [[20 * i, 0, 20 * i + 18, 30] for i in range(10)]
    scores = [0.1, 0.9, 0.5, 0.9, 0.2, 0.5, 0.5, 0.5, 0.3, 0.95]
    assert select(boxes, scores, k=6).indices.tolist() == [9, 1, 3, 2, 5, 6]


def test_a_base_object_that_the_crop_removed_still_excludes():
    geometry = ViewGeometry((200, 400), (200, 400), 0, 50, (200, 100), flip=False)
    regions = [[40, 20, 100, 80]]  # five sixths visible; overlaps the object, of which less is
    base = [[0, 20, 90, 80]]
    assert select(regions, geometry=geometry).indices.tolist() == [0]
    assert select(regions, base=base, geometry=geometry).indices.tolist() == []


def test_anchors_are_cut_at_the_view_and_follow_a_flip():
    geometry = ViewGeometry((200, 400), (100, 200), 0, 20, (100, 128), flip=True)
    chosen = select([[30, 0, 130, 100]], geometry=geometry)
    # In the view: x from -5 to 45, mirrored 83 to 133, cut at 128.
    expected = torch.tensor([[83, 0, 128, 50]]) / torch.tensor([128, 100, 128, 100])
    torch.testing.assert_close(cxcywh_to_xyxy(chosen.boxes_cxcywh), expected)


@pytest.mark.parametrize("k", [0, 5])
def test_nothing_to_choose_from_gives_nothing(k):
    chosen = select(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), k=k)
    assert chosen.indices.shape == (0,)
    assert chosen.boxes_cxcywh.shape == (0, 4)


@given(seed=st.integers(0, 10**6), n=st.integers(0, 40), m=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_what_is_selected_keeps_every_promise(seed, n, m):
    generator = torch.Generator().manual_seed(seed)

    def boxes(count):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([300.0, 150.0])
        size = torch.rand(count, 2, generator=generator) * 90 + 4
        limit = torch.tensor([400.0, 200.0])
        return torch.cat((corner, torch.minimum(corner + size, limit)), dim=1)

    regions, base = boxes(n), boxes(m)
    if n and m:
        regions[0] = base[0]
    scores = torch.rand(n, generator=generator).sort(descending=True).values
    cached = torch.rand(n, generator=generator) * 0.6
    geometry = draw_geometry(
        (200, 400), base,
        image_size=256, scale_range=(0.1, 2.0), flip_probability=0.5, generator=generator,
    )  # fmt: skip
    chosen = select(regions, scores, cached, base, geometry, k=7)
    again = select(regions, scores, cached, base, geometry, k=7)
    assert torch.equal(chosen.indices, again.indices)
    assert torch.equal(chosen.boxes_cxcywh, again.boxes_cxcywh)
    assert len(chosen.indices) <= 7
    assert (chosen.indices.diff() > 0).all()  # the cache is sorted by objectness
    if m:
        overlaps = pairwise_iou(regions[chosen.indices].double(), base.double())
        assert (overlaps < 0.5).all()
    assert (cached[chosen.indices] < 0.5).all()
    height, width = geometry.view_hw
    moved = geometry.move_boxes(regions.double())[chosen.indices]
    assert (visible_fraction(moved, height=height, width=width) >= 0.7).all()
    anchors = cxcywh_to_xyxy(chosen.boxes_cxcywh)
    assert (anchors >= -1e-6).all()
    assert (anchors <= 1 + 1e-6).all()
    sides = chosen.boxes_cxcywh[:, 2:] * torch.tensor([width, height])
    assert (sides >= 16 - 1e-3).all()
    overlaps = pairwise_iou(anchors, anchors) - torch.eye(len(anchors))
    assert (overlaps <= 0.5 + 1e-5).all()
