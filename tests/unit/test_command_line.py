"""What every command has: `--json` and `--offline`; one answer a command, errors included."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import cli
from cache.neighbors import NeighborSettings
from dkdetr.errors import UsageError
from pipeline.request import CacheRequest, fit_overrides


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command of the program and its typed words."""
    group = typer.main.get_command(cli.app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def run(*words: str):
    return CliRunner().invoke(cli.app, list(words))


def test_there_are_commands():
    names = {name for name, _ in commands()}
    assert {"train", "cache export", "data prepare", "config check", "fetch"} <= names


def test_the_defaults_of_stage_one_are_the_requests_and_those_that_pages_name():
    request = CacheRequest(split="lvis_train", out=Path("cache/lvis"))
    options = {each.name: each.default for each in dict(commands())["cache-teacher"].params}
    shared = options.keys() & vars(request).keys() - {"split", "out", "overrides"}
    assert len(shared) >= 14
    assert {name: options[name] for name in shared} == {n: getattr(request, n) for n in shared}
    assert (request.keep, request.max_bad, request.prompts) == (300, 0.001, "vild63")
    assert request.teacher == "ViT-B-32-quickgelu:openai"
    assert (NeighborSettings().per_image, NeighborSettings().k) == (50, 16)


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_has_the_common_options(name):
    command = dict(commands())[name]
    options = {word for parameter in command.params for word in parameter.opts}
    assert {"--json", "--offline", "--verbose"} <= options
    assert command.help, "a command says what it does"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("build.run_stage_one", ["cache-teacher", "--split", "coco:my pictures:t.json"]),
        ("import_cache.import_cache", ["cache", "import", "oadp", "it's mine", "--split", "s",
                                       "--text-bank", "b.npy"]),
    ],
)  # fmt: skip
def test_a_command_is_recorded_as_it_can_be_typed_again(function, words, monkeypatch):
    words += ["--out", "a b"]
    asked = []

    def refuse(request, _say):
        asked.append(request.command)
        raise UsageError("enough")

    monkeypatch.setattr(f"pipeline.{function}", refuse)
    monkeypatch.setattr("sys.argv", ["dkdetr", *words])
    assert run(*words).exit_code == 2
    assert [shlex.split(each) for each in asked] == [words]


def test_an_error_is_the_json(tmp_path):
    done = run("config", "show", "nothing", "--json", "-")
    assert done.exit_code == 2
    told = json.loads(done.stdout)["error"]
    assert told["code"] == 2
    assert "unknown experiment 'nothing'" in told["message"]
    assert told["message"] in done.stderr
    path = tmp_path / "e.json"
    assert run("data", "check", "nothing", "--json", str(path)).exit_code == 2
    assert json.loads(path.read_text())["error"]["code"] == 2


def test_a_report_of_faults_stays_the_answer(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    content["images"] = [{"id": 1, "file_name": "absent.jpg", "height": 5, "width": 5}]
    (tmp_path / "train.json").write_text(json.dumps(content))
    done = run("data", "check", f"coco:{images}:{tmp_path / 'train.json'}", "--json", "-")
    assert done.exit_code == 3
    assert "error" not in json.loads(done.stdout)


def test_config_check(tmp_path):
    done = run("config", "check", "trial", "--json", "-")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["name"] == "trial"
    path = tmp_path / "mine.toml"
    path.write_text('extends = "trial"\nname = "mine"\n[optim]\nepochs = 3\nlr_drop_epochs = [2]\n')
    assert run("config", "check", str(path)).exit_code == 0
    for wrong, mention in (("epochs = -1", "optim.epochs"), ("epoch = 3", "optim.epoch")):
        path.write_text(f'extends = "trial"\nname = "mine"\n[optim]\n{wrong}\n')
        done = run("config", "check", str(path))
        assert done.exit_code == 2
        assert mention in done.stderr


def test_making_the_embedded_data_set_answers_too(tmp_path, monkeypatch):
    from pipeline.pictograms import dataset

    monkeypatch.setattr(dataset, "prepare_pictograms", lambda root, **_: root / "pictograms")
    done = run("data", "prepare", "pictograms", "--data-root", str(tmp_path), "--json", "-")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "pictograms")}


def test_rows_of_a_table_may_stand_apart(monkeypatch):
    from dkdetr.engine import ablate

    asked = []

    def price(request):
        asked.append(request.rows)
        raise UsageError("enough")

    monkeypatch.setattr(ablate, "price_ablation", price)
    words = ("ablate", "--cache", "c", "--table", "5", "--dry-run", "--rows", "skd, rkd ,")
    assert run(*words).exit_code == 2
    assert asked == [("skd", "rkd")]


def test_an_epoch_to_end_before_is_one_or_more():
    done = run("train", "--cache", "c", "--until", "0")
    assert done.exit_code == 2
    assert "--until" in done.stderr


def test_a_start_that_fit_would_not_read_is_refused_by_stage_one_alone(tmp_path):
    words = ("cache-teacher", "--split", "ovcoco_train", "--data-root", str(tmp_path), "--set")
    refused = run(*words, 'student.weights="start.safetensors"')
    assert refused.exit_code == 2
    assert "--proposals student:FILE" in refused.stderr
    # One that names no file, and one in an experiment, get as far as the data.
    assert run(*words, "student.weights=none", "--teacher", "pictograms").exit_code == 3
    experiment = tmp_path / "own.toml"
    experiment.write_text('extends = "own_r50"\nstudent.weights = "start.safetensors"\n')
    held = run(*words[:-1], "--experiment", str(experiment), "--teacher", "pictograms")
    assert held.exit_code == 3, held.stderr


@pytest.mark.parametrize(
    "setting",
    ["optim.precision=fp16", "compute.compile=inductor", "compute={cuda_graphs=true}"],
)
def test_how_train_alone_goes_is_refused_by_stage_one(setting):
    refused = run("cache-teacher", "--split", "ovcoco_train", "--set", setting)
    assert refused.exit_code == 2
    assert f"--set {setting}: `fit` does not read" in refused.stderr
    assert "compute.micro_batches" in refused.stderr


def test_one_list_of_settings_may_serve_both_stages():
    both = ("kd.start_epoch=1", "student.num_queries=12", "optim.lr_drop_epochs=[]",
            "compute.micro_batches=2", "compute.activation_checkpointing=true")  # fmt: skip
    assert fit_overrides(both) == both


def test_of_torchrun_s_ranks_the_first_alone_prices(monkeypatch):
    from pipeline import calibrate

    def priced(_):
        raise UsageError("priced")

    monkeypatch.setattr(calibrate, "price_cache", priced)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, exit_code, said in (("0", 2, "priced"), ("1", 0, "")):
        monkeypatch.setenv("RANK", rank)
        done = run("cache-teacher", "--split", "ovcoco_train", "--dry-run")
        assert done.exit_code == exit_code
        assert said in done.stderr
        assert not done.stdout


def test_prompts_of_a_cache_may_stand_in_a_file(tmp_path, monkeypatch):
    from pipeline import build

    asked = []

    def run_stage_one(request, _):
        asked.append((request.prompts, request.templates))
        raise UsageError("enough")

    monkeypatch.setattr(build, "run_stage_one", run_stage_one)
    (tmp_path / "mine.txt").write_text("my {}\n")
    for word in (str(tmp_path / "mine.txt"), "clip7"):
        assert run("cache-teacher", "--split", "ovcoco_train", "--prompts", word).exit_code == 2
    assert asked == [("file", ("my {}",)), ("clip7", ())]


def test_what_makes_pictograms_is_refused_where_files_are_derived(tmp_path):
    words = ("--size", "small", "--protocol", "coco-like", "--seed", "0")
    done = run("data", "prepare", "lvis", *words, "--data-root", str(tmp_path))
    assert done.exit_code == 2
    assert "no use for --size, --protocol, --seed" in done.stderr
