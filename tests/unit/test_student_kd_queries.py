"""The one-way mask: KD queries see detection queries and are not seen by them."""

from dataclasses import replace

import pytest
import torch
from tiny_student import (
    boxes_inside,
    image_batch,
    loss_of,
    targets,
    teacher_regions,
    text_embeddings,
    tiny_config,
    tiny_student,
)

from dkdetr.structures import StudentOutput
from dkdetr.student.queries import blocked_pairs

F64 = torch.float64


def detections(output: StudentOutput) -> list[torch.Tensor]:
    detection, encoder = output.detection, output.encoder
    return [
        output.logits,
        detection.features,
        detection.boxes_cxcywh,
        output.anchors_cxcywh,
        encoder.objectness_logits,
        encoder.boxes_cxcywh,
    ]


def one_way_mask(num_detection: int, region_valid: torch.Tensor) -> torch.Tensor:
    seen = torch.ones(len(region_valid), num_detection, dtype=torch.bool)
    return blocked_pairs([seen, region_valid], [(0,), (0, 1)])


def test_mask_by_hand():
    valid = torch.tensor([[True, False], [True, True]])
    blocked = one_way_mask(2, valid).int().tolist()
    assert blocked[0] == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert blocked[1] == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_kd_queries_have_their_anchors_positions_and_the_learned_content():
    """Method B.2: the position half of the projection, never its content half."""
    student, regions = tiny_student(), teacher_regions((4, 4))
    own = student._detection_group(boxes_inside(2, 12), number=0)
    group = student._kd_group(own, regions)
    content, positions = student.encode_anchors(regions.boxes_cxcywh)
    assert not torch.allclose(content, positions)
    assert torch.equal(group.positions, positions)
    assert student.kd_content is not None
    assert torch.equal(group.content, student.kd_content.expand_as(group.content))


def test_queries_at_the_students_anchors_have_the_detection_queries_positions():
    config = tiny_config()
    config = replace(config, kd=replace(config.kd, alignment="iou"))
    student = tiny_student(config)
    own = student._detection_group(boxes_inside(2, 12), number=0)
    group = student._kd_group(own, teacher_regions((4, 4)))
    assert torch.equal(group.positions, own.positions)
    assert not torch.allclose(group.content, own.content)


@pytest.mark.parametrize("training", [False, True])
def test_noise_for_kd_contents_and_anchors_leaves_detections_bit_identical(training: bool):
    student = tiny_student().train(training)
    images, text = image_batch(), text_embeddings()
    for part in student.modules():  # a training pass would move the statistics
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.0
    regions = teacher_regions((3, 2))
    before = student(images, text, regions)
    assert student.kd_content is not None
    with torch.no_grad():
        student.kd_content.add_(100 * torch.randn(student.kd_content.shape))
    noise = replace(regions, boxes_cxcywh=boxes_inside(2, 4, seed=99))
    after = student(images, text, noise)
    for one, other in zip(detections(before), detections(after), strict=True):
        assert torch.equal(one, other)
    assert before.distillation is not None
    assert after.distillation is not None
    assert not torch.allclose(before.distillation.features, after.distillation.features)


def test_detection_losses_have_exactly_no_gradient_to_kd_inputs():
    student = tiny_student()
    regions = teacher_regions((3, 2))
    anchors = regions.boxes_cxcywh.clone().requires_grad_()
    output = student(image_batch(), text_embeddings(), replace(regions, boxes_cxcywh=anchors))
    everything = sum(part.square().sum() for part in detections(output))
    assert student.kd_content is not None
    gradients = torch.autograd.grad(everything, [student.kd_content, anchors], retain_graph=True)
    assert all(not gradient.any() for gradient in gradients)
    assert output.distillation is not None
    features = output.distillation.features.square().sum()
    gradients = torch.autograd.grad(features, [student.kd_content, anchors])
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-10)])
@pytest.mark.parametrize("training", [False, True])
def test_detections_agree_with_a_run_without_kd_queries(
    dtype: torch.dtype, tolerance: float, training: bool
):
    student = tiny_student(dtype=dtype).train(training)
    images, text = image_batch(dtype=dtype), text_embeddings(dtype)
    with_kd = student(images, text, teacher_regions((3, 0), dtype=dtype))
    without = student(images, text)
    assert without.distillation is None
    for one, other in zip(detections(with_kd), detections(without), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_kd_queries_hear_detection_queries():
    student = tiny_student()
    memory, grid, _ = student.trunk(image_batch())
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(2, 10, 32, generator=generator)
    positions = torch.randn(2, 10, 32, generator=generator)
    boxes = boxes_inside(2, 10)
    blocked = one_way_mask(7, torch.ones(2, 3, dtype=torch.bool)).repeat_interleave(4, dim=0)
    before, _ = student.decoder(content, positions, boxes, memory, grid, blocked)
    content[:, 0] += 1.0
    after, _ = student.decoder(content, positions, boxes, memory, grid, blocked)
    assert not torch.isclose(before[:, :, 7:], after[:, :, 7:], atol=1e-6).all(-1).any()


def test_empty_places_are_not_heard_by_filled_ones():
    student = tiny_student()
    regions = teacher_regions((3, 2))
    boxes = torch.where(regions.valid[..., None], regions.boxes_cxcywh, torch.zeros(4))
    one = student(image_batch(), text_embeddings(), regions).distillation
    other = student(
        image_batch(), text_embeddings(), replace(regions, boxes_cxcywh=boxes)
    ).distillation
    assert one is not None
    assert other is not None
    assert torch.equal(one.features[:, regions.valid], other.features[:, regions.valid])
    assert other.features.isfinite().all()


def test_a_kd_query_is_its_anchor_and_the_shared_content():
    """The same box in another place of the list says the same."""
    student = tiny_student(dtype=F64)
    regions = teacher_regions((4, 4), dtype=F64)
    turned = replace(regions, boxes_cxcywh=regions.boxes_cxcywh.flip(1))
    one = student(image_batch(dtype=F64), text_embeddings(F64), regions).distillation
    other = student(image_batch(dtype=F64), text_embeddings(F64), turned).distillation
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.features, other.features.flip(2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("distil", [True, False])
def test_every_parameter_learns(distil: bool):
    student = tiny_student().train()
    regions = teacher_regions((3, 2)) if distil else None
    output = student(image_batch(), text_embeddings(), regions)
    loss_of(output, targets(), regions).total.backward()
    idle = {n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == (set() if distil else {"kd_content"})


def test_a_student_without_auxiliary_queries_has_none_and_says_so():
    config = tiny_config()
    plain = replace(config, kd=replace(config.kd, regions_per_image=0))
    student = tiny_student(plain)
    assert student.kd_content is None
    with pytest.raises(ValueError, match="without auxiliary queries"):
        student(image_batch(), text_embeddings(), teacher_regions())


def test_what_distillation_teaches():
    """Gradients of SKD and RKD reach decoder, encoder and backbone, not the box heads (A.6)."""
    student = tiny_student().train()
    regions = teacher_regions((3, 2))
    output = student(image_batch(), text_embeddings(), regions)
    parts = loss_of(output, targets(), regions).parts
    (parts["skd"] + parts["rkd_image"] + parts["rkd_batch"]).backward()
    idle = {n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    # The first stage gives KD queries nothing, earlier projections are not read, and references
    # pass no gradient from layer to layer.
    prefixes = ("trunk.query_selection.", "decoder.box_heads.", "classifiers.0.")
    assert idle == {n for n, _ in student.named_parameters() if n.startswith(prefixes)}
