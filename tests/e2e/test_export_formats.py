"""`dkdetr export` as typed: each format, its words, and what makes no sense."""

import json
from pathlib import Path

import jaxtyping
import numpy as np
import onnxruntime
import pytest
from tiny_student import TEXT_DIM, tiny_config, tiny_student
from typer.testing import CliRunner

import cli
from dkdetr.data.vocabulary import Vocabulary, save_vocabulary
from dkdetr.student_file import StudentFile, load_student_file, save_student_file


def vocabulary(names: tuple[str, ...], teacher: str = "t") -> Vocabulary:
    many = len(names)
    rows = np.eye(many, TEXT_DIM, dtype=np.float32)
    groups = (tuple(range(1, many + 1)), (True,) * many, ("",) * many, ("{}",), teacher)
    return Vocabulary(names, *groups, rows)


@pytest.fixture
def place(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = StudentFile(tiny_student().state_dict(), tiny_config(), vocabulary(("cat", "dog")), {})
    save_student_file(tmp_path / "s.safetensors", file)
    save_vocabulary(vocabulary(("a", "b", "c")), tmp_path / "three.vocab")
    save_vocabulary(vocabulary(("a",), "other"), tmp_path / "other.vocab")
    jaxtyping.config.update("jaxtyping_disable", True)  # while traced, numbers are tensors
    yield tmp_path
    jaxtyping.config.update("jaxtyping_disable", False)


def export(*words: str):
    return CliRunner().invoke(cli.app, ["export", "s.safetensors", *words])


def test_onnx_with_names_of_a_file(place):
    done = export("--format", "onnx", "--vocab", "three.vocab", "--json", "told.json")
    assert done.exit_code == 0, done.stderr
    assert "written: s.onnx; 3 names" in done.stdout
    assert "largest difference to PyTorch in onnxruntime" in done.stdout
    told = json.loads((place / "told.json").read_text())
    assert told["baked_names"] == 3
    assert told["compared"]["boxes"] < 1e-5
    session = onnxruntime.InferenceSession(place / "s.onnx")
    pixels = np.zeros((1, 3, 128, 128), np.float32)
    fed = {"pixels": pixels, "padding_mask": np.zeros((1, 128, 128), bool)}
    assert session.run(["scores"], fed)[0].shape == (1, 12, 3)


def test_least_scores_are_added_to_those_of_the_names(place):
    """In a student file, where `predict` goes by them; in a graph its metadata alone."""
    done = export("--out", "one.safetensors", "--class-threshold", "dog=0.5")
    assert done.exit_code == 0, done.stderr
    assert "goes by least scores: dog 0.5; by 0.3 of other names" in Path("one.md").read_text()
    words = ("--class-threshold", "CAT=0.25", "--out")
    done = CliRunner().invoke(cli.app, ["export", "one.safetensors", *words, "two.safetensors"])
    assert done.exit_code == 0, done.stderr
    least = {"cat": 0.25, "dog": 0.5}
    two = load_student_file(Path("two.safetensors"))
    assert two.vocabulary is not None
    assert two.vocabulary.thresholds == least
    done = CliRunner().invoke(cli.app, ["export", "one.safetensors", *words, "b.onnx", "--bake"])
    assert done.exit_code == 0, done.stderr
    told = onnxruntime.InferenceSession("b.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(told["thresholds"]) == least
    assert json.loads(told["names"]) == ["cat", "dog"]


def test_torchscript_with_the_runs_own_names_and_another_path(place):
    done = export("--format", "torchscript", "--bake", "--out", "deep/graph.pt")
    assert done.exit_code == 0, done.stderr
    assert "2 names" in done.stdout
    assert (place / "deep/graph.pt").is_file()


@pytest.mark.parametrize(
    ("words", "code", "mention"),
    [
        (("--format", "tflite"), 2, "safetensors, onnx, torchscript"),
        (("--out", "student"), 2, ".safetensors (safetensors), .onnx (onnx), .pt (torchscript)"),
        (("--out", "student.v2"), 2, "'student.v2': the file's name ends in .safetensors"),
        (("--format", "onnx", "--out", "s.pt"), 2, "'s.pt': the file's name ends in .onnx (onnx)"),
        (("--format", "safetensors", "--out", "s.onnx"), 2, "ends in .safetensors (safetensors)"),
        (("--format", "onnx", "--class-threshold", "cat=0.5"), 2, "by --bake or --vocab"),
        (
            ("--class-threshold", "cow=0.5", "--out", "t.safetensors"),
            2,
            "'cow', which is none of the names",
        ),
        (("--bake",), 2, "fix the names of onnx and torchscript"),
        (("--format", "onnx", "--bake", "--vocab", "three.vocab"), 2, "one of them"),
        (("--format", "onnx", "--vocab", "other.vocab"), 4, "nothing in common"),
        (("--format", "onnx", "--vocab", "absent"), 3, "no vocabulary file absent"),
    ],
)
def test_what_makes_no_sense(place, words, code, mention):
    done = export(*words)
    assert done.exit_code == code
    assert mention in done.stderr
    written = {each.name for each in place.iterdir()}
    assert written == {"s.safetensors", "three.vocab", "other.vocab"}


def test_the_name_of_the_file_says_the_format(place):
    done = export("--out", "student.onnx")
    assert done.exit_code == 0, done.stderr
    graph = onnxruntime.InferenceSession(place / "student.onnx")
    assert {each.name for each in graph.get_inputs()} >= {"pixels", "text_embeddings"}
    done = export("--out", "deep/student.safetensors")
    assert done.exit_code == 0, done.stderr
    assert load_student_file(place / "deep/student.safetensors").vocabulary is not None
