"""What a training that starts from a student file says of boxes that file has seen."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dkdetr.data.splits import load_split
from dkdetr.engine.initial_weights import boxes_seen, boxes_seen_before, start_from_file
from dkdetr.engine.train import train
from dkdetr.errors import DataError, MismatchError
from dkdetr.student.build import build_student
from dkdetr.student_file import StudentFile, build_from_file, save_student_file
from pipeline.leaks import check_leaks
from pipeline.proposal_sources import open_source, parse_proposals, prepare_source
from pipeline.teacher_model import tensors_sha256
from tests.training_world import DIM, checkpoint_of, difference, make_world, settings
from tests.unit.data_world import vocabulary_of

CONFIG = settings()
CPU = torch.device("cpu")
SEEN = "boxes of 17 of the novel classes (airplane, bus, cake, ...)"  # OV-COCO's 17


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def split(world):
    return load_split(world.split, world.root)


def student_file(split, *, all_base: bool, **provenance: str) -> StudentFile:
    """A student of ours; `all_base`: that the novel names were base where it was trained."""
    vocabulary = vocabulary_of(split)
    if all_base:
        vocabulary = replace(vocabulary, is_base=(True,) * len(vocabulary))
    torch.manual_seed(1)
    tensors = build_student(CONFIG, text_dim=DIM).state_dict()
    return StudentFile(
        tensors, CONFIG, vocabulary, {"train_split": "ovcoco:elsewhere"} | provenance
    )


def test_names_of_its_training_tell_what_a_student_has_seen(split):
    assert boxes_seen(student_file(split, all_base=False), split) is None
    assert boxes_seen(student_file(split, all_base=True), split) == SEEN
    stated = student_file(split, all_base=False, saw_boxes_of="everything")
    assert boxes_seen(stated, split) == "everything"
    no_novel = replace(split, categories=tuple(replace(c, is_base=True) for c in split.categories))
    assert boxes_seen(stated, no_novel) == "everything"  # a mark is never lost
    assert boxes_seen(student_file(split, all_base=True), no_novel) is None
    assert boxes_seen(replace(stated, provenance={}, vocabulary=None), split) is None
    backbone = replace(stated, provenance={"layout": "resnet50"})
    assert boxes_seen(backbone, split) is None
    detector = replace(student_file(split, all_base=True), provenance={"layout": "opera"})
    assert boxes_seen(detector, split) == SEEN
    otherwise = student_file(split, all_base=False, train_split="coco:elsewhere")
    assert boxes_seen(otherwise, split) == "'coco:elsewhere'"
    assert boxes_seen(otherwise, replace(split, protocol="lvis")) is None
    assert boxes_seen_before(None, None, split) is None


def test_a_leak_is_refused_for_ovcoco_and_told_for_lvis(split, tmp_path: Path):
    path = tmp_path / "start.safetensors"
    file = student_file(split, all_base=True)
    student = build_student(CONFIG, text_dim=DIM)
    with pytest.raises(DataError, match="novel classes"):
        start_from_file(student, path, file, split)
    (told,) = start_from_file(student, path, file, replace(split, protocol="lvis"))
    assert told.startswith("LEAK: ")
    file = student_file(split, all_base=False)
    assert start_from_file(student, path, file, split) == ()


def test_the_run_keeps_the_mark(world, split, tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "start.safetensors"
    save_student_file(path, student_file(split, all_base=True))
    monkeypatch.setattr(
        "dkdetr.engine.train.load_cached_split", lambda *_: replace(split, protocol="lvis")
    )
    config = settings(student={"weights": str(path)})
    train(world.request("marked", config, until_iteration=1))
    assert "LEAK" in capsys.readouterr().err
    described = json.loads((world.root / "runs" / "marked" / "run.json").read_text())
    assert described["saw_boxes_of"] == SEEN
    burn_in = world.root / "runs" / "marked"  # without the file's name, as any row may go on
    train(world.request("after", CONFIG, start_from=burn_in, until_iteration=2))
    described = json.loads((world.root / "runs" / "after" / "run.json").read_text())
    assert described["saw_boxes_of"] == SEEN
    spec = parse_proposals(f"student:{burn_in}")
    prepared = prepare_source(spec, world.cache, split)
    proposals = open_source(prepared, torch.device("cpu"), batch_size=1)
    with pytest.raises(DataError, match=f"began from weights that had seen {re.escape(SEEN)}"):
        check_leaks(proposals.seen, split)


def test_a_run_goes_on_without_the_files_it_began_from(
    world, split, tmp_path: Path, monkeypatch, capsys
):
    path, backbone = tmp_path / "start.safetensors", tmp_path / "backbone.safetensors"
    file = student_file(split, all_base=True)
    bare = {k: v for k, v in file.tensors.items() if not k.startswith("trunk.backbone.")}
    save_student_file(path, replace(file, tensors=bare))
    trunk = build_student(CONFIG, text_dim=DIM).trunk.backbone
    save_file(trunk.state_dict(), backbone)
    monkeypatch.setattr(
        "dkdetr.engine.train.load_cached_split", lambda *_: replace(split, protocol="lvis")
    )
    config = settings(student={"weights": str(path), "backbone": {"weights": str(backbone)}})
    train(world.request("never cut", config, until_iteration=4))
    train(world.request("cut", config, until_iteration=2))
    path.unlink()
    backbone.unlink()
    capsys.readouterr()
    train(world.request("cut", config, until_iteration=4))
    assert f"LEAK: what this run began from has seen {SEEN}" in capsys.readouterr().err
    assert difference(checkpoint_of(world, "cut"), checkpoint_of(world, "never cut")) == ""
    described = json.loads((world.root / "runs" / "cut" / "run.json").read_text())
    assert described["saw_boxes_of"] == SEEN
    assert [start["iteration"] for start in described["starts"]] == [0, 2]
    # With no whole checkpoint it begins again, and wants them.
    for saved in (world.root / "runs" / "cut" / "checkpoints").glob("*.pt"):
        saved.write_bytes(b"damaged")
    with pytest.raises(DataError, match="no backbone weights at"):
        train(world.request("cut", config, until_iteration=4))
    save_file(trunk.state_dict(), backbone)
    with pytest.raises(DataError, match="no student file"):
        train(world.request("cut", config, until_iteration=4))


def test_a_student_file_proposes_as_the_student_does_and_keeps_its_mark(split, tmp_path: Path):
    path = tmp_path / "student.safetensors"
    spec = parse_proposals(f"student:{path}")
    with pytest.raises(DataError, match="no such student file"):
        spec.require()
    file = student_file(split, all_base=False)
    save_student_file(path, file)
    spec.require()

    def opened():
        return open_source(prepare_source(spec, tmp_path, split), CPU, batch_size=1)

    source = opened()
    whole = build_from_file(path, file, text_dim=DIM)
    assert source.identity["weights_sha256"] == tensors_sha256(whole.trunk)
    assert source.identity["source"] == "student"
    assert not check_leaks(source.seen, split).leaks
    assert source.seen.details == {"experiment": CONFIG.name, "split": "ovcoco:elsewhere"}

    detector = student_file(split, all_base=False, saw_boxes_of="COCO boxes of all 80 classes")
    save_student_file(path, replace(detector, vocabulary=None))  # as `convert` writes it
    with pytest.raises(DataError, match="had seen COCO boxes of all 80 classes"):
        check_leaks(opened().seen, split)
    assert check_leaks(opened().seen, replace(split, protocol="lvis")).leaks
    save_student_file(path, student_file(split, all_base=True))
    with pytest.raises(DataError, match="it learned the boxes of 17"):
        check_leaks(opened().seen, split)

    target = tmp_path / "0f3a"  # as in a hub's cache
    path.rename(target)
    path.symlink_to(target)
    assert opened().identity["source"] == "student"
    path.unlink()

    bare = {k: v for k, v in file.tensors.items() if k.startswith("trunk.backbone.")}
    save_student_file(path, replace(file, tensors=bare, provenance={"layout": "resnet50"}))
    with pytest.raises(MismatchError, match="first stage's tensors"):
        opened()
