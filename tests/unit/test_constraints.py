"""The tried versions: one of every package that is asked for, and the images take them."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MACHINES_CHOICE = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")


def pinned() -> dict[str, Version]:
    """Returns the versions by name; each line is NAME==VERSION, without a place or an index."""
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_every_package_that_make_installs_has_a_version_that_is_allowed() -> None:
    (extras,) = re.findall(r"\[\$\(FAISS\),([\w,]+)\]", (ROOT / "Makefile").read_text())
    wanted = list(PROJECT["dependencies"])
    for extra in ("cpu", *extras.split(",")):
        wanted += PROJECT["optional-dependencies"][extra]
    versions = pinned()
    for each in map(Requirement, wanted):
        if not MACHINES_CHOICE.fullmatch(each.name):
            assert versions[canonicalize_name(each.name)] in each.specifier, each


def test_pytorch_and_what_its_builds_bring_are_left_to_the_machine() -> None:
    assert not [name for name in pinned() if MACHINES_CHOICE.fullmatch(name)]
    assert "dkdetr" not in pinned()


def test_every_image_takes_them_on_the_python_they_were_tried_with() -> None:
    image = (ROOT / "docker" / "Dockerfile").read_text()
    installs = re.findall(r"pip install (\S+ \S+) \"\.\[", image)
    assert installs == ["--constraint constraints.txt"] * 3
    assert re.search(r"^COPY .*\bconstraints\.txt\b.* \./$", image, re.MULTILINE)
    (tried,) = re.findall(r"^# .* on Python (3\.\d+)", (ROOT / "constraints.txt").read_text())
    assert re.findall(r"^FROM python:(\S+)-slim", image, re.MULTILINE) == [tried]
