"""What a run's record says of each of its starts."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from dkdetr.engine import run_starts
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.run_starts import note_start
from dkdetr.installation import source_commit

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
COMMIT = "4dd3e30aa2f0a8d2cd6f3ac1ba6c0cdee0d8f2b1"


def test_each_start_is_added_and_the_record_stays(tmp_path: Path, monkeypatch) -> None:
    run = RunFolder(tmp_path)
    run.provenance.write_text('{"torch": "2.0", "saw_boxes_of": null}')  # of an earlier version
    for iteration in (40, 60):
        note_start(run, ALONE, iteration)
    record = run.read_provenance()
    assert (record["torch"], record["saw_boxes_of"]) == ("2.0", None)
    assert [start["iteration"] for start in record["starts"]] == [40, 60]
    start = record["starts"][0]
    assert {"when", "host", "command", "device", "python", "commit", "threads"} <= start.keys()
    assert start["torch"] == torch.__version__
    for package in ("numpy", "hotcoco", "lvis"):  # scores are the latter two's
        assert start["packages"][package] == importlib.metadata.version(package)
    assert start["cuda"] is start["driver"] is None

    def full(*_words: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dkdetr.atomic_file.os.fsync", full)
    with pytest.raises(OSError, match=r"run\.json"):
        note_start(run, ALONE, 80)
    assert run.read_provenance() == record
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]


def test_a_gpu_is_recorded_with_what_drives_it(tmp_path: Path, monkeypatch) -> None:
    run = RunFolder(tmp_path)
    run.provenance.write_text("{}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(run_starts, "nvidia_driver", lambda: "NVRM version 560")
    note_start(run, Ranks(rank=0, world_size=8, device=torch.device("cuda", 0)), 0)
    (start,) = json.loads(run.provenance.read_text())["starts"]
    found = [start[key] for key in ("device", "cuda", "driver", "world_size")]
    assert found == ["a GPU", "12.6", "NVRM version 560", 8]


def test_a_clone_s_commit_is_read_from_its_files(tmp_path: Path) -> None:
    assert source_commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert source_commit(tmp_path) is None  # nothing is committed yet
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{COMMIT} refs/heads/main\n")
    assert source_commit(tmp_path) == COMMIT
    (git / "refs/heads/main").write_text("a" * 40 + "\n")  # newer than what is packed
    assert source_commit(tmp_path) == "a" * 40
    own = git / "worktrees/other"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/main\n")
    (own / "commondir").write_text("../..\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / ".git").write_text(f"gitdir: {own}\n")
    assert source_commit(other) == "a" * 40
    (own / "HEAD").write_text(COMMIT + "\n")
    assert source_commit(other) == COMMIT
