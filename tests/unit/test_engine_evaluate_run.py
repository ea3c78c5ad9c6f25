"""What a run is scored with, and what is told of it."""

import json
from dataclasses import replace

import pytest
from tiny_student import tiny_config, tiny_student

from dkdetr.data.splits import load_split
from dkdetr.engine import evaluate_run
from dkdetr.engine.metric_log import MetricLog, read_metrics
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.subject import Subject, load_subject
from dkdetr.engine.train import train
from dkdetr.errors import MismatchError
from dkdetr.evaluation.evaluate import Evaluation
from dkdetr.student_file import weights_hash
from tests.training_world import make_world, settings
from tests.unit.data_world import coco_document, vocabulary_of, write_world


def test_a_teacher_that_is_another_now_is_told_with_what_to_do(tmp_path, monkeypatch):
    name = write_world(tmp_path, coco_document(num_images=2))
    fitting = vocabulary_of(load_split(name, tmp_path))
    subject = Subject(
        path=tmp_path, student=tiny_student(), config=tiny_config(), vocabulary=fitting.base(),
        train_split=name, provenance={"teacher_spec": "fake:weights"}, folder=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(evaluate_run, "load_subject", lambda *_args, **_more: subject)
    request = evaluate_run.EvalRequest(tmp_path, name, None, tmp_path, device="cpu")
    asked: list[str] = []

    def changed(_split, spec, _prompts):
        asked.append(spec)
        return replace(fitting, teacher="fake:1")

    with pytest.raises(MismatchError, match="embedded by fake:1, the student learned") as told:
        evaluate_run.evaluate_run(request, changed)
    assert asked == ["fake:weights"]
    assert "fake:0" in str(told.value)
    assert str(told.value).endswith("with --vocab")
    assert "\n" not in str(told.value)


def test_a_number_of_images_at_once_goes_before_the_run_s_own(tmp_path, monkeypatch):
    name = write_world(tmp_path, coco_document(num_images=2))
    subject = Subject(
        path=tmp_path, student=tiny_student(), config=tiny_config(), folder=tmp_path,
        vocabulary=vocabulary_of(load_split(name, tmp_path)), train_split=name, provenance={},
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(evaluate_run, "load_subject", lambda *_args, **_more: subject)
    monkeypatch.setattr(
        evaluate_run, "evaluate_student", lambda _s, _p, _v, config, **_more: seen.append(config)
    )
    request = evaluate_run.EvalRequest(tmp_path, name, None, tmp_path, device="cpu")
    for size in (None, 3):
        assert evaluate_run.evaluate_run(replace(request, batch_size=size)) is None
    assert [config.eval.batch_size for config in seen] == [subject.config.eval.batch_size, 3]


@pytest.mark.parametrize(("part", "said"), [("valid", False), ("train", True)])
def test_images_that_a_training_split_leaves_out_are_told(
    tmp_path, monkeypatch, capsys, part, said
):
    split = write_world(tmp_path, coco_document(num_images=2), f"{part}/_annotations.coco")
    scored = []

    def score(_predictions, split, **_more):
        scored.append([image.image_id for image in split.images])
        return Evaluation.__new__(Evaluation)  # nobody reads its numbers

    monkeypatch.setattr(evaluate_run, "score_predictions", score)
    request = evaluate_run.EvalRequest(None, split, None, tmp_path, device="cpu")
    evaluate_run.evaluate_predictions(tmp_path / "boxes.json", request)
    assert scored == [[1] if said else [1, 2]]  # the second has a novel object alone
    assert ("images without a base object are left out" in capsys.readouterr().err) is said


def test_whose_words_were_asked_is_known(tmp_path):
    split = load_split(write_world(tmp_path, coco_document(num_images=2)), tmp_path)
    own = vocabulary_of(split)
    reworded = replace(own, prompts=("a {}",))  # the same names
    elsewhere = replace(own, names=tuple(f"a {name}" for name in own.names))  # of another split
    words_of = evaluate_run.words_of
    assert words_of(own, own, split, cleaned=False) == "own"
    assert words_of(own, own, split, cleaned=True) == "own"  # nothing was to be put right
    assert words_of(reworded, own, split, cleaned=False) == "other"
    assert words_of(elsewhere, own, split, cleaned=True) == "clean"
    assert words_of(own, elsewhere, split, cleaned=False) == "split"
    assert words_of(reworded, elsewhere, split, cleaned=False) == "other"


def test_scores_name_their_weights_and_stand_in_the_diary(tmp_path):
    """A run is scored, trained on, scored again: what is said is said of each step's weights."""
    world = make_world(tmp_path)
    request = world.request("a", settings(optim={"epochs": 6}))
    run = request.run
    train(replace(request, until_iteration=4))
    ask = evaluate_run.EvalRequest(run, world.split, None, world.root, device="cpu")
    first = evaluate_run.evaluate_run(ask)
    train(request)
    again = evaluate_run.evaluate_run(ask)
    assert first is not None
    assert again is not None
    on_file = json.loads(again.evaluation.paths["metrics"].read_text())
    assert (on_file["epoch"], on_file["iteration"]) == (6, 18)
    assert on_file["weights_xxh3_128"] == weights_hash(load_subject(run).student)
    assert on_file["weights_xxh3_128"] != first.as_json()["weights_xxh3_128"]
    lines = read_metrics(RunFolder(run).metrics)
    assert [(line["kind"], line["iteration"]) for line in lines] == [
        ("train", 4), ("eval", 4), ("train", 18), ("eval", 18)
    ]  # fmt: skip
    own = {"words": "own", "vocabulary_hash": load_subject(run).vocabulary.hash}
    asked = {**own, "precision": "fp32"}.items()
    for line, scored in ((lines[1], first), (lines[3], again)):
        assert asked <= line.items()
        assert asked <= scored.as_json().items()
        assert line["split"] == world.split
        assert line["AP50_all"] == scored.as_json()["AP50_all"]
    log = MetricLog(RunFolder(run).metrics, after_iteration=18)  # of a training that goes on
    log.write("train", 20, {})
    evaluate_run.evaluate_run(ask)
    log.write("train", 40, {})
    log.close()
    told = read_metrics(RunFolder(run).metrics)[len(lines) :]
    assert [(line["kind"], line["iteration"]) for line in told] == [
        ("eval", 18), ("train", 20), ("train", 40)
    ]  # fmt: skip
