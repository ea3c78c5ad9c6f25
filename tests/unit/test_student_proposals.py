"""Box heads, token boxes and the choice of queries."""

import pytest
import torch
from tiny_student import image_batch, text_embeddings, tiny_config, tiny_student

from dkdetr.structures import EncoderOutput
from dkdetr.student.build import build_student
from dkdetr.student.encoder import TokenGrid, token_centres, valid_ratio
from dkdetr.student.heads import BoxHead, TextClassifier
from dkdetr.student.query_selection import select_anchors, token_boxes


def one_level(height: int, width: int, padding: torch.Tensor | None = None) -> TokenGrid:
    mask = torch.zeros(1, height, width, dtype=torch.bool) if padding is None else padding
    return TokenGrid(
        ((height, width),), mask.flatten(1), valid_ratio(mask, dtype=torch.float32)[:, None]
    )


def test_token_centres_by_hand():
    padding = torch.tensor([[[False, False, True, True], [True] * 4]])
    grid = one_level(2, 4, padding)
    assert grid.valid_ratios.tolist() == [[[0.5, 0.5]]]
    centres = token_centres(grid)[0]
    assert centres[:3].tolist() == [[0.25, 0.5], [0.75, 0.5], [1.25, 0.5]]


def test_token_boxes_by_hand():
    start, valid = token_boxes(one_level(2, 64))
    boxes = start.sigmoid()[0]
    assert boxes[3].tolist() == pytest.approx([3.5 / 64, 0.25, 0.05, 0.05], rel=1e-5)
    # The first and last centres lie at 0.5 / 64 < 0.01 of the border.
    assert valid[0].view(2, 64)[0].tolist() == [False] + [True] * 62 + [False]
    assert start.isfinite().all()


def test_coarse_levels_start_larger():
    shapes = ((1, 2), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1))
    grid = TokenGrid(shapes, torch.zeros(1, 7, dtype=torch.bool), torch.ones(1, 6, 2))
    start, valid = token_boxes(grid)
    sides = [0.05, 0.05, 0.1, 0.2, 0.4, 0.8, 0.99]
    assert start.sigmoid()[0, :, 2].tolist() == pytest.approx(sides, rel=1e-4)
    # The last one's 1.6 is no box of this picture.
    assert valid[0].tolist() == [True] * 6 + [False]


def encoder_output(scores: list[float], valid: list[bool]) -> EncoderOutput:
    boxes = torch.arange(len(scores)).float()[None, :, None].expand(1, -1, 4) / 10
    return EncoderOutput(torch.tensor([scores]), boxes, torch.tensor([valid]))


def test_best_first_and_invalid_ones_last():
    encoder = encoder_output([1.0, 9.0, 3.0, 8.0, 2.0], [True, False, True, False, True])
    anchors = select_anchors(encoder, 3)
    assert (anchors.boxes_cxcywh[0, :, 0] * 10).round().tolist() == [2, 4, 0]
    assert anchors.objectness.tolist() == [[3, 2, 1]]
    short = select_anchors(encoder, 4)
    assert short.objectness[0, 3] == -torch.inf
    assert select_anchors(encoder, 9).boxes_cxcywh.shape == (1, 5, 4)


def test_of_those_that_are_not_valid_the_earlier_are_taken():
    """A plain topk takes any of equals, on every device and in every runtime others."""
    valid = torch.rand(3, 400, generator=torch.Generator().manual_seed(0)) < 0.05
    scores = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
    boxes = torch.arange(400.0)[None, :, None].expand(3, -1, 4)
    anchors = select_anchors(EncoderOutput(scores, boxes, valid), 60)
    for image in range(3):
        count = int(valid[image].sum())
        chosen = anchors.boxes_cxcywh[image, :, 0].long()
        assert set(chosen[:count].tolist()) == set(valid[image].nonzero()[:, 0].tolist())
        rest = (~valid[image]).nonzero()[: 60 - count, 0]
        assert chosen[count:].tolist() == rest.tolist()
        assert (anchors.objectness[image, count:] == -torch.inf).all()


def test_anchors_pass_no_gradient():
    encoder = encoder_output([1.0, 2.0], [True, True])
    boxes = encoder.boxes_cxcywh.clone().requires_grad_()
    chosen = select_anchors(EncoderOutput(encoder.objectness_logits, boxes, encoder.valid), 1)
    assert not chosen.boxes_cxcywh.requires_grad


@pytest.mark.parametrize("size_hw", [(8, 8), (33, 17), (64, 64)])
def test_pictures_with_fewer_valid_tokens_than_queries_stay_finite(size_hw: tuple[int, int]):
    student = tiny_student(tiny_config(num_queries=60)).train()
    images = image_batch([size_hw, (128, 128)])
    output = student(images, text_embeddings())
    if size_hw != (64, 64):
        assert output.encoder.valid[0].sum() < 60
    finite = [output.logits, output.detection.boxes_cxcywh, output.encoder.boxes_cxcywh]
    for tensor in finite:
        assert tensor.isfinite().all()
    sum(tensor.sum() for tensor in finite).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_fewer_tokens_than_queries_gives_fewer_queries():
    student = tiny_student(tiny_config(num_queries=60))
    output = student(image_batch([(32, 32)] * 2, padded_hw=(32, 32)), text_embeddings())
    assert output.logits.shape[2] == 16 + 4 + 1 + 1


def test_untrained_boxes_are_their_anchors():
    """Box heads start at zero change, in the encoder and in every layer of the decoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = build_student(tiny_config(), text_dim=16).eval()
    output = student(image_batch(), text_embeddings())
    anchors = output.anchors_cxcywh.expand_as(output.detection.boxes_cxcywh)
    torch.testing.assert_close(output.detection.boxes_cxcywh, anchors, rtol=0, atol=1e-5)
    head = BoxHead(32)
    assert not head(torch.randn(3, 32)).any()


def test_classifier_by_hand():
    head = TextClassifier(2, 2, temperature=0.05, bias_init=None)
    with torch.no_grad():
        head.projection.weight.copy_(torch.eye(2))
        head.projection.bias.zero_()
    features = head.project(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0]]) / 0.05
    torch.testing.assert_close(head.logits(features, text), expected)
    biased = TextClassifier(2, 2, temperature=0.05, bias_init=-3.0)
    torch.testing.assert_close(biased.logits(features, text), expected - 3.0)
    assert [name for name, _ in head.named_parameters()] == ["projection.weight", "projection.bias"]
