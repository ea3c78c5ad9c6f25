from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torchvision.ops import box_iou

from dkdetr.config import BackboneConfig, DetectionLossConfig, StudentConfig
from dkdetr.errors import CorruptArtefactError, UsageError
from dkdetr.structures import EncoderOutput, Targets
from dkdetr.student.build import build_trunk
from pipeline.fit_training import proposal_loss
from pipeline.proposal_network import NetworkProposals, load_network, save_network
from pipeline.proposal_sources import parse_proposals
from pipeline.proposals import ProposalRule, RawProposals, SourceImage, apply_rule

SMALL = StudentConfig(
    backbone=BackboneConfig(
        arch="slim_resnet", weights="random", norm="batch", frozen_stages=0, width=8,
        stages=(3, 4), extra_levels=0,
    ),
    embed_dim=32, num_heads=2, ffn_dim=32, num_encoder_layers=1, dropout=0.0,
)  # fmt: skip


def test_rule_clips_drops_the_small_suppresses_and_sorts() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 23, 40], [-5, 30, 60, 60], [50, 10, 58, 30]]
    raw = RawProposals(torch.tensor(boxes), torch.tensor([0.2, 0.8, 0.9, 0.5, np.nan]))
    kept = apply_rule(raw, ProposalRule(keep=10), height=40, width=50)
    assert kept.boxes_xyxy.tolist() == [[0, 0, 10, 9], [0, 30, 50, 40]]
    assert kept.objectness.tolist() == pytest.approx([0.8, 0.5])
    assert len(apply_rule(raw, ProposalRule(keep=1), height=40, width=50).boxes_xyxy) == 1


@settings(max_examples=40, deadline=None)
@given(
    boxes=arrays.arrays(np.float32, (60, 4), elements=st.floats(-20, 80, width=32)),
    seed=st.integers(0, 100),
)
def test_rule_is_the_plain_one_for_any_boxes(boxes: np.ndarray, seed: int) -> None:
    scores = np.random.default_rng(seed).random(60, dtype=np.float32).round(1)
    scores[::7] = -np.inf
    rule = ProposalRule(keep=5, nms_iou=0.6, min_side=3.0)
    raw = RawProposals(torch.from_numpy(boxes), torch.from_numpy(scores))
    kept = apply_rule(raw, rule, height=50, width=60)
    order = plainly_kept(boxes, scores, rule, height=50, width=60)
    assert kept.boxes_xyxy.tolist() == boxes.clip(0, [60, 50, 60, 50])[order].tolist()
    assert kept.objectness.tolist() == scores[order].tolist()


def plainly_kept(
    boxes: np.ndarray, scores: np.ndarray, rule: ProposalRule, *, height: int, width: int
) -> list[int]:
    """One box at a time: by objectness, then by place; not if it is small or covered."""
    clipped = torch.from_numpy(boxes.clip(0, [width, height, width, height]))
    order = sorted(range(len(boxes)), key=lambda place: (-scores[place], place))
    sides = (clipped[:, 2:] - clipped[:, :2]).amin(dim=1)
    usable = [place for place in order if np.isfinite(scores[place]) and sides[place] >= 3]
    kept: list[int] = []
    for place in usable[: 5 * rule.keep]:
        overlap = box_iou(clipped[place][None], clipped[kept]) if kept else torch.zeros(1)
        if overlap.max() <= rule.nms_iou:
            kept.append(place)
    return kept[: rule.keep]


def test_forms_of_the_option() -> None:
    assert parse_proposals("fit").path == ""
    assert parse_proposals("fit:cache/lvis").path == "cache/lvis"
    assert parse_proposals("student:runs/a").kind == "student"
    for wrong in ("student", "file:", "grid", ""):
        with pytest.raises(UsageError, match="none of fit"):
            parse_proposals(wrong)


def test_network_gives_boxes_in_pixels_and_its_file_gives_it_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = build_trunk(SMALL).eval()
    path = tmp_path / "network.safetensors"
    save_network(path, trunk, SMALL, {"image_size": 64, "seen": {}})
    loaded, facts = load_network(path)
    assert facts["image_size"] == 64
    sources = [
        NetworkProposals(
            each, image_size=64, batch_size=3, source="fit", names=("cat",), details={}
        )
        for each in (trunk, loaded)
    ]
    assert sources[0].identity == sources[1].identity
    pictures = [
        SourceImage(n, np.random.default_rng(n).integers(0, 255, (40, 90, 3), dtype=np.uint8))
        for n in range(4)
    ]
    first, second = sources[0].propose(pictures), sources[1].propose(pictures)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours.boxes_xyxy, theirs.boxes_xyxy)
        boxes = ours.boxes_xyxy[ours.objectness.isfinite()]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert (centre > 0).all()
        assert (centre < torch.tensor([90, 40])).all()
        assert centre[:, 0].max() > 60  # the whole width is covered: no padding is counted
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CorruptArtefactError, match="network"):
        load_network(path)


def _encoder(boxes: list[list[float]], logits: list[float]) -> EncoderOutput:
    return EncoderOutput(
        objectness_logits=torch.tensor([logits], requires_grad=True),
        boxes_cxcywh=torch.tensor([boxes], requires_grad=True),
        valid=torch.ones(1, len(boxes), dtype=torch.bool),
    )


def test_an_object_teaches_one_token_and_the_others_are_background() -> None:
    # Tokens 0 and 1 lie on the object, 1 exactly; token 2 is elsewhere.
    boxes = [[0.5, 0.5, 0.3, 0.4], [0.5, 0.5, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]]
    encoder = _encoder(boxes, [0.0, 0.0, 0.0])
    target = Targets(torch.tensor([7]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))
    loss = proposal_loss(encoder, [target], DetectionLossConfig(), num_objects=torch.tensor(1.0))
    # Focal at p = 1/2: alpha 1/4 log 2 for the object's token, 3/4 1/4 log 2 for each other.
    focal = (0.25 + 2 * 0.75) * 0.25 * float(np.log(2))
    assert loss.item() == pytest.approx(2 * focal, abs=1e-5)
    signs = torch.autograd.grad(loss, encoder.objectness_logits)[0].sign()[0]
    assert signs.tolist() == [1, -1, 1]  # a step against it raises token 1 alone


def test_a_picture_without_objects_still_has_a_loss_with_a_gradient() -> None:
    encoder = _encoder([[0.5, 0.5, 0.4, 0.4]], [0.0])
    empty = Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    none = torch.tensor(0.0)
    proposal_loss(encoder, [empty], DetectionLossConfig(), num_objects=none).backward()
    assert encoder.objectness_logits.grad is not None
    assert encoder.boxes_cxcywh.grad is not None
