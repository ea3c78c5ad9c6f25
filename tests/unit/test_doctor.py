"""What doctor says of machines that are not this one."""

import os
from pathlib import Path

import pytest

import dkdetr.doctor as doctor
from dkdetr.doctor import Examination, Finding, examine, gpu_findings

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "built", "verdict", "said"),
    [
        ((7, 0), CUDA_13, "problem", "CUDA 12.6"),  # a V100 on today's default build
        ((7, 0), CUDA_126, "ok", "fp16 + scaler"),
        ((8, 0), CUDA_13, "ok", "bf16 in hardware"),
        ((8, 9), CUDA_13, "ok", "bf16"),  # runs what was built for 8.6
        ((9, 0), ["sm_80", "compute_80"], "warning", "newer PyTorch"),
        ((9, 0), ["sm_80"], "problem", "newer PyTorch"),
        ((7, 5), ["sm_70"], "ok", "fp16"),
        ((7, 0), ["sm_75"], "problem", "12.6"),  # kernels of a later minor version do not run
    ],
)
def test_a_gpu_against_a_build(capability, built, verdict, said) -> None:
    findings = gpu_findings("GPU", capability, built, "13.2")
    assert findings[0].verdict == verdict
    assert said in " ".join(each.found + each.advice for each in findings)


def test_two_faiss_are_a_problem(monkeypatch) -> None:
    installed = {"faiss-cpu": "1", "faiss-gpu": "2"}
    monkeypatch.setattr(doctor, "package_version", installed.get)
    finding = doctor._faiss()
    assert finding.verdict == "problem"
    assert "pip uninstall faiss-cpu faiss-gpu" in finding.advice


def test_triton_wants_a_compiler(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    missing = doctor.compiler_finding()
    assert (missing.verdict, "install gcc" in missing.advice) == ("warning", True)
    for name in ("my-cc", "gcc"):
        (tmp_path / name).touch(mode=0o755)
    assert doctor.compiler_finding() == doctor.Finding("C compiler", "ok", "gcc")
    monkeypatch.setenv("CC", "my-cc -m64")
    assert doctor.compiler_finding() == doctor.Finding("C compiler", "ok", "my-cc")
    monkeypatch.setenv("CC", "no-cc")  # Triton asks for no other then
    assert doctor.compiler_finding().verdict == "warning"


def test_little_room_is_named(monkeypatch, tmp_path) -> None:
    class Usage:
        free = 64 << 20

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage)
    assert "--shm-size" in doctor._shared_memory(tmp_path).advice
    runs, cache = doctor._disks(tmp_path / "not" / "there", tmp_path / "not")
    assert "checkpoints" in runs.advice
    assert (cache.verdict, cache.subject) == ("warning", "cache disk")
    assert cache.found.endswith(f"GiB free at {tmp_path}, for caches beside the runs")


@pytest.mark.parametrize(
    ("free_gib", "one_disk", "verdicts"),
    [
        (36, False, ("ok", "ok")),  # 37 GB are 34.5 GiB
        (34, False, ("ok", "warning")),
        (36, True, ("ok", "warning")),  # the runs want 20 of them
        (56, True, ("ok", "ok")),
    ],
)
def test_a_disk_must_hold_all_that_goes_there(
    free_gib, one_disk, verdicts, monkeypatch, tmp_path
) -> None:
    class Usage:
        free = free_gib << 30

    class Other(type(tmp_path)):
        def stat(self, *, follow_symlinks: bool = True):
            found = super().stat(follow_symlinks=follow_symlinks)
            return found if one_disk else os.stat_result([*found[:2], found.st_dev + 1, *found[3:]])

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage)
    findings = doctor._disks(tmp_path, Other(tmp_path))
    assert tuple(each.verdict for each in findings) == verdicts


def test_offline_assets_are_looked_for_where_the_libraries_look(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert doctor._backbone_weights().verdict == doctor._teacher_weights().verdict == "warning"
    weights = tmp_path / "hub" / "checkpoints" / doctor._RESNET
    weights.parent.mkdir(parents=True)
    weights.touch()
    snapshot = tmp_path / "hub" / doctor._TEACHER / "snapshots" / "0f3a"
    snapshot.mkdir(parents=True)
    blob = tmp_path / "blob"
    (snapshot / "open_clip_model.safetensors").symlink_to(blob)
    (snapshot / "open_clip_config.json").touch()
    assert doctor._teacher_weights().verdict == "warning"  # a download that was cut
    blob.touch()
    assert doctor._backbone_weights().verdict == doctor._teacher_weights().verdict == "ok"


def test_a_whole_examination_of_this_machine() -> None:
    found = examine(Path("nowhere"), Path("runs"), Path("cache"))
    subjects = {each.subject for each in found.findings}
    assert {"python", "torch", "gpu", "disk", "cache disk", "shared memory", "faiss", "backbone",
            "teacher", "data"} <= subjects  # fmt: skip
    assert all(each.advice for each in found.findings if each.verdict != "ok")
    assert len(found.lines()) >= len(found.findings)
    assert found.as_json()["healthy"] == found.healthy


def test_warnings_are_not_illness() -> None:
    assert Examination((Finding("disk", "warning", "", "x"),)).healthy
    assert not Examination((Finding("gpu", "problem", "", "x"),)).healthy
