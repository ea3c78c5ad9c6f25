"""`dkdetr fetch` from servers of our own: a URL, and a hub as huggingface_hub speaks to one."""

import dataclasses
import functools
import hashlib
import json
import re
import socket
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from huggingface_hub import constants
from open_clip import pretrained
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torchvision.models import WeightsEnum
from transformers import PreTrainedTokenizerFast, RobertaConfig
from typer.testing import CliRunner

import cli
from dkdetr.errors import CorruptArtefactError, DataError
from dkdetr.inference.hub import student_place
from dkdetr.student.backbone import fetch_imagenet_weights
from pipeline import fetch as fetch_module
from pipeline.fetch import fetch, install, places
from pipeline.hub_weights import kept_weights, weights_record
from pipeline.teacher import load_teacher
from tests.e2e.tiny_stage_one import TINY_CLIP

COMMIT = "c" * 40


class Server(SimpleHTTPRequestHandler):
    """Plain files, and /OWNER/NAME/resolve/main/FILE with a hub's headers."""

    ends_at: ClassVar[int | None] = None
    """Bytes of a body after which the line breaks; None: it holds."""

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        outputfile.write(source.read()[: self.ends_at])

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if path.is_file() and "resolve" in self.path:
            self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        super().end_headers()


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def served(served_folder):
    """The weights of a small CLIP on a server; its models by URL and by hub are known."""
    folder = served_folder
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


def test_a_cut_download_is_never_taken_for_the_whole(machine, monkeypatch):
    home = machine("here")
    wanted = load_teacher("tiny-fetch:hub").identity
    monkeypatch.setattr(Server, "ends_at", 1000)
    with pytest.raises(DataError, match=r"the download was cut: 1,000 of [\d,]+ bytes came"):
        load_teacher("tiny-fetch:url")
    assert [*(home / ".cache/clip").iterdir()] == []
    monkeypatch.setattr(Server, "ends_at", None)
    assert load_teacher("tiny-fetch:url").identity == wanted


def test_a_part_that_lies_in_the_folder_is_fetched_anew(machine, capsys, no_network):
    """open_clip alone, or a kill of it, leaves one under the last name."""
    home = machine("here")
    whole = load_teacher("tiny-fetch:url")
    file = home / ".cache/clip/weights.safetensors"
    assert whole.weights_file == file
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    capsys.readouterr()
    assert load_teacher("tiny-fetch:url").identity == whole.identity
    assert f"is cut: {len(data) - 1:,} bytes, not {len(data):,}), once" in capsys.readouterr().err
    assert file.read_bytes() == data
    file.write_bytes(data[:-1])
    no_network()
    with pytest.raises(DataError, match=r"offline; '.*weights\.safetensors' is cut"):
        load_teacher("tiny-fetch:url")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("portal.pt", "what came is no file of weights: it begins with b'<!DOCTYP'"),
        ("", "names no file"),
        ("?of=portal.pt", "names no file"),
        ("FILE", "is no http or https URL"),
    ],
)
def test_what_is_no_weights_by_its_url_or_its_beginning_is_not_kept(
    machine, served, served_folder, monkeypatch, name, told
):
    home = machine("here")
    portal = served_folder / "portal.pt"
    portal.write_text("<!DOCTYPE html><title>Please log in</title>")
    url = portal.as_uri() if name == "FILE" else f"{served}/{name}"
    monkeypatch.setitem(pretrained._PRETRAINED["tiny-fetch"], "odd", {"url": url})
    with pytest.raises(DataError, match=re.escape(told)):
        load_teacher("tiny-fetch:odd")
    kept = home / ".cache/clip"
    assert not kept.is_dir() or not [*kept.iterdir()]


def test_a_text_tower_and_its_tokenizer_are_announced(machine, served_folder, capsys):
    machine("here")
    words = served_folder / "acme/words/resolve/main"
    config = RobertaConfig(
        vocab_size=3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    config.save_pretrained(words)
    known = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "cat": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=known, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(words)
    text = {"hf_model_name": "acme/words", "hf_tokenizer_name": "acme/words", "hf_proj_type": "mlp"}
    (served_folder / "tiny-words.json").write_text(json.dumps({**TINY_CLIP, "text_cfg": text}))
    open_clip.add_model_config(served_folder / "tiny-words.json")
    load_teacher("tiny-words:random")
    said = capsys.readouterr().err
    for part in ("text tower", "tokenizer"):
        told = f"fetching the {part} of teacher tiny-words:random from the hub (acme/words), once"
        assert said.count(told) == 1
    load_teacher("tiny-words:random")
    assert "fetching" not in capsys.readouterr().err


def test_a_student_is_announced_too(machine, served_folder, capsys):
    machine("here")
    (folder := served_folder / "acme/student/resolve/main").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    for told in (1, 0):
        assert student_place(Path("acme/student")).is_file()
        said = capsys.readouterr().err
        assert said.count("fetching the student acme/student from the hub, once") == told


def test_torchvisions_weights_are_announced_and_fetched_whole(
    machine, served, served_folder, capsys, monkeypatch
):
    home = machine("here")
    torch.save({"x": torch.ones(1000)}, served_folder / "w.pth")
    digest = hashlib.sha256((served_folder / "w.pth").read_bytes()).hexdigest()[:8]
    (served_folder / "w.pth").rename(served_folder / f"resnet50-{digest}.pth")
    real = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.value
    ours = dataclasses.replace(real, url=f"{served}/resnet50-{digest}.pth")
    known = WeightsEnum("ResNet50_Weights", {"IMAGENET1K_V1": ours})
    monkeypatch.setattr(torchvision.models, "ResNet50_Weights", known)
    monkeypatch.setattr(Server, "ends_at", 1000)
    with pytest.raises(CorruptArtefactError, match="invalid hash"):
        fetch_imagenet_weights()
    monkeypatch.setattr(Server, "ends_at", None)
    capsys.readouterr()
    path = fetch_imagenet_weights()
    assert path == home / f"torch/hub/checkpoints/resnet50-{digest}.pth"
    told = f"fetching torchvision's ImageNet weights of ResNet-50 from {ours.url}, once\n"
    assert told in capsys.readouterr().err
    assert fetch_imagenet_weights() == path
    assert "fetching" not in capsys.readouterr().err
    for size in (1000, 30, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CorruptArtefactError, match=f"next: delete '{path}'"):
            fetch_imagenet_weights()
        assert size == path.stat().st_size


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
