"""`dkdetr convert`: a foreign checkpoint becomes a student file with a report of every tensor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from unit.data_world import coco_document, write_world
from unit.test_inference_convert import (
    LAYERS,
    TEXT_DIM,
    as_opera,
    as_original,
    make_student,
    scramble,
)

from dkdetr.data.splits import load_split
from dkdetr.data.vocabulary import Vocabulary, save_vocabulary
from dkdetr.engine.initial_weights import start_from_file
from dkdetr.engine.subject import load_subject
from dkdetr.errors import DataError, MismatchError
from dkdetr.inference.convert import read_tensors
from dkdetr.student_file import load_student_file
from tests.e2e.commands import exit_code

SIZES = (
    "student.backbone.weights=random", "student.embed_dim=32", "student.num_heads=4",
    "student.num_points=2", "student.ffn_dim=48", f"student.num_encoder_layers={LAYERS}",
    f"student.num_decoder_layers={LAYERS}", "student.backbone.norm=batch",
)  # fmt: skip


def run_convert(monkeypatch, *words: object) -> int:
    sizes = [word for size in SIZES for word in ("--set", size)]
    return exit_code(monkeypatch, "convert", *words, *sizes)


@pytest.fixture
def opera(tmp_path: Path) -> Path:
    path = tmp_path / "dkdetr_lvis.pth"
    torch.save({"state_dict": as_opera(scramble(make_student(neck_bias=False), 2))}, path)
    return path


def write_vocabulary(path: Path, embed_dim: int = TEXT_DIM) -> None:
    rows = np.eye(3, embed_dim, dtype=np.float32)
    vocabulary = Vocabulary(
        ("a", "b", "c"), (1, 2, 3), (True,) * 3, ("",) * 3, ("{}",), "ViT-B-32", rows
    )
    save_vocabulary(vocabulary, path)


def test_a_released_student_with_its_vocabulary_can_be_scored(
    tmp_path: Path, monkeypatch, capsys, opera: Path
):
    write_vocabulary(tmp_path / "bank.vocab")
    out = tmp_path / "student.safetensors"
    code = run_convert(
        monkeypatch, opera, out, "--vocab", tmp_path / "bank.vocab", "--json", tmp_path / "r.json"
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "layout: opera" in printed
    assert "setting from the file: student.neck_bias = False" in printed
    assert "ignored: 1 (a text bank" in printed
    report = json.loads((tmp_path / "r.json").read_text())
    held = set(report["used"].values()) | report["ignored"].keys()
    assert held == read_tensors(opera).keys()
    subject = load_subject(out)
    expected = scramble(make_student(neck_bias=False), 2).state_dict()
    state = subject.student.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in report["used"])
    assert subject.vocabulary.names == ("a", "b", "c")
    assert subject.folder == tmp_path / "student"


def test_what_only_training_uses_need_not_be_in_a_checkpoint(
    tmp_path: Path, monkeypatch, capsys, opera: Path
):
    """Options that give our student parts which no other project has do not make it foreign."""
    write_vocabulary(tmp_path / "bank.vocab")
    out = tmp_path / "student.safetensors"
    code = run_convert(
        monkeypatch, opera, out, "--vocab", tmp_path / "bank.vocab", "--set", "student.denoising=2",
        "--set", "kd.skd.loss=siglip_bias",
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    assert "keeps its start: kd_calibration.log_scale (1 tensors)" in printed
    assert "keeps its start: denoising_content.weight (1 tensors)" in printed
    subject = load_subject(out)
    assert subject.student.denoising_content is not None


def test_unknown_tensors_are_named(tmp_path: Path, monkeypatch, capsys):
    source = tmp_path / "theirs.pth"
    state = as_opera(scramble(make_student(neck_bias=False), 2))
    extra = {f"bbox_head.kd_queries.{number:02}": torch.zeros(1) for number in range(22)}
    torch.save({"state_dict": {**state, **extra}}, source)
    assert run_convert(monkeypatch, source, tmp_path / "o.safetensors") == 0
    printed = capsys.readouterr().out
    assert "ignored: 22 (unknown)" in printed
    assert "unknown: bbox_head.kd_queries.19\n" in printed
    assert "kd_queries.20" not in printed
    assert "unknown: 2 more (--json FILE has them all)" in printed


def test_a_plain_detector_is_a_start_without_classifiers(tmp_path: Path, monkeypatch, capsys):
    source = tmp_path / "detr.pth"
    torch.save({"model": as_original(scramble(make_student(neck_bias=True), 1))}, source)
    out = tmp_path / "start.safetensors"
    assert run_convert(monkeypatch, source, out) == 0
    printed = capsys.readouterr().out
    assert "setting from the file: student.neck_bias = True" in printed
    assert "keeps its start: classifiers.0 (2 tensors)" in printed
    assert "warning: this detector was trained on COCO boxes" in printed
    file = load_student_file(out)
    assert file.config.student.neck_bias
    assert file.provenance["saw_boxes_of"] == "COCO boxes of all 80 classes"
    assert not any(name.startswith(("classifiers", "kd_")) for name in file.tensors)
    write_vocabulary(tmp_path / "bank.vocab")
    with pytest.raises(MismatchError, match="brings no vocabulary"):
        load_subject(out)
    ovcoco = write_world(tmp_path, coco_document())
    student = make_student(neck_bias=True)
    (told,) = start_from_file(student, out, file, load_split(ovcoco.removeprefix("ov"), tmp_path))
    assert told.startswith("start: ")
    assert told.endswith(": kd_content, classifiers")
    with pytest.raises(DataError, match="has seen COCO boxes") as refused:
        start_from_file(student, out, file, load_split(ovcoco, tmp_path))
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("absent.pth", "o.safetensors"), 3, "no checkpoint at"),
        (("noise.pth", "o.safetensors"), 5, "is no checkpoint"),
        (("dkdetr_lvis.pth", "o.pt"), 2, "ends in .safetensors"),
        (("dkdetr_lvis.pth", "o.safetensors", "--protocol", "ovcoco"), 3, "cannot be scored"),
        (("dkdetr_lvis.pth", "o.safetensors", "--protocol", "voc"), 2, "choose one of"),
        (("dkdetr_lvis.pth", "o.safetensors", "--vocab", "wide.vocab"), 4, "speaks 16"),
    ],
)
def test_refusals_write_nothing(
    tmp_path: Path, monkeypatch, capsys, opera: Path, words, code: int, message: str
):
    monkeypatch.chdir(tmp_path)
    Path("noise.pth").write_bytes(b"no checkpoint")
    write_vocabulary(Path("wide.vocab"), embed_dim=64)
    assert opera.is_file()
    assert run_convert(monkeypatch, *words) == code
    error = capsys.readouterr().err
    assert f"error [{code}]" in error
    assert message in error
    assert not list(tmp_path.glob("o.*"))


def test_a_resnet_becomes_a_file_of_its_backbone(tmp_path: Path, monkeypatch, capsys):
    from safetensors.torch import save_file

    source = {
        name.removeprefix("trunk.backbone."): tensor
        for name, tensor in make_student(neck_bias=False).state_dict().items()
        if name.startswith("trunk.backbone.")
    }
    renamed = {}
    for name, tensor in source.items():
        theirs = name.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.")
        if theirs.startswith("stages."):
            _, number, rest = theirs.split(".", 2)
            theirs = f"layer{int(number) + 1}.{rest}"
        renamed[theirs] = tensor.contiguous()
    save_file(renamed, tmp_path / "r50.safetensors")
    out = tmp_path / "start.safetensors"
    assert run_convert(monkeypatch, tmp_path / "r50.safetensors", out, "--protocol", "ovcoco") == 0
    assert "layout: resnet50" in capsys.readouterr().out
    file = load_student_file(out)
    assert {name.split(".")[1] for name in file.tensors} == {"backbone"}
    assert file.provenance["saw_boxes_of"] is None
