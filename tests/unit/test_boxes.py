import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dkdetr import boxes

coordinate = st.floats(-100, 1100, width=32)
side = st.floats(0, 500, width=32)


@st.composite
def box_lists(draw: st.DrawFn, min_size: int = 1, max_size: int = 6) -> torch.Tensor:
    rows = draw(
        st.lists(
            st.tuples(coordinate, coordinate, side, side), min_size=min_size, max_size=max_size
        )
    )
    ltwh = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return torch.cat((ltwh[:, :2], ltwh[:, :2] + ltwh[:, 2:]), dim=-1)


def pairwise_giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return boxes.elementwise_giou(a[:, None], b[None])


def test_formats_by_hand():
    assert boxes.cxcywh_to_xyxy(torch.tensor([5.0, 4.0, 4.0, 2.0])).tolist() == [3, 3, 7, 5]
    assert boxes.xyxy_to_cxcywh(torch.tensor([3.0, 3.0, 7.0, 5.0])).tolist() == [5, 4, 4, 2]


def test_overlaps_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [4.0, 0.0, 6.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    assert boxes.pairwise_intersection(a, b).tolist() == [[1, 0, 4]]
    assert boxes.pairwise_iou(a, b)[0].tolist() == pytest.approx([1 / 7, 0, 1])
    # Hulls: 3x3 around 7 of union; 6x2 around 8; the box itself.
    assert pairwise_giou(a, b)[0].tolist() == pytest.approx([1 / 7 - 2 / 9, -4 / 12, 1])
    assert boxes.elementwise_giou(a.expand(3, 4), b).tolist() == pytest.approx(
        pairwise_giou(a, b)[0].tolist()
    )


def test_clipping_and_visibility_by_hand():
    box = torch.tensor([[-2.0, 1.0, 2.0, 5.0], [8.0, 8.0, 9.0, 9.0], [3.0, 3.0, 3.0, 3.0]])
    clipped = boxes.clip_xyxy(box, height=4, width=8)
    assert clipped.tolist() == [[0, 1, 2, 4], [8, 4, 8, 4], [3, 3, 3, 3]]
    assert boxes.visible_fraction(box, height=4, width=8).tolist() == [6 / 16, 0, 0]


def test_nms_by_hand_keeps_ties_in_input_order():
    box = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 10]])
    keep = boxes.nms_keep(box, torch.tensor([0.5, 0.9, 0.1, 0.9]), iou_threshold=0.7)
    assert keep.tolist() == [False, True, True, False]
    nothing = boxes.nms_keep(torch.zeros(0, 4), torch.zeros(0), iou_threshold=0.7)
    assert nothing.shape == (0,)


@given(box_lists())
def test_formats_invert_each_other(box: torch.Tensor):
    back = boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(box))
    torch.testing.assert_close(back, box, rtol=0, atol=1e-9)


@given(box_lists(), box_lists())
def test_overlaps_are_symmetric_and_bounded(a: torch.Tensor, b: torch.Tensor):
    iou, giou = boxes.pairwise_iou(a, b), pairwise_giou(a, b)
    torch.testing.assert_close(iou, boxes.pairwise_iou(b, a).T)
    assert ((iou >= 0) & (iou <= 1 + 1e-9)).all()
    assert ((giou >= -1 - 1e-9) & (giou <= iou + 1e-9)).all()


@given(box_lists(), st.floats(-50, 50), st.floats(0.5, 4))
def test_overlaps_ignore_shift_and_scale(a: torch.Tensor, shift: float, scale: float):
    moved = (a + shift) * scale
    # Boxes thinner than the rounding of their coordinates have no overlap worth comparing.
    thick = ((a[:, 2:] - a[:, :2]) > 1e-3).all(-1)
    torch.testing.assert_close(
        boxes.pairwise_iou(moved, moved)[thick][:, thick],
        boxes.pairwise_iou(a, a)[thick][:, thick],
        rtol=1e-6,
        atol=1e-6,
    )


@given(box_lists())
def test_clipping_is_idempotent_and_never_grows(box: torch.Tensor):
    once = boxes.clip_xyxy(box, height=300, width=400)
    assert torch.equal(once, boxes.clip_xyxy(once, height=300, width=400))
    assert (boxes.box_area(once) <= boxes.box_area(box) + 1e-6).all()
    seen = boxes.visible_fraction(box, height=300, width=400)
    assert ((seen >= 0) & (seen <= 1 + 1e-9)).all()


@given(box_lists(max_size=8), st.floats(0.1, 0.9), st.randoms())
def test_nms_leaves_no_overlap_and_drops_nothing_for_free(
    box: torch.Tensor, threshold: float, random
):
    scores = torch.tensor([random.random() for _ in range(len(box))], dtype=torch.float64)
    keep = boxes.nms_keep(box, scores, iou_threshold=threshold)
    overlap = boxes.pairwise_iou(box, box) > threshold
    overlap.fill_diagonal_(fill_value=False)
    assert not overlap[keep][:, keep].any()
    for dropped in torch.nonzero(~keep)[:, 0].tolist():
        assert (overlap[dropped] & keep & (scores >= scores[dropped])).any()


def test_inverse_sigmoid_is_finite_and_inverts():
    ends = boxes.inverse_sigmoid(torch.tensor([0.0, 1.0, -3.0, 7.0]))
    assert ends.tolist() == pytest.approx([math.log(1e-6), -math.log(1e-6)] * 2, rel=1e-3)
    inside = torch.linspace(1e-4, 1 - 1e-4, 1001)
    torch.testing.assert_close(boxes.inverse_sigmoid(inside).sigmoid(), inside, rtol=0, atol=1e-6)


def test_gradients_of_giou_at_touching_and_empty_boxes_are_finite():
    a = torch.tensor([[0.0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    b = torch.tensor([[1.0, 0, 2, 1], [0.5, 0.5, 0.5, 0.5]])
    boxes.elementwise_giou(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
