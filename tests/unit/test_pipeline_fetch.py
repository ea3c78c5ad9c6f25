"""`dkdetr fetch` from servers of our own: a URL, and a hub as huggingface_hub speaks to one."""

import functools
import hashlib
import json
import socket
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip import pretrained
from safetensors.torch import save_file
from typer.testing import CliRunner

import cli
from dkdetr.errors import DataError
from pipeline import fetch as fetch_module
from pipeline.fetch import fetch, install, places
from pipeline.hub_weights import kept_weights, weights_record
from pipeline.teacher import load_teacher
from tests.e2e.tiny_stage_one import TINY_CLIP

COMMIT = "c" * 40


class Server(SimpleHTTPRequestHandler):
    """Plain files, and /OWNER/NAME/resolve/main/FILE with a hub's headers."""

    def log_message(self, *_):
        pass

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if path.is_file() and "resolve" in self.path:
            self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        super().end_headers()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The weights of a small CLIP on a server; its models by URL and by hub are known."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "tiny-fetch.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-fetch.json")
    torch.manual_seed(0)
    state = open_clip.create_model("tiny-fetch").state_dict()
    hub = folder / "acme/tiny/resolve/main/open_clip_model.safetensors"
    hub.parent.mkdir(parents=True)
    for path in (folder / "weights.safetensors", hub):
        save_file(state, path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def machine(served, tmp_path, monkeypatch):
    """Moves to a machine of this name, where nothing has been fetched yet."""
    tags = {"url": {"url": f"{served}/weights.safetensors"}, "hub": {"hf_hub": "acme/tiny/"}}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-fetch", tags)
    monkeypatch.setattr(constants, "ENDPOINT", served)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        served + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip

    def move(name: str) -> Path:
        home = tmp_path / name
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        return home

    return move


@pytest.fixture
def no_network(monkeypatch):
    def cut():
        def refuse(*_):
            raise AssertionError("a network call")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setenv("DKDETR_OFFLINE", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return cut


@pytest.mark.parametrize("tag", ["url", "hub"])
def test_from_a_server_by_a_bundle_to_a_machine_without_network(machine, no_network, tmp_path, tag):
    spec = f"tiny-fetch:{tag}"
    machine("here")
    fetched = fetch(spec, None, tmp_path / "b.tar", print)
    assert fetched.files == fetched.new
    wanted = load_teacher(spec)
    assert fetch(spec, None, None, print).new == ()
    machine("there")
    no_network()
    with pytest.raises(DataError, match=f"dkdetr fetch --teacher {spec} --bundle"):
        load_teacher(spec)
    installed = install(tmp_path / "b.tar")
    assert installed.files == installed.new == fetched.files
    loaded = load_teacher(spec)
    assert loaded.identity == wanted.identity
    words = ["a cat", "a dog"]
    np.testing.assert_array_equal(loaded.encode_texts(words), wanted.encode_texts(words))
    assert install(tmp_path / "b.tar").new == ()
    # What is there may be bundled without a network.
    fetch(spec, None, tmp_path / "again.tar", print)
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize(
    ("tag", "told"), [("hub", "the hub (acme/tiny), once"), ("url", "weights.safetensors, once")]
)
def test_a_download_is_announced_and_happens_once(machine, capsys, monkeypatch, tag, told):
    machine("here")
    first = load_teacher(f"tiny-fetch:{tag}").weights_file
    said = capsys.readouterr().err
    assert said.count(f"fetching the weights of teacher tiny-fetch:{tag} from ") == 1
    assert told in said
    # Whatever the hub's newest is by now, the teacher stays.
    monkeypatch.setitem(globals(), "COMMIT", "d" * 40)
    assert load_teacher(f"tiny-fetch:{tag}").weights_file == first
    assert "fetching" not in capsys.readouterr().err


def test_a_revision_is_kept_with_the_hash_of_its_weights(machine):
    machine("here")
    path = load_teacher("tiny-fetch:hub").weights_file
    hashed = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert weights_record(path) == hashed | {"hub": f"acme/tiny@{COMMIT}"}
    assert weights_record(path.resolve()) == hashed | {"file": path.resolve().name}
    assert load_teacher("tiny-fetch:random").weights_file is None
    assert weights_record(None) == {}


def test_every_file_that_open_clip_would_take_is_found_where_it_is_kept(machine):
    repository = machine("here") / "hub/models--acme--other"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    assert kept_weights("acme/other/") is None
    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"):
        (snapshot / name).touch()
        where = "acme/other/" if name.startswith("open") else f"acme/other/{name}"
        assert kept_weights(where) == snapshot / name


def test_the_backbone_of_an_experiment(machine, monkeypatch, tmp_path):
    home = machine("here")
    weights = home / "torch/hub/checkpoints/resnet50-0676ba61.pth"

    def downloaded():
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"weights")
        return weights

    monkeypatch.setattr(fetch_module, "fetch_imagenet_weights", downloaded)
    fetched = fetch(None, "lvis_r50_70e", tmp_path / "b.tar", print)
    assert fetched.files == fetched.new == ("torch/resnet50-0676ba61.pth",)
    home = machine("there")
    install(tmp_path / "b.tar")
    there = home / "torch/hub/checkpoints/resnet50-0676ba61.pth"
    assert there.read_bytes() == b"weights"
    assert places()["torch"] == there.parent


def test_what_needs_no_network_is_said(machine, tmp_path):
    machine("here")
    fetched = fetch("pictograms", "pictograms_tiny", tmp_path / "b.tar", print)
    assert fetched.files == ()
    assert not (tmp_path / "b.tar").exists()
    assert "nothing to fetch" in fetched.lines()[0]


def test_as_typed(machine, tmp_path, monkeypatch):
    machine("here")
    monkeypatch.chdir(tmp_path)
    words = ["fetch", "--teacher", "tiny-fetch:url", "--only", "teacher", "--bundle", "b.tar"]
    done = CliRunner().invoke(cli.app, [*words, "--json", "-"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["new"] == ["clip/weights.safetensors"]
    machine("there")
    done = CliRunner().invoke(cli.app, ["fetch", "--from-bundle", "b.tar"])
    assert done.exit_code == 0, done.stderr
    assert "new  clip/weights.safetensors" in done.stdout
    both = CliRunner().invoke(cli.app, [*words, "--from-bundle", "b.tar"])
    assert both.exit_code == 2


@pytest.mark.parametrize("choice", ["--teacher", "--experiment", "--only"])
def test_a_part_of_a_bundle_is_not_put_in_place(choice):
    done = CliRunner().invoke(cli.app, ["fetch", "--from-bundle", "b.tar", choice, "teacher"])
    assert done.exit_code == 2
    assert f"puts all in place, has no use for {choice}" in done.stderr


@pytest.mark.parametrize(("part", "other"), [("teacher", "experiment"), ("backbone", "teacher")])
def test_what_the_other_part_would_be_is_not_asked(part, other):
    done = CliRunner().invoke(cli.app, ["fetch", "--only", part, f"--{other}", "nosuch"])
    assert done.exit_code == 2
    assert f"--only {part} has no use for --{other}" in done.stderr
