"""Bad input gets one clear line and the documented exit code, and loses nothing."""

import json

import pytest
from typer.testing import CliRunner

import cli
from tests.e2e.small_coco import write_coco_folder


def run(*words: str):
    return CliRunner().invoke(cli.app, list(words))


def assert_refused(result, code: int, *mentions: str) -> None:
    message = result.stderr.partition("error [")[2]
    assert result.exit_code == code, result.stderr or result.output
    assert message.startswith(f"{code}]: ")
    assert "Traceback" not in result.stderr
    for mention in mentions:
        assert mention in message


@pytest.fixture
def coco(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path, write_coco_folder(tmp_path, "train2017", num_images=3, seed=0)


def cache_teacher(split: str, *more: str):
    return run("cache-teacher", "--split", split, "--out", "c", "--teacher", "pictograms",
               "--experiment", "trial", "--keep", "5", *more)  # fmt: skip


def test_unknown_split_names_the_known_ones() -> None:
    assert_refused(run("cache-teacher", "--split", "lviss_train"), 2, "lviss_train", "lvis_train")


def test_unknown_experiment_and_setting() -> None:
    assert_refused(run("config", "show", "lvis"), 2, "lvis_r50_70e")
    wrong = run("config", "show", "lvis_r50_70e", "--set", "kd.skd.wieght=1")
    assert_refused(wrong, 2, "kd.skd.wieght", "weight")


def test_missing_image_folder(coco) -> None:
    folder, split = coco
    (folder / "train2017").rename(folder / "elsewhere")
    assert_refused(cache_teacher(split), 3, "train2017")


def test_missing_images_are_named(coco) -> None:
    folder, split = coco
    (folder / "train2017" / "000002.jpg").unlink()
    assert_refused(cache_teacher(split), 3, "000002.jpg")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"images": []}', b""])
def test_malformed_annotations(coco, content: bytes) -> None:
    folder, split = coco
    (folder / "train2017.json").write_bytes(content)
    assert_refused(cache_teacher(split), 3, "train2017.json")


def test_a_negative_width_is_named_by_its_id(coco) -> None:
    folder, split = coco
    path = folder / "train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][4]["bbox"][2] = -3
    path.write_text(json.dumps(content))
    assert_refused(cache_teacher(split), 3, str(content["annotations"][4]["id"]))


def test_training_from_no_cache_and_from_a_folder_that_is_none(tmp_path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        refused = run("train", "--cache", str(path), "--experiment", "trial")
        assert_refused(refused, 4, "cache-teacher")


def test_evaluating_without_a_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run("eval"), 3, "dkdetr train")
    assert_refused(run("eval", str(tmp_path / "x.pt")), 3, "x.pt")


def test_a_file_that_is_no_checkpoint(tmp_path) -> None:
    path = tmp_path / "step_00000001.pt"
    path.write_bytes(b"not a checkpoint")
    assert_refused(run("eval", str(path)), 5, "marker")


def test_help_lists_the_commands() -> None:
    shown = run("--help").stdout
    for command in ("demo", "cache-teacher", "train", "eval", "cache", "data", "config"):
        assert command in shown
