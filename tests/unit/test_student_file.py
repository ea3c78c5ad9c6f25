"""Student files: what goes in comes out, damage is named, and gaps are told from mistakes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_student import TEXT_DIM, tiny_config

from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError
from dkdetr.student.build import build_student
from dkdetr.student_file import (
    StudentFile,
    build_from_file,
    load_into,
    load_student_file,
    save_student_file,
)


@pytest.fixture
def file() -> StudentFile:
    torch.manual_seed(3)
    config = tiny_config()
    student = build_student(config, text_dim=TEXT_DIM)
    vocabulary = Vocabulary(
        names=("cat", "größe"),
        category_ids=(4, 9),
        is_base=(True, False),
        frequencies=("f", "r"),
        prompts=("a {}.",),
        teacher="some teacher",
        embeddings=np.eye(2, TEXT_DIM, dtype=np.float32),
    )
    return StudentFile(student.state_dict(), config, vocabulary, {"train_split": "lvis_train"})


def test_what_goes_in_comes_out(tmp_path: Path, file: StudentFile):
    path = tmp_path / "s.safetensors"
    save_student_file(path, file)
    loaded = load_student_file(path)
    assert loaded.config == file.config
    assert loaded.provenance == file.provenance
    assert loaded.vocabulary is not None
    assert loaded.vocabulary.hash == file.vocabulary.hash
    assert loaded.tensors.keys() == file.tensors.keys()
    student = build_from_file(path, loaded, text_dim=TEXT_DIM)
    assert not student.training
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, file.tensors[name]), name


def test_every_damaged_byte_of_the_tensors_is_noticed(tmp_path: Path, file: StudentFile):
    path = tmp_path / "s.safetensors"
    save_student_file(path, file)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    for place in rng.integers(header, len(content), size=20):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtefactError, match="is damaged"):
            load_student_file(path)
    changed = content.replace(b"lvis_train", b"lvis_trail")
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(CorruptArtefactError, match="is damaged"):
        load_student_file(path)
    path.write_bytes(content[:-5])
    with pytest.raises(CorruptArtefactError, match="not a safetensors file"):
        load_student_file(path)


def test_other_files(tmp_path: Path):
    with pytest.raises(DataError, match="no student file"):
        load_student_file(tmp_path / "absent.safetensors")
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CorruptArtefactError, match="dkdetr convert"):
        load_student_file(tmp_path / "other.safetensors")


def test_a_file_without_classifiers_starts_a_training_but_is_not_scored(
    tmp_path: Path, file: StudentFile
):
    path = tmp_path / "s.safetensors"
    bare = {k: v for k, v in file.tensors.items() if not k.startswith(("classifiers", "kd_"))}
    save_student_file(path, replace(file, tensors=bare, vocabulary=None))
    loaded = load_student_file(path)
    assert loaded.vocabulary is None
    with pytest.raises(MismatchError, match=r"classifiers.*student\.weights"):
        build_from_file(path, loaded, text_dim=TEXT_DIM)
    torch.manual_seed(8)
    student = build_student(file.config, text_dim=TEXT_DIM)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    kept = load_into(path, loaded, student)
    assert {name.split(".")[0] for name in kept} == {"classifiers", "kd_content"}
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name] if name in kept else file.tensors[name]), name


def test_denoising_may_be_there_or_not(tmp_path: Path, file: StudentFile):
    path = tmp_path / "s.safetensors"
    cleaning = replace(file.config, student=replace(file.config.student, denoising=2))
    without = {k: v for k, v in file.tensors.items() if not k.startswith("kd_")}
    build_from_file(path, replace(file, config=cleaning, tensors=without), text_dim=TEXT_DIM)
    with_it = build_student(cleaning, text_dim=TEXT_DIM).state_dict()
    student = build_student(file.config, text_dim=TEXT_DIM)
    assert load_into(path, replace(file, tensors=with_it), student) == ()


def test_what_does_not_fit_changes_nothing(tmp_path: Path, file: StudentFile):
    path = tmp_path / "s.safetensors"
    student = build_student(file.config, text_dim=TEXT_DIM)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    wider = {**file.tensors, "trunk.level_embeddings": torch.zeros(9, 9)}
    with pytest.raises(MismatchError, match=r"level_embeddings is \(9, 9\) there"):
        load_into(path, replace(file, tensors=wider), student)
    with pytest.raises(MismatchError, match=r"'mask_head\.weight'"):
        load_into(path, replace(file, tensors={"mask_head.weight": torch.zeros(1)}), student)
    assert all(torch.equal(tensor, before[n]) for n, tensor in student.state_dict().items())
