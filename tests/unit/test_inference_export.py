"""A shared student: the same outputs, no KD part, nothing of the machine, and a card."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

import cli
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.subject import load_subject
from dkdetr.engine.train import train
from dkdetr.errors import UsageError
from dkdetr.inference.export import export_student
from dkdetr.student_file import weights_hash
from tests.tiny_student import image_batch
from tests.training_world import make_world, settings


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    train(world.request("shared", settings(optim={"epochs": 3})))
    run = world.root / "runs" / "shared"
    for ending, share in (("", 0.4567), ("-ema", 0.1234)):
        weights = weights_hash(load_subject(run, averaged=bool(ending)).student)
        numbers = {"AP": share, "APr": 0.2, "protocol": "x", "weights_xxh3_128": weights}
        put_scores(run / "eval" / f"someset_val{ending}", numbers | asked(load_subject(run)))
    (run / "eval" / "other_val-ema").mkdir()  # of an agreement alone
    subject = load_subject(run, averaged=True)
    written = export_student(
        world.root / "out" / "shared.safetensors",
        subject.student,
        subject.config,
        subject.vocabulary,
        {**subject.provenance, "train_split": "someset_train", "averaged": True},
        scores=RunFolder(run).evaluations(averaged=True),
    )
    return world, subject, written


def asked(subject, **other) -> dict:
    own = {"words": "own", "vocabulary_hash": subject.vocabulary.hash, "precision": "fp32"}
    return own | other


def put_scores(folder: Path, numbers: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(numbers))


def test_the_file_scores_as_the_run(exported) -> None:
    _, subject, written = exported
    again = load_subject(written.weights)
    text = torch.from_numpy(subject.vocabulary.embeddings.copy())
    images = image_batch(padded_hw=(96, 96))
    with torch.no_grad():
        wanted, found = (each.student(images, text) for each in (subject, again))
    assert torch.equal(found.logits, wanted.logits)
    assert again.vocabulary.hash == subject.vocabulary.hash
    assert again.train_split == "someset_train"
    assert weights_hash(again.student) == weights_hash(subject.student)


def test_it_holds_the_student_alone(exported) -> None:
    world, _, written = exported
    with safe_open(written.weights, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith("kd_")]  # noqa: SIM118
        header = json.dumps(file.metadata())
    assert str(world.root) not in header
    assert "command" not in json.loads(json.loads(header)["provenance"])


def test_the_card_says_what_it_is(exported) -> None:
    world, _, written = exported
    card = written.card.read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "dkdetr"
    assert "* someset_val-ema: AP 12.3, APr 20.0" in card
    assert "45.7" not in card  # the last weights'
    assert "other_val" not in card
    assert "running average" in card
    assert "65 names" in card
    assert str(world.root) not in card


def test_a_student_file_has_no_average(exported) -> None:
    _, _, written = exported
    with pytest.raises(UsageError, match="--ema"):
        load_subject(written.weights, averaged=True)


@pytest.mark.parametrize("teacher", ["pictograms", "ViT-B-32-quickgelu:openai", None])
def test_places_of_this_machine_are_not_told(exported, teacher) -> None:
    world, subject, _ = exported
    split = f"ovcoco:{world.root}/pictures/train2017:{world.root}/train.json"
    written = export_student(
        world.root / "out" / "own.safetensors",
        subject.student,
        subject.config,
        subject.vocabulary,
        {"train_split": split, "teacher_spec": teacher or f"RN50:{world.root}/clip.pt"},
        scores=[Path("nowhere")],
    )
    told = load_subject(written.weights)
    assert told.train_split == "ovcoco:train2017:train.json"
    assert told.provenance.get("teacher_spec") == teacher
    assert str(world.root) not in written.card.read_text()
    assert str(world.root).encode() not in written.weights.read_bytes()


def test_the_command_puts_each_weights_own_scores_on_the_card(exported) -> None:
    world, _, _ = exported
    run = str(world.root / "runs" / "shared")
    for words, shown, hidden in (((), "AP 45.7", "AP 12.3"), (("--ema",), "AP 12.3", "AP 45.7")):
        out = world.root / f"cards{len(words)}" / "s.safetensors"
        done = CliRunner().invoke(cli.app, ["export", run, "--out", str(out), *words])
        assert done.exit_code == 0, done.stderr
        card = out.with_suffix(".md").read_text()
        assert shown in card
        assert hidden not in card
        again = world.root / f"again{len(words)}.safetensors"
        done = CliRunner().invoke(cli.app, ["export", str(out), "--out", str(again)])
        assert done.exit_code == 0, done.stderr
        assert ("running average" in again.with_suffix(".md").read_text()) == bool(words)


@pytest.mark.parametrize("ema", [(), ("--ema",)])
def test_what_was_left_out_comes_back_by_the_command_that_is_told(exported, tmp_path, ema):
    world, _, _ = exported
    run = world.root / "runs" / "shared"
    folder = run / "eval" / ("own-ema" if ema else "own")
    split = "lvis:/my pictures:/my pictures/val.json"
    put_scores(folder, {"AP": 0.99, "split": split})
    out = tmp_path / "s.safetensors"
    try:
        done = CliRunner().invoke(
            cli.app, ["export", str(run), "--out", str(out), "--json", str(tmp_path / "j"), *ema]
        )
    finally:
        shutil.rmtree(folder)
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    told = shlex.split(note.partition("; next: ")[2])
    assert told == ["dkdetr", "eval", str(run), *ema, "--split", split]
    (line,) = json.loads((tmp_path / "j").read_text())["left_out"]
    assert line in note
    assert "my pictures" not in out.with_suffix(".md").read_text()


def exported_with(subject, scores: Path):
    """Exports a student beside the folder of its scores."""
    return export_student(
        scores.parent / "s.safetensors",
        subject.student,
        subject.config,
        subject.vocabulary,
        subject.provenance,
        scores=[scores],
    )


def test_a_file_is_not_exported_onto_itself(exported, monkeypatch) -> None:
    _, _, written = exported
    before = written.weights.read_bytes()
    monkeypatch.chdir(written.weights.parent)
    (written.weights.parent / "link.safetensors").symlink_to(written.weights)
    for words in (["--out", str(written.weights)], ["--out", "link.safetensors"]):
        done = CliRunner().invoke(cli.app, ["export", str(written.weights), *words])
        assert done.exit_code == 2
        assert "give another with --out" in done.stderr
    assert written.weights.read_bytes() == before


@pytest.mark.parametrize(
    ("of_weights", "said"),
    [
        ({"weights_xxh3_128": "0" * 32, "iteration": 4}, "of other weights, those of step 4,"),
        ({"weights_xxh3_128": "0" * 32, "iteration": None}, "of other weights, and"),
        ({}, "of weights that they do not name,"),  # as before scores said whose they are
    ],
)
def test_scores_of_other_weights_are_not_on_the_card(exported, tmp_path, of_weights, said) -> None:
    _, subject, _ = exported
    put_scores(tmp_path / "someset_val", {"AP": 0.99, **of_weights})
    written = exported_with(subject, tmp_path / "someset_val")
    card = written.card.read_text()
    assert "99.0" not in card
    assert f"* someset_val: the scores on file are {said}" in card
    assert [said in each.line for each in written.left_out] == [True]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, "AP 99.0\n"),
        ({"words": "split", "vocabulary_hash": "0"}, "AP 99.0 (asked for the split's own names)"),
        ({"words": "other", "vocabulary_hash": "0"}, "of other words than the student's own,"),
        ({"vocabulary_hash": "0"}, "of other words than the student's own,"),  # of another file
        ({"words": "clean"}, "of names put right (--clean-names), and"),
        ({"precision": "fp16"}, "of precision fp16, where the student's own is fp32, and"),
        ({"words": None}, "of words that they do not name,"),
    ],
)
def test_scores_of_other_words_or_precision_are_not_on_the_card(exported, tmp_path, other, said):
    _, subject, _ = exported
    weights = {"weights_xxh3_128": weights_hash(subject.student)}
    put_scores(tmp_path / "x_val", {"AP": 0.99, **weights, **asked(subject, **other)})
    written = exported_with(subject, tmp_path / "x_val")
    card = written.card.read_text()
    assert said in card
    assert ("99.0" in card) is ("99.0" in said)
    assert len(written.left_out) == ("99.0" not in said)
