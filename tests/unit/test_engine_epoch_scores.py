"""A run that is scored while it trains: the same weights, and the scores that `eval` gives."""

import signal
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import cli
from dkdetr.engine import epoch_scores
from dkdetr.engine.burn_in import BURN_IN_FILE
from dkdetr.engine.epoch_scores import EpochScores
from dkdetr.engine.evaluate_run import EvalRequest, evaluate_run
from dkdetr.engine.metric_log import add_record, read_metrics
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.subject import load_subject
from dkdetr.engine.trackers import TensorBoard
from dkdetr.engine.train import train
from dkdetr.engine.train_request import Watch
from dkdetr.errors import DataError, MismatchError, PreemptedError, UsageError
from tests.training_world import checkpoint_of, difference, make_world, settings
from tests.unit.data_world import coco_document, write_world

CONFIG = settings(optim={"epochs": 4}, kd={"start_epoch": 2})  # 12 steps, batch norm, dropout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With a run that is never scored, and the watch that scores every second epoch."""
    world = make_world(tmp_path_factory.mktemp("world"))
    train(world.request("plain", CONFIG))
    return world


def scoring(world, every=2, **more):
    return Watch(eval_every=every, eval_split=world.split, **more)


def scores_in(run):
    return [line for line in read_metrics(RunFolder(run).metrics) if line["kind"] == "eval"]


def test_scoring_changes_nothing_and_says_what_eval_says(world, monkeypatch, capsys) -> None:
    told = []
    monkeypatch.setattr(TensorBoard, "write", lambda _, at, values: told.append((at, values)))
    watch = scoring(world, every=1, trackers=("tensorboard",))
    request = world.request("scored", CONFIG, watch=watch)
    train(request)
    assert difference(checkpoint_of(world, "plain"), checkpoint_of(world, "scored")) == ""
    lines = scores_in(request.run)
    assert [(line["epoch"], line["iteration"]) for line in lines] == [
        (1, 3),
        (2, 6),
        (3, 9),
        (4, 12),
    ]
    on_file = RunFolder(request.run).evaluation(world.split)
    left = {path.name: path.read_bytes() for path in on_file.iterdir()}
    ask = EvalRequest(request.run, world.split, None, world.root, device="cpu")
    assert evaluate_run(ask) is not None
    assert {path.name: path.read_bytes() for path in on_file.iterdir()} == left
    *_, last, again = scores_in(request.run)
    assert {**last, "time": 0} == {**again, "time": 0}
    (values,) = [values for at, values in told if at == 12 and "AP50_all" in values]
    assert values["AP50_all"] == last["AP50_all"]
    assert "averaged" not in values
    assert "after epoch 4, " in capsys.readouterr().err


def test_what_was_stopped_while_it_was_scored_is_scored_later(world, monkeypatch) -> None:
    request = world.request("stopped", CONFIG, watch=scoring(world))
    with monkeypatch.context() as patched:
        patched.setattr(
            epoch_scores, "evaluate_student", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
        )
        with pytest.raises(PreemptedError, match="while iteration 6 was scored; saved"):
            train(request)
    assert checkpoint_of(world, "stopped").progress.iteration == 6
    assert scores_in(request.run) == []
    diary = RunFolder(request.run).metrics
    own = {"vocabulary_hash": load_subject(request.run).vocabulary.hash, "precision": "fp32"}
    for other in ({"vocabulary_hash": "of other words"}, {"precision": "bf16"}):
        line = {"split": world.split, "averaged": False, **own, **other}
        add_record(diary, "eval", 6, line)  # as `eval` with --vocab or --precision leaves it
    train(request)
    assert [line["iteration"] for line in scores_in(request.run)] == [6, 6, 6, 12]
    assert own.items() <= scores_in(request.run)[2].items()
    assert difference(checkpoint_of(world, "plain"), checkpoint_of(world, "stopped")) == ""
    before = RunFolder(request.run).metrics.read_bytes()
    train(request)  # done, and scored
    assert RunFolder(request.run).metrics.read_bytes() == before


def test_a_picture_that_cannot_be_read_while_it_is_scored_loses_nothing(world, monkeypatch) -> None:
    def damaged(*_, **__):
        raise DataError("'a.jpg' is truncated")

    request = world.request("damaged", CONFIG, watch=scoring(world))
    with monkeypatch.context() as patched:
        patched.setattr(epoch_scores, "evaluate_student", damaged)
        with pytest.raises(DataError, match=r"truncated. Training is saved .* --eval-every"):
            train(request)
    assert train(replace(request, watch=Watch())).iterations == 12
    assert difference(checkpoint_of(world, "plain"), checkpoint_of(world, "damaged")) == ""


def test_a_shared_burn_in_is_not_scored_again(world, monkeypatch) -> None:
    burn_in = world.root / "runs" / "plain" / "checkpoints" / BURN_IN_FILE
    request = world.request("from", CONFIG, watch=scoring(world), start_from=burn_in)
    scored = []
    monkeypatch.setattr(EpochScores, "_score", lambda *_: scored.append(1))  # no numbers: no line
    train(replace(request, until_iteration=6))  # stopped before its first step
    train(replace(request, until_iteration=9))
    assert scored == []
    train(request)
    assert scored == [1]
    train(request)  # its end was not told: made up for
    assert scored == [1, 1]


def test_the_rates_are_those_of_the_steps(world, monkeypatch) -> None:
    """Scoring that seems to take an hour is no hour of the steps."""
    monkeypatch.setattr(epoch_scores.EpochScores, "score_if_due", lambda *_: 3600.0)
    summary = train(world.request("timed", CONFIG, watch=scoring(world), until_iteration=3))
    assert summary.last_losses["step_s"] < 0


def test_what_cannot_be_scored_is_told_before_the_first_step(world, tmp_path) -> None:
    request = world.request("never", CONFIG, watch=Watch(eval_every=1))
    with pytest.raises(UsageError, match="give --eval-split"):
        train(request)
    document = coco_document(num_images=2)
    first, second = document["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]
    other = write_world(tmp_path, document)
    with pytest.raises(MismatchError, match="--eval-split"):
        train(replace(request, watch=Watch(eval_every=1, eval_split=other)))
    assert not (request.run / "checkpoints").exists()


@pytest.mark.parametrize("words", [("--eval-every", "-1"), ("--eval-split", "lvis_val")])
def test_options_that_say_nothing_are_refused(world, words) -> None:
    experiment = world.root / "world.toml"
    experiment.write_text('name = "world"\n')
    command = ["train", "--cache", str(world.cache), "--experiment", str(experiment), *words]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 2
    assert words[0] in done.stderr
