"""The kept records of experiments, and their pages, for the tests that compare both."""

import json
import re
from importlib.resources import files
from pathlib import Path
from statistics import mean

EXPERIMENTS = Path(str(files("dkdetr.experiments")))
GROUPS = ("APr", "APc", "APf", "AP")
_SAME = {"layers_all": "both"}  # a row of the same settings is trained once


def rows_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def words_of(name: str) -> str:
    """Returns a page without its line breaks."""
    return " ".join((EXPERIMENTS / name).read_text().split())


def figures(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d*\.\d+", cell)]


def scores(folder: str, row: str, group: str) -> list[float]:
    """Returns a row's percents by seed."""
    kept = sorted((EXPERIMENTS / "results" / folder).glob(f"seed*/{row}/row.json"))
    return [100 * json.loads(path.read_text())["metrics"][group] for path in kept]


def apart(values: list[float], others: list[float]) -> list[float]:
    """Returns what the first have more than the second, by seed."""
    return [mine - its for mine, its in zip(values, others, strict=True)]


def less(folder: str, row: str, other: str, group: str) -> list[float]:
    """Returns what a row has more than another, by seed."""
    return apart(scores(folder, row, group), scores(folder, other, group))


def by_seed(*of: str) -> str:
    return ", ".join(f"{each:+.1f}" for each in less(*of))


def bracket(values: list[float]) -> str:
    return f"{mean(values):+.1f} [{min(values):+.1f}, {max(values):+.1f}]"


def average(*of: str) -> str:
    return f"{mean(less(*of)):+.1f}"


def row_file(folder: Path, run: str, seed: int | str) -> Path:
    """Returns where a row's record lies, if there is one."""
    return folder / f"seed{seed}" / _SAME.get(run, run) / "row.json"


def record(folder: Path, run: str, seed: int | str) -> dict:
    return json.loads(row_file(folder, run, seed).read_text())
