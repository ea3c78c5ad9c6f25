"""The published tables and plots are what `dkdetr ablate` makes of the kept records."""

import csv
import json
import re
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dkdetr.engine.ablation_plot import plot_png
from dkdetr.engine.ablation_results import (
    COLUMNS,
    AblationResult,
    RowResult,
    comma_separated,
    markdown,
)
from dkdetr.engine.ablation_tables import table_of
from tests.kept_records import EXPERIMENTS, record, row_file, rows_of

TABLES = sorted(EXPERIMENTS.glob("results/**/table_*.md"))
# Of these weights of L1 the other rows are those of the longer schedule, copied beside it.
BESIDE = {"small_long_l1": EXPERIMENTS / "results" / "small_long_again"}
# With another release of matplotlib letters may lie elsewhere.
MATPLOTLIB = re.search(
    r"^matplotlib==(\S+)", (EXPERIMENTS.parents[1] / "constraints.txt").read_text(), re.MULTILINE
)


def named(path: Path) -> str:
    return str(path.relative_to(EXPERIMENTS / "results"))


def result_of(path: Path) -> AblationResult:
    """Returns what the records beside a table come to, for the seeds in the table's head."""
    table = table_of(path.stem.removeprefix("table_"))
    head = re.search(r"seeds? \(([\d, ]+)\)", path.read_text())
    assert head
    seeds = tuple(int(seed) for seed in head[1].split(","))
    folders = [f for f in (path.parent, BESIDE.get(path.parent.parent.name)) if f]
    rows = []
    for row in table.rows:
        places = {seed: [f for f in folders if row_file(f, row.run, seed).is_file()]
                  for seed in seeds}  # fmt: skip
        records = {seed: record(f[0], row.run, seed) for seed, f in places.items() if f}
        metrics = {seed: each["metrics"] for seed, each in records.items()}
        names = {seed: each["names"] for seed, each in records.items()}
        rows.append(RowResult(row, metrics, {}, names))
    return AblationResult(table, "", COLUMNS["lvis"], seeds, tuple(rows), ())


@pytest.mark.parametrize("path", TABLES, ids=named)
def test_a_table_is_of_its_records(path: Path):
    """Means, spreads, differences by seed and by name; and what was not run says so."""
    result = result_of(path)
    assert any(row.by_seed for row in result.rows)
    assert rows_of(markdown(result)) == rows_of(path.read_text())
    kept = path.with_suffix(".csv")
    if kept.is_file():
        assert comma_separated(result) == kept.read_text()
        states = {line["state"] for line in csv.DictReader(kept.read_text().splitlines())}
        assert states <= {"done", "not run"}


@pytest.mark.skipif(
    not MATPLOTLIB or version("matplotlib") != MATPLOTLIB[1], reason="drawn by another matplotlib"
)
@pytest.mark.parametrize("name", ["small/table_5", "small_long_again/table_5"])
def test_a_plot_that_the_pages_show_is_of_its_records(name: str):
    path = EXPERIMENTS / "results" / f"{name}.png"
    assert f"](results/{name}.png)" in (EXPERIMENTS / "README.md").read_text()
    drawn = plot_png(result_of(path.with_suffix(".md")), with_paper=False)
    ours, kept = (
        np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in (BytesIO(drawn), path)
    )
    assert ours.shape == kept.shape
    # A dot elsewhere changes hundreds of pixels; rounding of edges changes none by so much.
    assert (np.abs(ours - kept).max(axis=2) > 32).sum() < 20


def test_all_rows_of_a_folder_are_of_one_cache():
    for folder in {path.parent for path in TABLES}:
        caches = {
            json.loads(row.read_text())["cache_fingerprint"] for row in folder.rglob("row.json")
        }
        assert len(caches) == 1, folder


def test_a_kept_row_has_its_commands_and_its_log():
    """As anybody can type them: of no machine's own folders."""
    for path in EXPERIMENTS.glob("results/**/row.json"):
        kept = json.loads(path.read_text())
        train, score = kept["commands"]
        assert train.startswith("dkdetr train --cache cache/")
        assert f"--seed {path.parents[1].name.removeprefix('seed')} " in f"{train} "
        run = re.search(r"--run (\S+)", train)
        assert run
        assert score.startswith(f"dkdetr eval {run[1]} ")
        assert " /" not in train + score
        assert 2 <= len(kept["log"]) <= 8
        assert kept["log"][-1]["iteration"] >= kept["steps"]
    for table in TABLES:
        assert "done" in (table.parent / "ablate_log.txt").read_text(), table


def test_the_pages_show_the_kept_tables():
    pages = "".join((EXPERIMENTS / name).read_text() for name in ("README.md", "STUDIES.md"))
    shown = dict(re.findall(r"<!-- table (\w+) -->(.*?)<!-- end -->", pages, re.DOTALL))
    kept = {path.stem.removeprefix("table_") for path in TABLES if path.parent.name == "small"}
    assert shown.keys() == kept
    for name, text in shown.items():
        kept_table = (EXPERIMENTS / "results" / "small" / f"table_{name}.md").read_text()
        assert rows_of(text) == rows_of(kept_table)
