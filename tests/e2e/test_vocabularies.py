"""`dkdetr vocab build|import` as typed, and words of a list in `predict`, with a small CLIP."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_student import save_speaking_student

from dkdetr.data.name_lists import shipped_entries
from dkdetr.data.vocabulary import load_vocabulary
from dkdetr.student_file import load_student_file, save_student_file
from tests.e2e.commands import exit_code


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(monkeypatch, *words: object) -> int:
    return exit_code(monkeypatch, "vocab", "build", *words, "--teacher", "pictograms")


def test_a_shipped_list_keeps_its_data_sets_ids(place, monkeypatch, capsys):
    assert build(monkeypatch, "coco", "-o", "c.vocab", "--prompts", "single") == 0
    built = load_vocabulary(place / "c.vocab")
    assert len(built) == 80
    assert built.category_ids[-1] == 90
    assert build(monkeypatch, "voc-clean", "-o", "v.vocab", "--prompts", "single") == 0
    assert "potted plant" in load_vocabulary(place / "v.vocab").names
    capsys.readouterr()
    assert build(monkeypatch, "nothing", "-o", "n.vocab") == 3
    assert "shipped ones: lvis, coco" in capsys.readouterr().err


def test_ones_own_templates(place, monkeypatch):
    (place / "mine.txt").write_text("a {} on a table.\nmy {}\n", encoding="utf-8")
    (place / "names.txt").write_text("hammer\nsaw\n", encoding="utf-8")
    assert build(monkeypatch, "names.txt", "-o", "a.vocab", "--prompts", "mine.txt") == 0
    assert load_vocabulary(place / "a.vocab").prompts == ("a {} on a table.", "my {}")
    assert build(monkeypatch, "names.txt", "-o", "b.vocab", "--prompts", "single,clip7") == 0
    assert len(load_vocabulary(place / "b.vocab").prompts) == 8


def test_thresholds_of_a_vocabulary(place, monkeypatch, capsys):
    """They are kept, shown, gone by, and give way to what is typed."""
    (place / "names.txt").write_text("hammer\nfire_hydrant\n", encoding="utf-8")
    words = ("names.txt", "-o", "n.vocab", "--prompts", "single", "--class-threshold", "hammer=0")
    assert build(monkeypatch, *words, "--class-threshold", "Fire Hydrant=1") == 0
    assert "least scores: hammer 0, fire_hydrant 1" in capsys.readouterr().out
    assert exit_code(monkeypatch, "vocab", "show", "n.vocab", "--json", "-") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["thresholds"] == {"hammer": 0.0, "fire_hydrant": 1.0}

    vocabulary = load_vocabulary(place / "n.vocab")
    save_speaking_student(place / "s.safetensors", vocabulary)
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(place / "a.png")

    def found(*options: str) -> tuple[set[str], str]:
        """Returns the names, and what was said of the vocabulary's own least scores."""
        words = ("predict", "a.png", "--model", "s.safetensors", "--no-draw", "--json", "-")
        assert exit_code(monkeypatch, *words, *options) == 0
        said = capsys.readouterr()
        _, _, own = said.err.partition("least scores of the vocabulary: ")
        return set(json.loads(said.out)["by_name"]), own.partition("\n")[0]

    for source in ((), ("--vocab", "n.vocab")):  # the student brings it, or the file does
        assert found(*source) == ({"hammer"}, "hammer 0, fire_hydrant 1")
        assert found(*source, "--threshold", "0") == ({"hammer", "fire_hydrant"}, "")
        assert found(*source, "--class-threshold", "hammer=1") == (set(), "fire_hydrant 1")


def test_a_student_files_vocabulary_is_shown_and_other_files_are_not(place, monkeypatch, capsys):
    (place / "names.txt").write_text("hammer\nsaw\n", encoding="utf-8")
    words = ("names.txt", "-o", "n.vocab", "--prompts", "single", "--class-threshold", "saw=0.5")
    assert build(monkeypatch, *words) == 0
    vocabulary = load_vocabulary(place / "n.vocab")
    save_speaking_student(place / "s.safetensors", vocabulary)
    capsys.readouterr()

    def shown(name: str, code: int = 0) -> str:
        assert exit_code(monkeypatch, "vocab", "show", name) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    assert shown("s.safetensors") == shown("n.vocab")
    mute = replace(load_student_file(place / "s.safetensors"), vocabulary=None)
    save_student_file(place / "mute.safetensors", mute)
    assert "brings no vocabulary" in shown("mute.safetensors", 3)
    save_file({"x": torch.zeros(3)}, place / "other.safetensors")
    assert "not a vocabulary file" in shown("other.safetensors", 5)
    data = bytearray((place / "s.safetensors").read_bytes())
    data[-1] ^= 1
    (place / "s.safetensors").write_bytes(data)
    assert "damaged" in shown("s.safetensors", 5)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [("saw=0.5", "none of the names"), ("hammer=2", "0..1"), ("hammer", "NAME=SCORE")],
)
def test_impossible_thresholds_are_told_before_a_teacher_is_loaded(
    place, monkeypatch, capsys, threshold, message
):
    (place / "names.txt").write_text("hammer\n", encoding="utf-8")
    words = ("vocab", "build", "names.txt", "-o", "n.vocab", "--teacher", "absent:absent")
    assert exit_code(monkeypatch, *words, "--class-threshold", threshold) == 2
    assert message in capsys.readouterr().err
    assert not (place / "n.vocab").exists()


@pytest.mark.parametrize("form", ["rows.npy", "columns.npy", "background.pt"])
def test_a_bank_of_another_project(place, monkeypatch, capsys, form):
    rows = np.random.default_rng(0).normal(size=(20, 48)).astype(np.float32) * 7
    if form == "rows.npy":
        np.save(place / form, rows.astype(np.float16))
    elif form == "columns.npy":
        np.save(place / form, rows.T)
    else:
        torch.save(torch.from_numpy(np.concatenate((rows, rows[:1]))), place / form)
    words = ("vocab", "import", form, "--names", "voc", "--teacher", "their CLIP", "-o", "v.vocab")
    if form == "background.pt":
        assert exit_code(monkeypatch, *words) == 2
        assert "--background first or" in capsys.readouterr().err
        words = (*words, "--background", "last")
    assert exit_code(monkeypatch, *words, "--class-threshold", "saw=0.5") == 2
    assert "none of the names" in capsys.readouterr().err
    words = (*words, "--class-threshold", "Cat=0.5")
    assert exit_code(monkeypatch, *words, "--json", "-") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["names"][0] == "aeroplane"
    assert shown["thresholds"] == {"cat": 0.5}
    assert shown["teacher"] == "their CLIP"
    kept = load_vocabulary(place / "v.vocab")
    assert kept.thresholds == {"cat": 0.5}
    taken = kept.embeddings
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(taken, expected, atol=1e-3)


def test_a_bank_that_does_not_fit(place, monkeypatch, capsys):
    np.save(place / "bank.npy", np.ones((7, 9), np.float32))
    words = ("vocab", "import", "bank.npy", "--names", "voc", "--teacher", "t", "-o", "v.vocab")
    assert exit_code(monkeypatch, *words) == 4
    assert "not 20 names" in capsys.readouterr().err
    assert not (place / "v.vocab").exists()


def test_words_of_a_list(place, monkeypatch, capsys):
    (place / "names.txt").write_text("hammer\nsaw\n", encoding="utf-8")
    assert build(monkeypatch, "names.txt", "-o", "n.vocab", "--prompts", "single") == 0
    vocabulary = load_vocabulary(place / "n.vocab")
    save_speaking_student(place / "s.safetensors", vocabulary)
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(place / "a.png")
    common = ("predict", "a.png", "--model", "s.safetensors", "--threshold", "0", "--no-draw")
    for words, ids in (
        ("@voc", [each.category_id for each in shipped_entries("voc")]),
        ("@names.txt", [1, 2]),
    ):
        assert exit_code(monkeypatch, *common, "-c", words) == 0, capsys.readouterr().err
        document = json.loads((place / "predictions/predictions.json").read_text())
        assert [each["id"] for each in document["categories"]] == ids
    capsys.readouterr()
    assert exit_code(monkeypatch, *common, "-c", "@absent") == 3
    assert "no list of names 'absent'" in capsys.readouterr().err
