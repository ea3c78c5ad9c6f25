"""A student from the hub, with a hub's cache made by hand: the network is never there."""

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from tiny_student import TEXT_DIM, tiny_config, tiny_student

from dkdetr import DKDETR
from dkdetr.data.vocabulary import Vocabulary, save_vocabulary
from dkdetr.errors import DataError, UsageError
from dkdetr.inference.hub import student_place
from dkdetr.student_file import StudentFile, save_student_file
from pipeline.open_vocabulary import load_detector
from pipeline.served_page import PageRequest, open_page

REVISIONS = ("a" * 40, "b" * 40)


def vocabulary(names: tuple[str, ...]) -> Vocabulary:
    many = len(names)
    rows = np.eye(many, TEXT_DIM, dtype=np.float32)
    groups = (tuple(range(1, many + 1)), (True,) * many, ("",) * many)
    return Vocabulary(names, *groups, ("a {}.",), "t", rows)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """A cache as the hub's client leaves it: two revisions of owner/student, main the second."""
    folder = tmp_path / "hub/models--owner--student"
    for revision, names in zip(REVISIONS, (("cat",), ("cat", "dog")), strict=True):
        path = folder / "snapshots" / revision / "model.safetensors"
        path.parent.mkdir(parents=True)
        state = tiny_student().state_dict()
        save_student_file(path, StudentFile(state, tiny_config(), vocabulary(names), {}))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(REVISIONS[1])
    real = huggingface_hub.hf_hub_download

    def download(*args, **kwargs):
        return real(*args, cache_dir=tmp_path / "hub", **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("DKDETR_OFFLINE", "1")
    return tmp_path


def test_a_repository_and_its_revisions(hub):
    assert DKDETR.from_pretrained("owner/student").vocabulary.names == ("cat", "dog")
    pinned = DKDETR.from_pretrained("owner/student", revision=REVISIONS[0])
    assert pinned.vocabulary.names == ("cat",)


def test_what_is_not_there_offline_is_named(hub):
    for name, revision in (("owner/student", "c" * 40), ("owner/other", None)):
        with pytest.raises(DataError, match=f"'{name}'.* offline"):
            DKDETR.from_pretrained(name, revision=revision)


def test_a_file_has_no_revision(hub):
    path = hub / "s.safetensors"
    save_student_file(path, StudentFile({}, tiny_config(), None, {}))
    with pytest.raises(UsageError, match="leave revision=main out"):
        DKDETR.from_pretrained(path, revision="main")


def test_a_vocabularys_file_will_do(hub):
    detector = DKDETR.from_pretrained("owner/student")
    path = hub / "v.vocab"
    save_vocabulary(vocabulary(("cone", "cat", "dog")), path)
    for form in (path, str(path)):
        assert detector.resolve(form).names == ("cone", "cat", "dog")
    with pytest.raises(UsageError, match=r"given as a list: \['cat'\]"):
        detector.resolve("cat")


def test_commands_take_a_repository(hub):
    detector, looked_for = load_detector(Path("owner/student"), None, None, None, "cpu")
    assert detector.vocabulary.names == looked_for.names == ("cat", "dog")
    page = open_page(PageRequest((Path("owner/student"),), device="cpu"))
    assert page.detector.vocabulary.names == ("cat", "dog")
    with pytest.raises(DataError, match=r"'owner/other'.* offline"):
        load_detector(Path("owner/other"), None, None, None, "cpu")


@pytest.mark.parametrize(
    "word", ["runs/mistyped", "away/mistyped", "s.safetensors", "far/last.pt", "absent"]
)
def test_what_is_meant_to_be_here_is_not_asked_of_the_hub(hub, monkeypatch, word: str):
    monkeypatch.chdir(hub)
    Path("away").mkdir()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", pytest.fail)
    assert student_place(Path(word)) == Path(word)
