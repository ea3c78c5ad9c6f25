"""`--offline` with sockets taken away: the main commands never miss them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT, environment
from tests.e2e.small_coco import write_coco_folder

NO_NETWORK = ROOT / "tests/e2e/no_network"
# All in one process, as a user's shell would run them one after another: imports take seconds.
RUNNER = """
import json, os, sys
import cli
for words in json.loads(sys.argv[1]):
    os.environ.pop("DKDETR_OFFLINE", None)  # what a command before said of itself
    try:
        cli.app(words, prog_name="dkdetr")
    except SystemExit as ended:
        print("ended:", ended.code or 0, *words, file=sys.stderr, flush=True)
"""
ENDED = re.compile(r"^ended: (\d+) .*$", re.MULTILINE)
TINY = [
    "--set", "optim.epochs=1", "--set", "optim.lr_drop_epochs=[]", "--set", "data.image_size=96",
    "--set", "data.batch_size=4", "--set", "student.num_queries=12", "--set", "kd.start_epoch=0",
]  # fmt: skip


def run(folder: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs commands where nothing can be reached and nothing was fetched before."""
    clean = {"HOME": str(folder / "home"), "HF_HOME": str(folder / "home/hf")}
    clean |= {"TORCH_HOME": str(folder / "home/torch")}
    path = {"PYTHONPATH": os.pathsep.join((str(NO_NETWORK), str(ROOT)))}
    (folder / "home").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(commands)], cwd=folder,
        env=environment() | clean | path, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip


def test_the_network_is_gone(tmp_path):
    code = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    env = environment() | {"PYTHONPATH": str(NO_NETWORK)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert "a network call" in done.stderr


def test_the_main_commands_make_no_call(tmp_path):
    train = write_coco_folder(tmp_path, "train2017", num_images=8, seed=1)
    val = write_coco_folder(tmp_path, "val2017", num_images=3, seed=2)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    common = ["--experiment", "trial", *TINY]
    picture = str(next((tmp_path / "val2017").iterdir()).relative_to(tmp_path))
    commands = [
        ["vocab", "build", "names.txt", "-o", "v.vocab", "--teacher", "pictograms"],
        ["cache-teacher", "--split", train, "--out", "c", "--teacher", "pictograms", *common,
         "--fit-epochs", "1", "--keep", "8", "--prompts", "single", "--device", "cpu"],
        ["cache", "verify", "c"],
        ["train", "--cache", "c", "--run", "r", *common, "--device", "cpu"],
        ["eval", "r", "--split", val, "--device", "cpu"],
        ["predict", picture, "--model", "r", "-c", "cat, dog", "--device", "cpu"],
        ["export", "r", "--out", "s.safetensors"],
    ]  # fmt: skip
    done = run(tmp_path, *([*words, "--offline"] for words in commands))
    assert done.returncode == 0, done.stderr
    assert ENDED.findall(done.stderr) == ["0"] * len(commands), done.stderr
    assert "a network call" not in done.stderr
    assert (tmp_path / "predictions/predictions.json").is_file()
    assert (tmp_path / "s.safetensors").is_file()


MISSING = [
    (["vocab", "build", "names.txt", "-o", "v"], 3,
     ("timm/vit_base_patch32_clip_224.openai", "dkdetr fetch")),
    (["fetch"], 3, ("timm/vit_base_patch32_clip_224.openai",)),
    (["fetch", "--only", "backbone"], 3, ("resnet50-0676ba61.pth", "dkdetr fetch --bundle")),
    (["cache", "info", "https://example.org/cache"], 2, ("--offline forbids it",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def told_of_what_is_missing(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which all of MISSING were typed, and what was said; errors lie as N.json."""
    folder = tmp_path_factory.mktemp("missing")
    (folder / "names.txt").write_text("cat\n")
    commands = [
        [*words, "--offline", "--json", f"{number}.json"]
        for number, (words, _, _) in enumerate(MISSING)
    ]
    return folder, run(folder, *commands)


@pytest.mark.parametrize("number", range(len(MISSING)))
def test_what_is_missing_is_named(told_of_what_is_missing, number):
    folder, done = told_of_what_is_missing
    _, code, mentions = MISSING[number]
    assert ENDED.findall(done.stderr) == [str(code) for _, code, _ in MISSING], done.stderr
    said = ENDED.split(done.stderr)[2 * number]
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error [{code}]")
    assert all(mention in last for mention in mentions)
    assert "a network call" not in done.stderr
    told = json.loads((folder / f"{number}.json").read_text())["error"]
    assert told["code"] == code
    assert mentions[0] in told["message"]
