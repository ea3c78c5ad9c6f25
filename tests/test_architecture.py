"""The house's rules that the linters of `make test` do not see."""

import re
from pathlib import Path

import pytest

from dkdetr.experiment_file import load_experiment, shipped_experiments

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dkdetr", "pipeline", "cache", "tests")
MAX_LINES = 350
FORBIDDEN_NAMES = {"utils", "util", "misc", "common", "helpers", "helper"}


def python_files() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in found if is_source(path)]


def is_source(path: Path) -> bool:
    """A user's caches may lie in cache/NAME/; they are data."""
    return path.parent == ROOT / "cache" or path.relative_to(ROOT).parts[0] != "cache"


def tracked_texts() -> list[Path]:
    kinds = {".py", ".toml", ".md", ".html", ".yml", ".yaml", ".sh", ".txt", ""}
    folders = [ROOT / name for name in (*PACKAGES, "docker", ".ci") if (ROOT / name).is_dir()]
    inside = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    above = [path for path in ROOT.iterdir() if path.is_file()]
    return [
        path
        for path in (*filter(is_source, inside), *above)
        if path.suffix in kinds and "__pycache__" not in path.parts and path.name != ".git"
    ]


def test_a_file_holds_one_idea():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in python_files()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_no_file_is_named_for_nothing():
    named = [p for p in python_files() if {p.stem, *p.relative_to(ROOT).parts} & FORBIDDEN_NAMES]
    assert not named


def test_packages_re_export_nothing():
    full = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if path.name == "__init__.py" and path.parts[-2] != "dkdetr" and path.read_text().strip()
    ]
    assert not full, "an __init__ that imports hides what a package really needs"


def test_no_text_names_somebodys_machine():
    absolute = re.compile(r"(?<![\w.$}/])/(?:home|work|Users|root|mnt|scratch)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if absolute.search(line) and path != Path(__file__).resolve()
    ]
    assert not found


@pytest.mark.parametrize("name", shipped_experiments())
def test_every_shipped_experiment_loads(name: str):
    resolved = load_experiment(name)
    assert resolved.config.name == name
