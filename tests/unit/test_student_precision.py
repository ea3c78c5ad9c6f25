"""Half precision around, float32 where it matters (architecture decision 14)."""

import pytest
import torch
from tiny_student import (
    image_batch,
    loss_of,
    targets,
    teacher_regions,
    text_embeddings,
    tiny_config,
    tiny_student,
)

from dkdetr.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from dkdetr.losses.relational_kd import relational_loss
from dkdetr.losses.semantic_kd import semantic_bce_loss
from dkdetr.structures import StudentOutput

# bfloat16 keeps 8 bits, float16 11; the student is two layers deep. Chosen queries near a tie may
# change places, so the tolerances are those of whole losses, and wide.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}


def run(dtype: torch.dtype | None) -> StudentOutput:
    # Every token a query: which ones are best must not decide what is compared.
    student = tiny_student(tiny_config(num_queries=400))
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        return student(image_batch(), text_embeddings(), teacher_regions())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_losses_agree_with_float32(dtype: torch.dtype):
    plain = loss_of(run(None), targets(), teacher_regions())
    half = loss_of(run(dtype), targets(), teacher_regions())
    for name, value in plain.parts.items():
        assert half.parts[name].dtype == torch.float32
        assert half.parts[name].item() == pytest.approx(value.item(), rel=TOLERANCE[dtype]), name


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_anchors_are_float32_under_autocast(dtype: torch.dtype):
    output = run(dtype)
    assert output.distillation is not None
    for tensor in (
        output.logits,
        output.detection.features,
        output.detection.boxes_cxcywh,
        output.encoder.objectness_logits,
        output.encoder.boxes_cxcywh,
        output.anchors_cxcywh,
        output.distillation.features,
    ):
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def test_float16_trains_with_a_scaler():
    student = tiny_student().train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", dtype=torch.float16):
        output = student(image_batch(), text_embeddings(), teacher_regions())
    report = loss_of(output, targets(), teacher_regions())
    scaler.scale(report.total).backward()
    scaler.unscale_(optimiser)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**8


def test_a_box_survives_the_round_trip_at_1024_pixels():
    """Anchors go through the inverse sigmoid and back in every decoder layer."""
    corners = torch.tensor([0.0, 0.5, 1.0, 16.25, 511.7, 1023.0, 1023.5, 1024.0])
    left, right = torch.meshgrid(corners, corners, indexing="ij")
    wide = right > left
    boxes_xyxy = torch.stack((left, left, right, right), dim=-1)[wide]
    normalised = xyxy_to_cxcywh(boxes_xyxy) / 1024
    # inverse_sigmoid's eps bounds what it can carry: 1e-5 of the picture is 0.01 pixels.
    back = inverse_sigmoid(normalised).sigmoid()
    assert inverse_sigmoid(normalised).isfinite().all()
    assert ((back - normalised).abs() * 1024).max() <= 0.0103
    inner = ((normalised > 1e-4) & (normalised < 1 - 1e-4)).all(-1)
    error = (cxcywh_to_xyxy(back) * 1024 - boxes_xyxy)[inner].abs().max()
    assert error < 0.01


def test_the_same_in_float16_would_be_infinite():
    assert torch.tensor(0.9999).half().logit().isinf()
    assert inverse_sigmoid(torch.tensor(0.9999)).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distillation_losses_compute_in_float32(dtype: torch.dtype):
    regions = teacher_regions((4, 4))
    features = (10 * torch.randn(2, 4, 16)).to(dtype)
    valid = regions.valid
    for loss in (
        semantic_bce_loss(features, regions.embeddings, valid, scale=20.0),
        relational_loss(features, regions.embeddings, valid, temperature=0.2),
    ):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    wide = features.double()
    assert relational_loss(wide, regions.embeddings, valid, temperature=0.2).dtype == torch.float64
