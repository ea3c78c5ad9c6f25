"""`make install` installs once, and anew for other versions."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="wants make")


def installs(folder: Path, target: str = "install", **versions: str) -> str:
    """Returns what pip was asked for by a `make` with a stand-in for Python."""
    log = folder / "pip.log"
    log.write_text("")
    clean = {name: value for name, value in os.environ.items()
             if name not in ("TORCH", "FAISS", "MAKEFLAGS")}  # fmt: skip
    command = ["make", target, *(f"{name}={value}" for name, value in versions.items())]
    subprocess.run([*command, "PYTHON=true"], cwd=folder, check=True, env=clean)
    return log.read_text()


def stand_ins(folder: Path, installed: str = "") -> None:
    """Writes a project whose programs note what they are asked for; `pip freeze` says a text."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    (folder / "installed").write_text(installed)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "dkdetr"):
        text = '#!/bin/sh\necho "$@" >> pip.log\n[ "$3" != freeze ] || cat installed\n'
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)


def test_constraints_are_what_is_installed_but_pytorch(tmp_path: Path) -> None:
    stand_ins(tmp_path, "torch==9.9\nnvidia-nccl-cu13==2\ntorchmetrics==1.0\nzarr==3.1.6\n")
    assert "pip freeze --exclude-editable" in installs(tmp_path, "constraints")
    head, *versions = (tmp_path / "constraints.txt").read_text().splitlines()
    assert head.startswith("#")
    assert versions == ["torchmetrics==1.0", "zarr==3.1.6"]


def test_other_versions_install_anew(tmp_path: Path) -> None:
    stand_ins(tmp_path)
    first = installs(tmp_path, "demo")
    assert "install --quiet torch==" in first
    assert "demo" in first
    assert installs(tmp_path) == ""
    other = {"TORCH": "torch==9.9+cu126 torchvision==9.8", "FAISS": "gpu"}
    again = installs(tmp_path, **other)
    assert "install --quiet torch==9.9+cu126 torchvision==9.8" in again
    assert "uninstall -qq --yes faiss-cpu" in again
    assert "[gpu,demo," in again
    assert installs(tmp_path, **other) == ""
    assert installs(tmp_path, **other, PIP_CONSTRAINT="constraints.txt") == again
    assert installs(tmp_path, **other, PIP_CONSTRAINT="constraints.txt") == ""
    assert "install --quiet torch==" in installs(tmp_path)
