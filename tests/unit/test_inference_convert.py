"""Importers: each layout fabricated from a student by a table of its own, and carried back."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from dkdetr.errors import CorruptArtefactError, DataError, MismatchError
from dkdetr.experiment_file import config_from_dict
from dkdetr.inference.convert import convert, read_tensors
from dkdetr.student.build import build_student
from dkdetr.student.detector import DKDETR

LAYERS = 2
TEXT_DIM = 16


def make_student(
    *,
    neck_bias: bool,
    norm: str = "batch",
    embed_dim: int = 32,
    mask_head: bool = False,
    text_dim: int = TEXT_DIM,
) -> DKDETR:
    config = config_from_dict(
        {
            "name": "small",
            "student": {
                "backbone": {"weights": "random", "norm": norm, "frozen_stages": 0},
                "neck_bias": neck_bias,
                "embed_dim": embed_dim,
                "num_heads": 4,
                "num_points": 2,
                "ffn_dim": 48,
                "num_encoder_layers": LAYERS,
                "num_decoder_layers": LAYERS,
                "mask_head": mask_head,
            },
        }
    )
    return build_student(config, text_dim=text_dim)


def scramble(student: DKDETR, seed: int) -> DKDETR:
    generator = torch.Generator().manual_seed(seed)
    for tensor in student.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return student


@pytest.fixture(scope="module")
def with_bias() -> DKDETR:
    return scramble(make_student(neck_bias=True, norm="frozen"), 1)


@pytest.fixture(scope="module")
def without_bias() -> DKDETR:
    return scramble(make_student(neck_bias=False), 2)


class Copier:
    """Writes parts of a student's state under other names."""

    def __init__(self, student: DKDETR) -> None:
        self.ours = student.state_dict()
        self.theirs: dict[str, Tensor] = {}

    def part(self, ours: str, theirs: str) -> None:
        found = [key for key in self.ours if key.startswith(f"{ours}.") or key == ours]
        assert found, ours
        for key in found:
            self.theirs[theirs + key.removeprefix(ours)] = self.ours[key].clone()

    def backbone(self, prefix: str) -> None:
        self.part("trunk.backbone.stem.0", f"{prefix}conv1")
        self.part("trunk.backbone.stem.1", f"{prefix}bn1")
        for stage in range(4):
            self.part(f"trunk.backbone.stages.{stage}", f"{prefix}layer{stage + 1}")

    def first_stage_classes(self, theirs: str, num_classes: int) -> None:
        weight = self.ours["trunk.query_selection.objectness.weight"]
        bias = self.ours["trunk.query_selection.objectness.bias"]
        noise = torch.randn(num_classes - 1, weight.shape[1])
        self.theirs[f"{theirs}.weight"] = torch.cat((weight, noise))
        self.theirs[f"{theirs}.bias"] = torch.cat((bias, torch.randn(num_classes - 1)))


def as_original(student: DKDETR) -> dict[str, Tensor]:
    copy = Copier(student)
    copy.backbone("backbone.0.body.")
    for level in range(3):
        copy.part(f"trunk.neck.lateral.{level}", f"input_proj.{level}")
    copy.part("trunk.neck.extra.0", "input_proj.3")
    copy.part("trunk.level_embeddings", "transformer.level_embed")
    for i in range(LAYERS):
        theirs, ours = f"transformer.encoder.layers.{i}", f"trunk.encoder.layers.{i}"
        copy.part(f"{ours}.self_attention", f"{theirs}.self_attn")
        copy.part(f"{ours}.norm", f"{theirs}.norm1")
        copy.part(f"{ours}.feed_forward.linear1", f"{theirs}.linear1")
        copy.part(f"{ours}.feed_forward.linear2", f"{theirs}.linear2")
        copy.part(f"{ours}.feed_forward.norm", f"{theirs}.norm2")
        theirs, ours = f"transformer.decoder.layers.{i}", f"decoder.layers.{i}"
        copy.part(f"{ours}.self_attention", f"{theirs}.self_attn")
        copy.part(f"{ours}.cross_attention", f"{theirs}.cross_attn")
        copy.part(f"{ours}.cross_norm", f"{theirs}.norm1")
        copy.part(f"{ours}.self_norm", f"{theirs}.norm2")
        copy.part(f"{ours}.feed_forward.norm", f"{theirs}.norm3")
        copy.part(f"{ours}.feed_forward.linear1", f"{theirs}.linear1")
        copy.part(f"{ours}.feed_forward.linear2", f"{theirs}.linear2")
    copy.part("trunk.query_selection.projection", "transformer.enc_output")
    copy.part("trunk.query_selection.norm", "transformer.enc_output_norm")
    copy.part("anchor_projection", "transformer.pos_trans")
    copy.part("anchor_norm", "transformer.pos_trans_norm")
    heads = [f"decoder.box_heads.{i}" for i in range(LAYERS)] + ["trunk.query_selection.box_head"]
    for prefix in ("", "transformer.decoder."):  # the file holds every head twice
        for i, head in enumerate(heads):
            for part in range(3):
                copy.part(f"{head}.linear{part + 1}", f"{prefix}bbox_embed.{i}.layers.{part}")
        for i in range(LAYERS):
            copy.theirs[f"{prefix}class_embed.{i}.weight"] = torch.randn(91, 32)
            copy.theirs[f"{prefix}class_embed.{i}.bias"] = torch.randn(91)
        copy.first_stage_classes(f"{prefix}class_embed.{LAYERS}", 91)
    return copy.theirs


def as_opera(student: DKDETR) -> dict[str, Tensor]:
    copy = Copier(student)
    copy.backbone("backbone.")
    for level in range(3):
        copy.part(f"trunk.neck.lateral.{level}.0", f"neck.convs.{level}.conv")
        copy.part(f"trunk.neck.lateral.{level}.1", f"neck.convs.{level}.gn")
    copy.part("trunk.neck.extra.0.0", "neck.extra_convs.0.conv")
    copy.part("trunk.neck.extra.0.1", "neck.extra_convs.0.gn")
    head = "bbox_head.transformer"
    copy.part("trunk.level_embeddings", f"{head}.level_embeds")
    for i in range(LAYERS):
        theirs, ours = f"{head}.encoder.layers.{i}", f"trunk.encoder.layers.{i}"
        copy.part(f"{ours}.self_attention", f"{theirs}.attentions.0")
        copy.part(f"{ours}.norm", f"{theirs}.norms.0")
        copy.part(f"{ours}.feed_forward.linear1", f"{theirs}.ffns.0.layers.0.0")
        copy.part(f"{ours}.feed_forward.linear2", f"{theirs}.ffns.0.layers.1")
        copy.part(f"{ours}.feed_forward.norm", f"{theirs}.norms.1")
        theirs, ours = f"{head}.decoder.layers.{i}", f"decoder.layers.{i}"
        copy.part(f"{ours}.self_attention", f"{theirs}.attentions.0.attn")
        copy.part(f"{ours}.self_norm", f"{theirs}.norms.0")
        copy.part(f"{ours}.cross_attention", f"{theirs}.attentions.1")
        copy.part(f"{ours}.cross_norm", f"{theirs}.norms.1")
        copy.part(f"{ours}.feed_forward.linear1", f"{theirs}.ffns.0.layers.0.0")
        copy.part(f"{ours}.feed_forward.linear2", f"{theirs}.ffns.0.layers.1")
        copy.part(f"{ours}.feed_forward.norm", f"{theirs}.norms.2")
        copy.part(f"classifiers.{i}.projection", f"bbox_head.cls_branches.{i}")
    copy.part("trunk.query_selection.projection", f"{head}.enc_output")
    copy.part("trunk.query_selection.norm", f"{head}.enc_output_norm")
    copy.part("anchor_projection", f"{head}.pos_trans")
    copy.part("anchor_norm", f"{head}.pos_trans_norm")
    copy.first_stage_classes(f"bbox_head.cls_branches.{LAYERS}", 1203)
    heads = [f"decoder.box_heads.{i}" for i in range(LAYERS)] + ["trunk.query_selection.box_head"]
    for i, box_head in enumerate(heads):
        for part in range(3):
            theirs = f"bbox_head.reg_branches.{i}.{2 * part}"
            copy.part(f"{box_head}.linear{part + 1}", theirs)
    if student.mask_head is not None:
        theirs, ours = f"{head}.seg_encoder.layers.0", "mask_head.encoder.layers.0"
        copy.part(f"{ours}.self_attention", f"{theirs}.attentions.0")
        copy.part(f"{ours}.norm", f"{theirs}.norms.0")
        copy.part(f"{ours}.feed_forward.linear1", f"{theirs}.ffns.0.layers.0.0")
        copy.part(f"{ours}.feed_forward.linear2", f"{theirs}.ffns.0.layers.1")
        copy.part(f"{ours}.feed_forward.norm", f"{theirs}.norms.1")
        copy.part("mask_head.projection", f"{head}.mask_trans")
        copy.part("mask_head.norm", f"{head}.mask_trans_norm")
        for i in range(LAYERS):
            for part in range(3):
                copy.part(f"mask_head.linear{part + 1}", f"bbox_head.seg_branches.{i}.{2 * part}")
    copy.theirs["text_encoder.text_feat"] = torch.zeros(1203, TEXT_DIM)
    return copy.theirs


def assert_carried(report: Any, student: DKDETR, source: DKDETR) -> None:
    expected = source.state_dict()
    state = student.state_dict()
    assert set(report.used) | set(report.missing) == set(state)
    for name in report.used:
        assert torch.equal(state[name], expected[name]), name


def test_original_round_trip(tmp_path: Path, with_bias: DKDETR):
    path = tmp_path / "r50_deformable_detr.pth"
    notes = {"epoch": 49, "args": argparse.Namespace(lr=2e-4), "optimizer": {"state": {}}}
    torch.save({"model": as_original(with_bias), **notes}, path)
    student = make_student(neck_bias=True, norm="frozen")
    report = convert(path, student, protocol="coco")
    assert report.layout == "deformable-detr"
    assert_carried(report, student, with_bias)
    assert {name.split(".")[0] for name in report.missing} == {"kd_content", "classifiers"}
    reasons = {why.split(" '")[0] for why in report.ignored.values()}
    assert reasons == {"a copy of", "a classifier of fixed classes; ours compares with text"}


def test_opera_round_trip(tmp_path: Path, without_bias: DKDETR):
    path = tmp_path / "dkdetr_lvis.pth"
    foreign = as_opera(without_bias)
    torch.save({"meta": {"epoch": 70}, "state_dict": foreign}, path)
    student = make_student(neck_bias=False)
    report = convert(path, student, protocol="lvis")
    assert report.layout == "opera"
    assert report.warnings == ()
    assert_carried(report, student, without_bias)
    assert report.missing == ("kd_content",)
    assert {key: why.split(";")[0].split(",")[0] for key, why in report.ignored.items()} == {
        "text_encoder.text_feat": "a text bank",
    }
    assert report.as_json()["layout"] == "opera"


def test_opera_into_a_neck_with_biases_gives_zero_biases(tmp_path: Path, without_bias: DKDETR):
    torch.save({"state_dict": as_opera(without_bias)}, tmp_path / "dkdetr.pth")
    student = make_student(neck_bias=True)
    report = convert(tmp_path / "dkdetr.pth", student, protocol="lvis")
    bias = student.state_dict()["trunk.neck.lateral.0.0.bias"]
    assert not bias.any()
    assert "trunk.neck.lateral.0.0.bias" not in report.used


def test_a_neck_without_biases_cannot_take_them(tmp_path: Path, with_bias: DKDETR):
    torch.save({"model": as_original(with_bias)}, tmp_path / "detr.pth")
    with pytest.raises(MismatchError, match=r"student\.neck_bias=true"):
        convert(tmp_path / "detr.pth", make_student(neck_bias=False), protocol="coco")


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_resnet50_of_torchvision_and_with_a_prefix(
    tmp_path: Path, prefix: str, without_bias: DKDETR
):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = torchvision.models.resnet50(weights=None).eval()
    save_file({prefix + k: v for k, v in trunk.state_dict().items()}, tmp_path / "r50.safetensors")
    student = make_student(neck_bias=False).eval()
    before = student.state_dict()["trunk.neck.lateral.0.0.weight"].clone()
    report = convert(tmp_path / "r50.safetensors", student, protocol="ovcoco")
    assert report.layout == "resnet50"
    assert set(report.ignored.values()) == {"ImageNet's classifier"}
    assert torch.equal(student.state_dict()["trunk.neck.lateral.0.0.weight"], before)
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    maps = student.trunk.backbone.double()(pixels)
    trunk.double()
    deepest = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(trunk.maxpool(
        trunk.relu(trunk.bn1(trunk.conv1(pixels))))))))  # fmt: skip
    torch.testing.assert_close(maps[-1], deepest)


@pytest.mark.parametrize("layout", ["original", "opera"])
def test_detectors_that_saw_novel_boxes_are_refused(
    tmp_path: Path, layout: str, with_bias: DKDETR, without_bias: DKDETR
):
    original = layout == "original"
    state = as_original(with_bias) if original else as_opera(without_bias)
    torch.save({"model": state}, tmp_path / "detr.pth")
    student = make_student(neck_bias=original, norm="frozen" if original else "batch")
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(DataError, match="OV-COCO") as refused:
        convert(tmp_path / "detr.pth", student, protocol="ovcoco")
    assert refused.value.exit_code == 3
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    report = convert(tmp_path / "detr.pth", student, protocol="lvis")
    assert len(report.warnings) == int(original)


def test_other_sizes_are_named_and_leave_the_student_alone(tmp_path: Path, without_bias: DKDETR):
    torch.save({"state_dict": as_opera(without_bias)}, tmp_path / "dkdetr.pth")
    student = make_student(neck_bias=False, embed_dim=64)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(MismatchError, match=r"there, .* here") as refused:
        convert(tmp_path / "dkdetr.pth", student, protocol="lvis")
    assert refused.value.exit_code == 4
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_a_detector_of_one_stage_is_another_model(tmp_path: Path, with_bias: DKDETR):
    both = rf"enc_output|pos_trans|(?:class|bbox)_embed\.{LAYERS}\."
    one_stage = {k: v for k, v in as_original(with_bias).items() if not re.search(both, k)}
    one_stage["query_embed.weight"] = torch.zeros(300, 64)
    torch.save({"model": one_stage}, tmp_path / "detr.pth")
    with pytest.raises(MismatchError, match=r"one stage.*two-stage one with box ref") as refused:
        convert(tmp_path / "detr.pth", make_student(neck_bias=True, norm="frozen"), protocol="coco")
    assert refused.value.exit_code == 4


def test_a_detector_that_lacks_tensors_of_its_own_is_damaged(tmp_path: Path, with_bias: DKDETR):
    damaged = {k: v for k, v in as_original(with_bias).items() if "pos_trans" not in k}
    torch.save({"model": damaged}, tmp_path / "detr.pth")
    with pytest.raises(CorruptArtefactError, match="two-stage") as refused:
        convert(tmp_path / "detr.pth", make_student(neck_bias=True, norm="frozen"), protocol="coco")
    assert refused.value.exit_code == 5


class Intruder:
    """Runs a function of its own choice where a file is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_files_that_are_no_checkpoint(tmp_path: Path):
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint at all")
    (tmp_path / "noise.safetensors").write_bytes(b"nor this")
    torch.save({"weights": {"a": 1}}, tmp_path / "empty.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save(
        {"model": {"w": torch.zeros(1)}, "x": Intruder(tmp_path / "ran")}, tmp_path / "evil.pth"
    )
    for name in ("noise.pth", "noise.safetensors", "empty.pth", "list.pth", "evil.pth"):
        with pytest.raises(CorruptArtefactError, match="is no checkpoint") as refused:
            read_tensors(tmp_path / name)
        assert refused.value.exit_code == 5
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="no checkpoint at"):
        read_tensors(tmp_path / "absent.pth")


def test_two_copies_that_differ_are_refused(tmp_path: Path, with_bias: DKDETR):
    foreign = as_original(with_bias)
    foreign["transformer.decoder.bbox_embed.0.layers.0.bias"][0] += 1
    torch.save({"model": foreign}, tmp_path / "detr.pth")
    student = make_student(neck_bias=True, norm="frozen")
    with pytest.raises(CorruptArtefactError, match="copies of one tensor"):
        convert(tmp_path / "detr.pth", student, protocol="coco")


def test_unknown_names_are_refused(tmp_path: Path):
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CorruptArtefactError, match=r"none of the layouts.*encoder\.weight"):
        convert(tmp_path / "other.pth", make_student(neck_bias=False), protocol="coco")
