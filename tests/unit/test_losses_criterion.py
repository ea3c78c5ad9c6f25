"""Focal and box losses by hand; the criterion's weights, normalisers and empty cases."""

import math
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

from dkdetr.losses.alignment import AlignedOutput
from dkdetr.losses.criterion import Criterion, Normalisers
from dkdetr.losses.detection import box_giou_loss, box_l1_loss, focal_loss
from dkdetr.losses.distillation import distillation_statistics
from dkdetr.structures import EncoderOutput, QueryOutput, StudentOutput, Targets


def test_focal_by_hand():
    logits = torch.tensor([0.0, 0.0, math.log(3.0)], dtype=torch.float64)
    wanted = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    # p = 1/2 wanted, 1/2 not wanted, 3/4 not wanted.
    terms = [
        0.25 * 0.5**2 * math.log(2),
        0.75 * 0.5**2 * math.log(2),
        0.75 * 0.75**2 * math.log(4),
    ]
    loss = focal_loss(logits, wanted, alpha=0.25, gamma=2)
    assert loss.item() == pytest.approx(sum(terms), rel=1e-12)
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    weighted = focal_loss(logits, wanted, alpha=0.25, gamma=2, weights=weights)
    assert weighted.item() == pytest.approx(terms[0] + 2 * terms[2], rel=1e-12)


def test_focal_is_finite_far_out():
    logits = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0.0, 1.0, 1.0, 0.0]), alpha=0.25, gamma=2)
    loss.backward()
    assert loss.item() == pytest.approx(200.0)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_box_losses_by_hand():
    boxes = torch.tensor([[0.6, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.4]])
    wanted = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    assert box_l1_loss(boxes, wanted).item() == pytest.approx(0.1 + 0.2)
    assert box_giou_loss(boxes, wanted).item() == pytest.approx((1 - 1 / 3) + (1 - 1 / 2))


def hand_made_output() -> StudentOutput:
    """Two queries, one class, one layer, two tokens of which the second is not valid."""
    boxes = torch.tensor([[[0.6, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    return StudentOutput(
        detection=QueryOutput(torch.zeros(1, 1, 2, 4), boxes[None]),
        logits=torch.zeros(1, 1, 2, 1),
        encoder=EncoderOutput(
            objectness_logits=torch.zeros(1, 2),
            boxes_cxcywh=boxes,
            valid=torch.tensor([[True, False]]),
        ),
        anchors_cxcywh=boxes,
        anchor_objectness=torch.zeros(1, 2),
        distillation=None,
    )


@pytest.mark.parametrize("encoder_tokens", ["all", "valid"])
def test_criterion_by_hand(encoder_tokens: str):
    wanted = [Targets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))]
    config = tiny_config()
    normalisers = Normalisers(num_boxes=torch.tensor(4.0), num_regions=torch.tensor(1.0))
    detection = replace(config.detection, encoder_tokens=encoder_tokens)
    criterion = Criterion(detection, config.kd)
    parts = criterion(hand_made_output(), wanted, None, normalisers).parts
    yes, no = 0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)
    expected = {
        "class": 2 * (yes + no) / 4,
        "bbox": 5 * 0.1 / 4,
        "giou": 2 * (2 / 3) / 4,
        # The token that is not valid is background, or says nothing.
        "class.encoder": 2 * (yes + (no if encoder_tokens == "all" else 0)) / 4,
        "bbox.encoder": 5 * 0.1 / 4,
        "giou.encoder": 2 * (2 / 3) / 4,
    }
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected)


def tiny_output(filled: tuple[int, ...] = (3, 2)):
    regions = teacher_regions(filled)
    return tiny_student()(image_batch(), text_embeddings(), regions), regions


def test_total_is_the_sum_of_its_parts_and_every_layer_is_judged():
    output, regions = tiny_output()
    report = loss_of(output, targets(), regions)
    torch.testing.assert_close(report.total, sum(report.parts.values()))
    names = {f"{kind}{layer}" for kind in ("class", "bbox", "giou") for layer in ("", ".0")}
    names |= {"class.encoder", "bbox.encoder", "giou.encoder", "skd", "rkd_image", "rkd_batch"}
    assert set(report.parts) == names


def test_weights_and_normalisers_scale_their_own_parts():
    output, regions = tiny_output()
    config = tiny_config()
    plain = loss_of(output, targets(), regions, config).parts
    kd = replace(
        config.kd,
        skd=replace(config.kd.skd, weight=0.3),
        rkd=replace(config.kd.rkd, weight=0.5, relations=("batch",)),
    )
    doubled = Normalisers(num_boxes=torch.tensor(6.0), num_regions=torch.tensor(5.0))
    parts = Criterion(config.detection, kd)(output, targets(), regions, doubled).parts
    torch.testing.assert_close(parts["skd"], 3 * plain["skd"])
    torch.testing.assert_close(parts["rkd_batch"], plain["rkd_batch"] / 4)
    assert "rkd_image" not in parts
    torch.testing.assert_close(parts["class"], plain["class"] / 2)  # 6 instead of 3 boxes
    off = replace(kd, skd=replace(kd.skd, weight=0.0), rkd=replace(kd.rkd, weight=0.0))
    silent = Criterion(config.detection, off)(output, targets(), regions, doubled).parts
    assert not any(name.startswith(("skd", "rkd")) for name in silent)


def test_all_layers_may_distil():
    output, regions = tiny_output()
    config = tiny_config()
    every = replace(config, kd=replace(config.kd, layers="all"))
    assert output.distillation is not None
    both = loss_of(output, targets(), regions, every).parts["skd"]
    singles = []
    for layer in (0, 1):
        features = output.distillation.features[layer : layer + 1]
        one = replace(output, distillation=QueryOutput(features, features[..., :4]))
        singles.append(loss_of(one, targets(), regions, config).parts["skd"])
    torch.testing.assert_close(both, (singles[0] + singles[1]) / 2)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3)])
@pytest.mark.parametrize("filled", [(0, 0), (1, 0), (0, 4)])
def test_empty_cases_are_finite_and_reach_every_parameter(
    counts: tuple[int, int], filled: tuple[int, int]
):
    student = tiny_student()
    regions = teacher_regions(filled)
    output = student(image_batch(), text_embeddings(), regions)
    report = loss_of(output, targets(counts), regions)
    assert all(part.isfinite() for part in report.parts.values())
    report.total.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if filled == (0, 0):
        assert student.kd_content is not None
        assert not student.kd_content.grad.any()


def test_statistics_by_hand():
    regions = teacher_regions((2, 0))
    refined = boxes_inside(1, 2, 4, seed=9)
    refined[0, 0] = regions.boxes_cxcywh[0]
    features = regions.embeddings[None]
    output = replace(hand_made_output(), distillation=QueryOutput(features, refined))
    shown = distillation_statistics(AlignedOutput(output, regions, torch.tensor(3.0)))
    assert shown["kd_dropped_per_image"].item() == 1.5
    assert shown["kd_regions_per_image"].item() == 1
    assert shown["kd_anchor_giou"].item() == pytest.approx(1)
    cosine = (regions.embeddings[0, 0] * regions.embeddings[0, 1]).sum().item()
    assert shown["kd_margin"].item() == pytest.approx((1 - cosine) / 2, rel=1e-5)
