"""opera's mask head: carried back whole, left with a reason, refused in part."""

from pathlib import Path

import pytest
import torch

from dkdetr.errors import CorruptArtefactError
from dkdetr.student.detector import DKDETR
from tests.unit.test_inference_convert import (
    LAYERS,
    as_opera,
    assert_carried,
    convert,
    make_student,
    scramble,
)


@pytest.fixture(scope="module")
def without_bias() -> DKDETR:
    return scramble(make_student(neck_bias=False), 2)


@pytest.fixture(scope="module")
def segmenter() -> DKDETR:
    return scramble(make_student(neck_bias=False, mask_head=True), 4)


def test_opera_s_mask_head_round_trip(tmp_path: Path, segmenter: DKDETR):
    foreign = as_opera(segmenter)
    # The released model's shapes at width 32: one head, one level, four points; 441 numbers.
    shapes = {
        "transformer.seg_encoder.layers.0.attentions.0.sampling_offsets.weight": (8, 32),
        "transformer.seg_encoder.layers.0.attentions.0.attention_weights.weight": (4, 32),
        "transformer.mask_trans.weight": (8, 32),
        "transformer.mask_trans_norm.weight": (8,),
        "seg_branches.1.4.weight": (441, 32),
        "seg_branches.0.4.bias": (441,),
    }
    for name, shape in shapes.items():
        assert foreign[f"bbox_head.{name}"].shape == shape
    torch.save({"state_dict": foreign}, tmp_path / "dkdetr.pth")
    student = make_student(neck_bias=False, mask_head=True)
    report = convert(tmp_path / "dkdetr.pth", student, protocol="lvis")
    assert_carried(report, student, segmenter)
    assert report.missing == ("kd_content",)
    copies = [key for key, why in report.ignored.items() if why.startswith("a copy of")]
    assert sorted(copies) == sorted(
        f"bbox_head.seg_branches.1.{part}.{kind}" for part in "024" for kind in ("weight", "bias")
    )


def test_a_student_of_boxes_leaves_the_mask_head_and_says_so(tmp_path: Path, segmenter: DKDETR):
    torch.save({"state_dict": as_opera(segmenter)}, tmp_path / "dkdetr.pth")
    student = make_student(neck_bias=False)
    report = convert(tmp_path / "dkdetr.pth", student, protocol="lvis")
    reasons = {key: why for key, why in report.ignored.items() if "text_feat" not in key}
    assert len(reasons) == 16 + 4 + 6 * LAYERS
    assert all("student.mask_head = true" in why for why in reasons.values())


def test_mask_branches_that_differ_are_refused(tmp_path: Path, segmenter: DKDETR):
    foreign = as_opera(segmenter)
    foreign["bbox_head.seg_branches.1.2.bias"][3] += 1
    torch.save({"state_dict": foreign}, tmp_path / "dkdetr.pth")
    student = make_student(neck_bias=False, mask_head=True)
    with pytest.raises(CorruptArtefactError, match=r"seg_branches\.1\.2\.bias.*they differ"):
        convert(tmp_path / "dkdetr.pth", student, protocol="lvis")


def test_a_mask_head_keeps_its_start_where_there_is_none_but_not_in_part(
    tmp_path: Path, without_bias: DKDETR, segmenter: DKDETR
):
    torch.save({"state_dict": as_opera(without_bias)}, tmp_path / "boxes.pth")
    student = make_student(neck_bias=False, mask_head=True)
    report = convert(tmp_path / "boxes.pth", student, protocol="lvis")
    assert {name.split(".")[0] for name in report.missing} == {"kd_content", "mask_head"}
    foreign = as_opera(segmenter)
    del foreign["bbox_head.transformer.mask_trans.bias"]
    torch.save({"state_dict": foreign}, tmp_path / "part.pth")
    with pytest.raises(CorruptArtefactError, match=r"mask_head\.projection\.bias"):
        convert(tmp_path / "part.pth", student, protocol="lvis")
