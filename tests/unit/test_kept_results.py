"""The published tables are those of the kept records, and the pages show the published tables."""

import csv
import json
import re
from importlib.resources import files
from pathlib import Path
from statistics import mean

import pytest

EXPERIMENTS = Path(str(files("dkdetr.experiments")))
TABLES = sorted(EXPERIMENTS.glob("results/*/table_*.csv"))
SAME = {"layers_all": "both"}  # a row of the same settings is trained once
GROUPS = ("APr", "APc", "APf", "AP")


def rows_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def record(folder: Path, run: str, seed: str) -> dict:
    return json.loads((folder / f"seed{seed}" / SAME.get(run, run) / "row.json").read_text())


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_table_is_of_its_records(path: Path):
    lines = list(csv.DictReader(path.read_text().splitlines()))
    done = [line for line in lines if line["state"] == "done"]
    assert done
    for line in done:
        metrics = record(path.parent, line["row"], line["seed"])["metrics"]
        for group in GROUPS:
            assert float(line[group]) == pytest.approx(100 * metrics[group], abs=1e-4)
    shown = {
        row[0]: row[1:] for row in rows_of(path.with_suffix(".md").read_text().split("Less")[0])
    }
    for label in {line["label"] for line in done}:
        of_label = [line for line in done if line["label"] == label]
        for group, cell in zip(GROUPS, shown[label], strict=False):
            average = mean(float(line[group]) for line in of_label)
            assert float(cell.split()[0]) == pytest.approx(average, abs=0.0501)


def test_all_rows_of_a_folder_are_of_one_cache():
    for folder in {path.parent for path in TABLES}:
        caches = {
            json.loads(row.read_text())["cache_fingerprint"] for row in folder.rglob("row.json")
        }
        assert len(caches) == 1, folder


def test_the_pages_show_the_kept_tables():
    pages = "".join((EXPERIMENTS / name).read_text() for name in ("README.md", "STUDIES.md"))
    shown = dict(re.findall(r"<!-- table (\w+) -->(.*?)<!-- end -->", pages, re.DOTALL))
    kept = {path.stem.removeprefix("table_") for path in TABLES if path.parent.name == "small"}
    assert shown.keys() == kept
    for name, text in shown.items():
        kept_table = (EXPERIMENTS / "results" / "small" / f"table_{name}.md").read_text()
        assert rows_of(text) == rows_of(kept_table)
