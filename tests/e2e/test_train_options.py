"""The trainer's options as a user types them."""

import json

import pytest

from dkdetr.experiment_file import dump_toml
from tests.e2e.commands import call, call_well, succeed
from tests.training_world import make_world, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    config = settings(optim={"epochs": 3, "lr_drop_epochs": []}, name="small")
    (world.root / "small.toml").write_text(dump_toml(config))
    return world


def test_a_student_is_trained_shared_and_scored_from_its_file(world) -> None:
    """With all that may be asked for at once; in a process, whose settings go with it."""
    succeed(
        "train", "--cache", str(world.cache), "--experiment", "small.toml", "--run", "runs/a",
        "--device", "cpu", "--pictures-every", "4", "--tensorboard", "--deterministic", "--offline",
        cwd=world.root,
    )  # fmt: skip
    run = world.root / "runs" / "a"
    assert list((run / "pictures").glob("*.png"))
    assert list((run / "tensorboard").iterdir())
    call_well("export", "runs/a", "--ema", "--out", "shared.safetensors", cwd=world.root)
    assert (world.root / "shared.md").is_file()
    split = world.split.replace("train.json", "val.json")
    (world.root / "val.json").write_bytes((world.root / "train.json").read_bytes())
    for subject in (("runs/a", "--ema"), ("shared.safetensors",)):
        call_well("eval", *subject, "--split", split, "--json", "s.json", "--device", "cpu",
                  cwd=world.root)  # fmt: skip
        scores = json.loads((world.root / "s.json").read_text())
        assert ("-ema" in scores["files"]["metrics"]) == (subject[-1] == "--ema")


def test_smoke_and_doctor(world) -> None:
    done = call("train", "--cache", str(world.cache), "--experiment", "small.toml", "--smoke",
                "--device", "cpu", cwd=world.root)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "burn-in, distillation" in done.stderr
    examined = call("doctor", "--json", "-", cwd=world.root)
    assert json.loads(examined.stdout)["healthy"] == (examined.returncode == 0)
