"""Where rows run side by side, and what lets them share a GPU, with a stand-in for the service."""

import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from dkdetr import cores
from dkdetr.data.loader import loader_processes
from dkdetr.engine import gpu_sharing, row_places
from dkdetr.engine.gpu_sharing import side_by_side_on_gpus
from dkdetr.engine.row_places import RowPlaces, places_for

# Keeps a file while it runs, as the real one keeps a socket, and writes down what it is told.
CONTROL = """#!{python} -S
import os, pathlib, signal, sys
pipes = pathlib.Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "{usual}"))
with open("{diary}", "a") as diary:
    words = sys.argv[1:] or [sys.stdin.read().strip()]
    print(*words, os.environ.get("CUDA_VISIBLE_DEVICES", "all"), file=diary)
if sys.argv[1:] == ["-d"]:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert {{signal.SIGTERM, signal.SIGHUP}} <= blocked, "a batch system would end it"
    if "{mode}" == "refuses":
        sys.exit("Cannot find a GPU")
    (pipes / "control").touch()
elif not (pipes / "control").exists():
    sys.exit("Cannot find MPS control daemon process")
elif words == ["get_server_list"] and (pipes / "client").exists():
    print(4711)
elif words == ["quit"]:
    (pipes / "control").unlink()
"""

# A process that the service's server has served.
CLIENT = """
import os, pathlib, sys
pipes = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
assert (pipes / "control").exists()
assert sys.argv[1] == "cuda"
(pipes / "client").touch()
"""


@pytest.fixture
def bound_to(monkeypatch: pytest.MonkeyPatch):
    def bind(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(count)))

    return bind


def test_rows_share_cores_and_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, bound_to) -> None:
    def places(device: str, jobs: int | None) -> list[tuple[str | None, str]]:
        found = places_for(device, jobs, most=9).environments
        return [(each.get("CUDA_VISIBLE_DEVICES"), each["OMP_NUM_THREADS"]) for each in found]

    bound_to(6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places("cpu", None) == [(None, "1")] * 6
    monkeypatch.setattr(row_places, "pick_device", lambda _asked: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert places("auto", None) == [("0", "3"), ("1", "3")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert places("auto", 3) == [("5", "2"), ("7", "2"), ("5", "2")]
    assert places("cuda:1", 2) == [(None, "3")] * 2
    asked = ("auto", 2), ("auto", 3), ("cuda:1", 2), ("cpu", 6)
    sharing = [places_for(*each, most=9).share_gpus for each in asked]
    assert sharing == [False, True, True, False]
    # Two rows: two places, which have the cores of eight.
    few = places_for("auto", 8, most=2)
    assert (len(few.environments), few.cores, few.share_gpus) == (2, 3, False)
    # CUDA sees the GPUs before the first that is not there.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,5")
    assert places("auto", None) == [("0", "6")]


def test_loader_processes_are_no_more_than_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, bound_to
) -> None:
    bound_to(16)
    assert [loader_processes(asked) for asked in (0, 8, 40)] == [0, 8, 16]
    # Beside the process itself, of its share of the cores; one at least.
    rows = [places_for("cpu", jobs, most=99).loader_processes for jobs in (2, 8, 16, 40)]
    assert rows == [7, 1, 1, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [loader_processes(asked) for asked in (0, 1, 8)] == [0, 1, 2]
    bound_to(4)
    assert loader_processes(8) == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert cores.cores_at_hand() == 10


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function that puts a stand-in for NVIDIA's command on the path, and its diary."""

    def install(mode: str = "works", trial: str = CLIENT) -> Path:
        programs, diary, usual = tmp_path / "bin", tmp_path / "diary", tmp_path / "usual"
        for folder in (programs, usual):
            folder.mkdir()
        command = programs / "nvidia-cuda-mps-control"
        command.write_text(
            CONTROL.format(python=sys.executable, diary=diary, usual=usual, mode=mode)
        )
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
        monkeypatch.setattr(gpu_sharing, "_TRIAL", trial)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        diary.touch()
        return diary

    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


def test_a_service_of_ones_own_serves_all_gpus_and_ends(
    service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # The trial runs in the service's environment, on the GPUs that rows may see.
    diary = service(trial=CLIENT + "assert os.environ['CUDA_VISIBLE_DEVICES'] == '3'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with side_by_side_on_gpus("cuda") as added:
        folder = Path(added["CUDA_MPS_PIPE_DIRECTORY"])
        assert (folder / "control").exists()
        assert len(str(folder)) + len("/control") <= 107
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert diary.read_text().splitlines() == [
        "get_server_list 3", "-d all", "get_server_list all", "quit all",
    ]  # fmt: skip
    assert not folder.exists()
    assert capfd.readouterr().err == ""


def test_a_row_that_breaks_leaves_no_service_behind(service) -> None:
    diary = service()
    with pytest.raises(KeyboardInterrupt), side_by_side_on_gpus("cuda"):
        raise KeyboardInterrupt
    assert diary.read_text().splitlines()[-1] == "quit all"


def test_a_service_that_runs_already_is_used_and_left_alone(service, tmp_path: Path) -> None:
    diary = service()
    (tmp_path / "usual" / "control").touch()
    with side_by_side_on_gpus("cuda") as added:
        assert added == {}
    assert diary.read_text().splitlines() == ["get_server_list all"]
    assert (tmp_path / "usual" / "control").exists()


@pytest.mark.parametrize(
    ("mode", "trial", "why"),
    [
        ("refuses", CLIENT, "nvidia-cuda-mps-control ended with 1: Cannot find a GPU"),
        ("works", "raise SystemExit('no client')", "ended with 1: no client"),
        ("works", "pass", "went by without it"),  # CUDA says nothing where it reaches no service
        ("works", "import time; time.sleep(60)", "did not come to an end in"),
    ],
)
def test_where_it_does_not_work_rows_take_turns(
    service, mode: str, trial: str, why: str,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    diary = service(mode, trial)
    if "sleep" in trial:
        monkeypatch.setattr(gpu_sharing, "_PATIENCE_S", 2.0)
    with side_by_side_on_gpus("cuda") as added:
        assert added == {}
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("rows on one GPU take turns, which is slower: ")
    assert why in line
    assert diary.read_text().splitlines()[-1] == "quit all"


def test_without_nvidias_command_rows_take_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with side_by_side_on_gpus("cuda") as added:
        assert added == {}
    assert "there is no nvidia-cuda-mps-control here" in capfd.readouterr().err


def test_places_on_no_gpu_share_none() -> None:
    assert not RowPlaces(({}, {}), cores=1, gpus=0).share_gpus
    assert not RowPlaces(({},), cores=1, gpus=1).share_gpus
