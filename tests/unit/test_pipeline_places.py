"""Which words name files, and what becomes of them."""

from pathlib import Path

import pytest

from pipeline.places import (
    absolute_experiment,
    absolute_proposals,
    absolute_split,
    absolute_teacher,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "weights/w.pt").symlink_to(tmp_path / "blob")
    return str(tmp_path)


def test_files_in_words_are_named_from_the_root(here: str) -> None:
    assert absolute_split("ovcoco:a/images:b.json") == f"ovcoco:{here}/a/images:{here}/b.json"
    assert absolute_split("voc:kit:VOC2007/test") == f"voc:{here}/kit:VOC2007/test"
    assert absolute_teacher("ViT-B-32:weights/w.pt") == f"ViT-B-32:{here}/weights/w.pt"
    assert absolute_teacher("ViT-B-32:weights") == f"ViT-B-32:{here}/weights"
    assert absolute_teacher("ViT-B-32:~/w.pt") == f"ViT-B-32:{Path.home()}/w.pt"
    assert absolute_proposals("fit:cache/lvis") == f"fit:{here}/cache/lvis"
    assert absolute_proposals("student:runs/a") == f"student:{here}/runs/a"
    assert absolute_proposals("file:p.pkl?order=image_id&novel=seen") == (
        f"file:{here}/p.pkl?order=image_id&novel=seen"
    )
    assert absolute_experiment("my/own.toml") == f"{here}/my/own.toml"


@pytest.mark.usefixtures("here")
def test_names_and_paths_from_the_root_stay() -> None:
    assert absolute_split("lvis_train") == "lvis_train"
    assert absolute_split("coco:/a/b:/c.json") == "coco:/a/b:/c.json"
    assert absolute_split("coco:nothing") == "coco:nothing"
    for teacher in ("pictograms", "ViT-B-32:openai", "ViT-B-32:random", "ViT-B-32:/a/../w.pt"):
        assert absolute_teacher(teacher) == teacher
    assert absolute_proposals("fit") == "fit"
    assert absolute_proposals("fit:/cache") == "fit:/cache"
    assert absolute_experiment("lvis_r50_70e") == "lvis_r50_70e"
    assert absolute_experiment(None) is None
