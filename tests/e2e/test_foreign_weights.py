"""Own words on own pictures with weights in the released layout: `convert`, then `predict`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_student import shake
from unit.test_inference_conversion import run_convert
from unit.test_inference_convert import as_opera, make_student

from pipeline.served_page import PageRequest, open_page
from tests.e2e.commands import exit_code

TEACHER_DIM = 128
"""Of the shipped small CLIP."""
WORDS = ("-c", "hammer, traffic light", "--teacher", "pictograms")


def convert(monkeypatch, out: str, *, text_dim: int) -> None:
    torch.manual_seed(0)
    released = make_student(neck_bias=False, text_dim=text_dim)
    shake(released)
    torch.save({"state_dict": as_opera(released)}, "released.pth")
    sizes = ("--set", "student.num_queries=12", "--set", "data.image_size=128")
    assert run_convert(monkeypatch, "released.pth", out, *sizes) == 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch, capsys) -> Path:
    monkeypatch.chdir(tmp_path)
    convert(monkeypatch, "o.safetensors", text_dim=TEACHER_DIM)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    capsys.readouterr()
    return tmp_path


def test_words_and_a_vocabulary_of_them_find_the_same(place: Path, monkeypatch, capsys):
    Path("names.txt").write_text("hammer\ntraffic light\n")
    build = ("vocab", "build", "names.txt", "-o", "own.vocab", "--teacher", "pictograms")
    assert exit_code(monkeypatch, *build) == 0
    found = []
    for number, said in enumerate((WORDS, ("--vocab", "own.vocab"))):
        common = ("predict", "photo.png", "--model", "o.safetensors", "--threshold", "0")
        out = f"found{number}"
        assert exit_code(monkeypatch, *common, *said, "--out", out) == 0, capsys.readouterr().err
        found.append(json.loads(Path(out, "predictions.json").read_text()))
    assert found[0] == found[1]
    assert len(found[0]["annotations"]) == 12 * 2
    parts = open_page(
        PageRequest(
            (Path("o.safetensors"),), vocabulary=Path("own.vocab"), teacher="pictograms",
            device="cpu",
        )
    )  # fmt: skip
    assert not parts.words_problem
    assert parts.detector.vocabulary.names == ("hammer", "traffic light")


def test_without_its_teacher_both_ways_are_named(place: Path, monkeypatch, capsys):
    common = ("predict", "photo.png", "--model", "o.safetensors")
    assert exit_code(monkeypatch, *common, *WORDS[:2]) == 4
    error = capsys.readouterr().err
    assert "brings no vocabulary" in error
    assert "(--vocab FILE" in error
    assert "(-c WORDS --teacher SPEC)" in error
    assert len(error.strip().splitlines()) == 1


def test_a_teacher_of_another_width_is_refused(place: Path, monkeypatch, capsys):
    convert(monkeypatch, "narrow.safetensors", text_dim=16)
    capsys.readouterr()
    assert (
        exit_code(monkeypatch, "predict", "photo.png", "--model", "narrow.safetensors", *WORDS) == 4
    )
    error = capsys.readouterr().err
    assert "text embeddings of 16 numbers, these have 128" in error
    assert len(error.strip().splitlines()) == 1
