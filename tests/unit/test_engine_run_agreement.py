"""`eval --agreement`: whose weights, at which precision, kept where; the rest is refused."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import cli
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.run_agreement import read_agreement
from dkdetr.engine.subject import load_subject
from dkdetr.engine.train import train
from dkdetr.evaluation import agreement_pass
from dkdetr.evaluation.scored_weights import ScoredWeights
from dkdetr.evaluation.teacher_agreement import GroupAgreement, TeacherAgreement
from dkdetr.student_file import weights_hash
from tests.training_world import make_world, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    train(world.request("a", settings(optim={"epochs": 3})))
    return world


def evaluate(*words: str):
    return CliRunner().invoke(cli.app, ["eval", "--device", "cpu", *words])


def test_the_average_is_measured_apart_and_at_the_precision_asked_for(world, monkeypatch) -> None:
    asked = []
    real = agreement_pass.computing

    @contextmanager
    def watched(precision, device):
        asked.append(precision)
        with real(precision, device):
            yield

    monkeypatch.setattr(agreement_pass, "computing", watched)
    # The cache of this world does not say who embedded it.
    monkeypatch.setattr(Vocabulary, "require_teacher", lambda *_: None)
    run = world.root / "runs" / "a"
    cosines = []
    for words in ((), ("--ema",), ("--ema", "--precision", "bf16")):
        done = evaluate(str(run), "--agreement", str(world.cache), "--json", "-", *words,
                        "--data-root", str(world.root))  # fmt: skip
        assert done.exit_code == 0, done.stderr
        cosines.append(json.loads(done.stdout)["agreement"][0]["groups"][0]["cosine"])
    assert len(set(cosines)) == 3
    assert cosines[2] == pytest.approx(cosines[1], abs=0.02)
    assert set(asked) == {settings().optim.precision, "bf16"}
    last, average = sorted((run / "eval").glob("*/agreement.json"))
    assert average.parent.name == f"{last.parent.name}-ema"
    kept = (read_agreement(run, world.split, averaged=each) for each in (False, True))
    assert [each[0].groups[0].cosine for each in kept] == [cosines[0], cosines[2]]


def test_it_says_whose_weights_as_scores_do(world, monkeypatch) -> None:
    monkeypatch.setattr(Vocabulary, "require_teacher", lambda *_: None)
    run, named = world.root / "runs" / "a", []
    subject = load_subject(run)
    for words in ((), ("--ema", "--precision", "bf16")):
        done = evaluate(str(run), "--agreement", str(world.cache), "--json", "-", *words,
                        "--data-root", str(world.root))  # fmt: skip
        named.append(json.loads(done.stdout)["agreement"][0])
    told = {"words": "own", "vocabulary_hash": subject.vocabulary.hash}
    told |= {"epoch": subject.progress.epoch, "iteration": subject.progress.iteration}
    assert named[0].items() >= (told | {
        "weights_xxh3_128": weights_hash(subject.student), "precision": "fp32",
    }).items()  # fmt: skip
    average = weights_hash(load_subject(run, averaged=True).student)
    assert named[1].items() >= (told | {"weights_xxh3_128": average, "precision": "bf16"}).items()
    kept = read_agreement(run, world.split)[0].weights
    assert kept == subject.scored(subject.vocabulary, "own", "fp32")


def test_the_held_out_one_is_read_whichever_came_last(tmp_path) -> None:
    group = GroupAgreement("all", 12, 0.5, 0.25, 0.01, 0.5)
    training = TeacherAgreement("KD queries", "x_train", False, 3, (group,))
    other = replace(training, split="other_val", held_out=True)
    own = replace(other, split="x_val")

    def keep(folder: str, measured: TeacherAgreement) -> None:
        (tmp_path / "eval" / folder).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "eval" / folder / "agreement.json"
        path.write_text(json.dumps([measured.as_json()]))

    def read(*, averaged: bool = False) -> list[str]:
        return [each.split for each in read_agreement(tmp_path, "x_val", averaged=averaged)]

    assert read() == []
    keep("", own)  # as it was kept before
    keep("x_train", training)
    assert read() == ["x_val"]
    keep("", training)
    keep("other_val", other)
    assert read() == ["other_val"]
    keep("x_val", own)
    assert read() == ["x_val"]
    assert [each.split for each in read_agreement(tmp_path, "x_train")] == ["x_train"]
    assert read(averaged=True) == []
    keep("x_train-ema", training)
    assert read(averaged=True) == ["x_train"]
    # One of the weights asked about comes before all others.
    weights = ScoredWeights("abc", "v", "own", "fp32")
    keep("other_val", replace(other, weights=weights))
    assert [each.split for each in read_agreement(tmp_path, "x_val", weights="abc")] == [
        "other_val"
    ]
    assert [each.split for each in read_agreement(tmp_path, "x_val", weights="def")] == ["x_val"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("r", "--agreement", "c", "--compile"), "--compile"),
        (("r", "--agreement", "c", "--vocab", "v", "--split", "s"), "--vocab, --split"),
        (("r", "--agreement", "c", "--clean-names"), "--clean-names"),
        (("r", "--agreement", "c", "--predictions", "p.json"), "--predictions"),
        (("r", "--agreement", "c", "--evaluator", "official"), "--evaluator"),
        (("r", "--predictions", "p.json", "--split", "s"), "RUN"),
        (("--predictions", "p.json", "--ema", "--precision", "fp32"), "--ema, --precision"),
        (("--predictions", "p.json", "--vocab", "v", "--clean-names"), "--vocab, --clean-names"),
        (("--predictions", "p.json", "--compile"), "--compile"),
        (("--predictions", "p.json", "--batch-size", "1"), "--batch-size"),
    ],
)
def test_an_option_without_effect_is_refused_by_name(words, named) -> None:
    done = evaluate(*words)
    assert done.exit_code == 2
    assert f"has no use for {named}: leave it out" in done.stderr


def test_several_ranks_do_not_measure_agreement_each(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = evaluate("r", "--agreement", "c")
    assert done.exit_code == 2
    assert "start it without torchrun" in done.stderr
