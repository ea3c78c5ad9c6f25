import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkdetr.errors import CorruptArtefactError
from dkdetr.evaluation.postprocess import postprocess


def run(logits, boxes=None, size=(100, 200), max_detections=300):
    logits = torch.tensor(logits)[None]
    if boxes is None:
        boxes = torch.full((logits.shape[1], 4), 0.5)
    sizes = torch.tensor([size])
    (found,) = postprocess(logits, boxes[None], sizes, max_detections=max_detections)
    return found


def test_best_pairs_of_query_and_class_first():
    found = run([[0.0, 2.0], [1.0, -3.0]], max_detections=3)
    assert found.labels.tolist() == [1, 0, 0]
    assert torch.equal(found.scores, torch.tensor([2.0, 1.0, 0.0]).sigmoid())


def test_boxes_are_scaled_to_the_file_and_clamped():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.2], [0.0, 1.0, 0.4, 0.4]])
    found = run([[1.0], [0.0]], boxes, size=(100, 200))
    expected = torch.tensor([[50.0, 40, 150, 60], [0, 80, 40, 100]])
    assert torch.allclose(found.boxes_xyxy, expected)


def test_each_image_keeps_its_own_size():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]).repeat(2, 1, 1)
    sizes = torch.tensor([[10, 20], [40, 30]])
    small, large = postprocess(torch.zeros(2, 1, 1), boxes, sizes, max_detections=5)
    assert small.boxes_xyxy.tolist() == [[0, 0, 20, 10]]
    assert large.boxes_xyxy.tolist() == [[0, 0, 30, 40]]


def test_ties_go_to_the_earlier_query_then_class():
    found = run([[3.0, 3.0], [5.0, 3.0], [3.0, 3.0]], torch.arange(12.0).reshape(3, 4) / 20)
    assert found.labels.tolist() == [0, 0, 1, 1, 0, 1]
    few = run([[3.0, 3.0], [5.0, 3.0], [3.0, 3.0]], max_detections=3)
    assert few.labels.tolist() == [0, 0, 1]


def test_saturated_scores_keep_the_order_of_their_logits():
    found = run([[200.0, 300.0]])
    assert found.scores.tolist() == [1.0, 1.0]
    assert found.labels.tolist() == [1, 0]


def test_classes_out_of_use_are_never_returned():
    found = run([[-torch.inf, 1.0, -torch.inf], [-torch.inf, 0.0, -torch.inf]])
    assert found.labels.tolist() == [1, 1]
    assert len(run([[-torch.inf]]).scores) == 0


@pytest.mark.parametrize(("logit", "box"), [(torch.nan, 0.5), (0.0, torch.nan)])
def test_nan_is_refused(logit, box):
    with pytest.raises(CorruptArtefactError, match="not finite") as raised:
        run([[logit]], torch.full((1, 4), box))
    assert raised.value.exit_code == 5


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 40),
    st.lists(st.sampled_from([-torch.inf, -2.0, 0.0, 0.5, 3.0, 90.0]), min_size=30, max_size=30),
)
def test_equals_a_plain_sort(num_queries, num_classes, max_detections, values):
    logits = torch.tensor(values[: num_queries * num_classes]).reshape(num_queries, num_classes)
    pairs = [(q, c) for q in range(num_queries) for c in range(num_classes)]
    usable = [(q, c) for q, c in pairs if logits[q, c] > -torch.inf]
    best = sorted(usable, key=lambda pair: -logits[pair])[:max_detections]
    boxes = (torch.arange(num_queries)[:, None] + 1) / 10 * torch.ones(4)
    (found,) = postprocess(
        logits[None], boxes[None], torch.tensor([[100, 100]]), max_detections=max_detections
    )
    assert found.labels.tolist() == [c for _, c in best]
    # Boxes of side s at centre s: the left edge tells the query.
    lefts = (found.boxes_xyxy[:, 0] / 5).round().int().tolist()
    assert lefts == [q + 1 for q, _ in best]
