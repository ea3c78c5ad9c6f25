"""Checkpoints, the diary and the run folder: whole or not at all, and never mixed up."""

import json
import pickle  # noqa: TID251  to make the file that must be refused
from pathlib import Path

import numpy as np
import pytest
import torch

import dkdetr.engine.checkpoint as checkpoint_module
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.checkpoint import (
    Checkpoint,
    Progress,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    open_checkpoint,
    save_checkpoint,
)
from dkdetr.engine.metric_log import MetricLog, read_metrics
from dkdetr.engine.run_folder import RunFolder, open_run
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError
from dkdetr.experiment_file import config_from_dict
from tests.faults.checkpoint_killer import numbered

CONFIG = config_from_dict({"name": "x"})


def checkpoint(iteration: int) -> Checkpoint:
    vocabulary = Vocabulary(
        names=("cat", "dog"),
        category_ids=(3, 7),
        is_base=(True, False),
        frequencies=("", ""),
        prompts=("{}",),
        teacher="none",
        embeddings=np.eye(2, 4, dtype=np.float32),
    )
    return Checkpoint(
        student={"weight": torch.full((3,), float(iteration))},
        average={},
        optimizer={"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
        step={},
        progress=Progress(epoch=1, batch=2, iteration=iteration),
        config=CONFIG,
        vocabulary=vocabulary,
        cache_fingerprint="f",
        cache_split="lvis_train",
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, checkpoint(5)))
    wanted = checkpoint(5)
    assert torch.equal(loaded.student["weight"], wanted.student["weight"])
    assert loaded.progress == wanted.progress
    assert loaded.config == CONFIG
    assert loaded.vocabulary.hash == wanted.vocabulary.hash
    assert loaded.optimizer["param_groups"] == [{"lr": 0.1}]


def test_only_the_newest_are_kept(tmp_path) -> None:
    for iteration in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(iteration))
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == [
        "step_00000002.pt",
        "step_00000003.pt",
    ]


def test_leftovers_of_later_iterations_never_push_out_what_is_whole(tmp_path) -> None:
    for iteration in (1, 8, 9):
        save_checkpoint(tmp_path, checkpoint(iteration), keep=9)
    for iteration in (8, 9):
        (tmp_path / f"step_{iteration:08d}.json").unlink()
    saved = save_checkpoint(tmp_path, checkpoint(2))
    assert latest_checkpoint(tmp_path) == saved
    assert len(list(tmp_path.glob("*.pt"))) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "no marker", "bad marker"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(tmp_path, damage) -> None:
    good, bad = (save_checkpoint(tmp_path, checkpoint(i)) for i in (1, 2))
    content = bytearray(bad.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        bad.write_bytes(content)
    elif damage == "cut":
        bad.write_bytes(content[:-10])
    elif damage == "no marker":
        bad.with_suffix(".json").unlink()
    else:
        bad.with_suffix(".json").write_text("{")
    assert latest_checkpoint(tmp_path) == good
    with pytest.raises(CorruptArtefactError, match="step_00000002"):
        load_checkpoint(bad)


def test_a_pickle_is_refused_without_being_run(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    good = save_checkpoint(tmp_path, checkpoint(1))
    torch.save({"format": 1, "student": Evil()}, good, pickle_module=pickle)
    marker = json.loads(good.with_suffix(".json").read_text())
    import xxhash

    marker |= {
        "size": good.stat().st_size,
        "xxh3_128": xxhash.xxh3_128_hexdigest(good.read_bytes()),
    }
    good.with_suffix(".json").write_text(json.dumps(marker))
    with pytest.raises(CorruptArtefactError):
        load_checkpoint(good)
    assert not (tmp_path / "owned").exists()


def test_a_run_without_checkpoint_says_how_to_get_one(tmp_path) -> None:
    with pytest.raises(DataError, match="dkdetr train"):
        find_checkpoint(tmp_path)


def test_the_diary_forgets_what_will_be_done_again(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, after_iteration=0)
    for iteration in (10, 20, 30):
        log.write("train", iteration, {"total": 1.0})
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "iterat')  # a kill in the middle of a line
    MetricLog(path, after_iteration=20).close()
    assert [record["iteration"] for record in read_metrics(path)] == [10, 20]


def test_another_experiment_in_the_same_folder_is_refused(tmp_path) -> None:
    origin = {"cache_fingerprint": "a", "vocabulary_hash": "b"}
    open_run(tmp_path / "run", CONFIG, origin)
    open_run(tmp_path / "run", CONFIG, origin)
    other = config_from_dict({"name": "x", "optim": {"lr": 0.5}})
    with pytest.raises(MismatchError, match=r"optim\.lr: 0\.0008 there, 0\.5 here"):
        open_run(tmp_path / "run", other, origin)
    with pytest.raises(MismatchError, match="another cache"):
        open_run(tmp_path / "run", CONFIG, origin | {"cache_fingerprint": "z"})


def test_a_run_is_what_its_first_checkpoint_began_as(tmp_path) -> None:
    """A start that came to nothing leaves no word; one that came to something cannot be moved."""
    path, origin = tmp_path / "run", {"cache_fingerprint": "a", "vocabulary_hash": "b"}
    afresh = origin | {"started_from": "", "saw_boxes_of": None}
    marked = origin | {"started_from": "runs/other", "saw_boxes_of": "COCO"}
    open_run(path, CONFIG, afresh)
    assert open_run(path, CONFIG, marked).read_provenance() == marked
    save_checkpoint(RunFolder(path).checkpoints, numbered(1))
    assert open_run(path, CONFIG, afresh).read_provenance() == marked
    RunFolder(path).provenance.write_text(json.dumps(afresh))
    with pytest.raises(MismatchError, match=r"began afresh.*'runs/other'.*leave --from out"):
        open_run(path, CONFIG, marked)


def test_leftovers_without_a_marker_do_not_push_out_what_is_whole(tmp_path) -> None:
    for iteration in (5, 6):
        save_checkpoint(tmp_path, checkpoint(iteration))
    (tmp_path / "step_00000006.json").unlink()  # a kill between file and marker
    save_checkpoint(tmp_path, checkpoint(7))
    assert [p.stem for p in sorted(tmp_path.glob("*.pt"))] == ["step_00000005", "step_00000007"]


def test_a_checkpoint_is_hashed_once_when_a_run_is_opened(tmp_path, monkeypatch) -> None:
    for iteration in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", checkpoint(iteration))
    hashed = []
    real = checkpoint_module.hash_file
    monkeypatch.setattr(
        checkpoint_module, "hash_file", lambda path: hashed.append(path.name) or real(path)
    )
    path, opened = open_checkpoint(tmp_path)
    assert (path.name, opened.progress.iteration) == ("step_00000002.pt", 2)
    assert hashed == ["step_00000002.pt"]


def test_a_damaged_newest_is_passed_over_aloud(tmp_path, capsys) -> None:
    for iteration in (1, 2):
        save_checkpoint(tmp_path, checkpoint(iteration))
    newest = tmp_path / "step_00000002.pt"
    newest.write_bytes(newest.read_bytes()[:-10])
    found = load_latest(tmp_path)
    assert found is not None
    assert found[1].progress.iteration == 1
    assert "step_00000002" in capsys.readouterr().err
