"""What an ablation's rows came to: means, spreads and seed-by-seed comparisons, as tables.

Numbers are in percent. The spread is the largest seed's less the smallest one's. What was not run
says so: no cell is filled that no row's record gives.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dkdetr.data.split_sources import Protocol
from dkdetr.engine.ablation_names import GroupScores, NameDifference, difference_by_name
from dkdetr.engine.ablation_tables import AblationTable, TableRow

COLUMNS: Mapping[Protocol, tuple[str, ...]] = {
    "lvis": ("APr", "APc", "APf", "AP"),
    "ovcoco": ("AP50_novel", "AP50_base", "AP50_all", "AP"),
    "coco": ("AP", "AP50", "AP75"),
}
"""What a table shows, by protocol: the novel group first."""

NOT_RUN = "not run"


@dataclass(frozen=True)
class RowResult:
    """A row's metrics in [0, 1] by seed, and why seeds are missing, if a run of them failed."""

    row: TableRow
    by_seed: Mapping[int, Mapping[str, float | None]]
    failures: Mapping[int, str]
    by_name: Mapping[int, GroupScores] = field(default_factory=dict)
    """AP of single names by seed; records of older versions have none."""

    def values(self, key: str) -> dict[int, float]:
        """Returns a metric in percent by seed; seeds for which it is undefined are left out."""
        found = {seed: metrics.get(key) for seed, metrics in self.by_seed.items()}
        return {seed: 100 * value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class AblationResult:
    """A whole table of results; `columns` are the protocol's."""

    table: AblationTable
    subject: str
    """What was ablated on what, in a line."""
    columns: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[RowResult, ...]
    remarks: tuple[str, ...]

    def cell(self, result: RowResult, key: str) -> str:
        """Returns `mean (spread)`, the mean alone of one seed, `failed` or `not run`."""
        values = list(result.values(key).values())
        if not result.by_seed:
            return "failed" if result.failures else NOT_RUN
        if not values:
            return "-"
        mean = sum(values) / len(values)
        spread = f" ({max(values) - min(values):.1f})" if len(values) > 1 else ""
        return f"{mean:.1f}{spread}"

    def seeds_cell(self, result: RowResult) -> str:
        """Returns how many seeds were asked for and how many are there."""
        there = sum(seed in result.by_seed for seed in self.seeds)
        return f"{there}" if there == len(self.seeds) else f"{there} of {len(self.seeds)}"

    def differences(self, result: RowResult, key: str) -> list[float]:
        """Returns row less baseline, seed by seed, for the seeds that both have."""
        baseline = self._baseline()
        if baseline is None:
            return []
        ours, theirs = result.values(key), baseline.values(key)
        return [ours[seed] - theirs[seed] for seed in self.seeds if seed in ours and seed in theirs]

    def difference_cell(self, result: RowResult, key: str) -> str:
        """Returns `mean [least, most]` of the differences; one seed: the difference alone."""
        differences = self.differences(result, key)
        if not differences:
            return NOT_RUN if not result.by_seed else "-"
        mean = sum(differences) / len(differences)
        if len(differences) == 1:
            return _signed(mean)
        return f"{_signed(mean)} [{_signed(min(differences))}, {_signed(max(differences))}]"

    def name_difference(self, result: RowResult, key: str) -> NameDifference | None:
        """Returns row less baseline over a group's names, of the seeds that both have."""
        baseline = self._baseline()
        if baseline is None:
            return None
        scores = [
            (result.by_name[seed].get(key, {}), baseline.by_name[seed].get(key, {}))
            for seed in self.seeds
            if seed in result.by_name and seed in baseline.by_name
        ]
        return difference_by_name(scores)

    def name_cell(self, result: RowResult, key: str) -> str:
        """Returns `mean +- standard error` over names of the difference, in percent."""
        found = self.name_difference(result, key)
        if found is None:
            return NOT_RUN if not result.by_seed else "-"
        return f"{_signed(100 * found.mean)} ± {100 * found.error:.1f}"

    def paper_cell(self, result: RowResult, *, less_baseline: bool = False) -> str:
        """Returns the paper's numbers by column, or what they are above its baseline."""
        paper, baseline = result.row.paper, self._baseline()
        subtract = baseline.row.paper if less_baseline and baseline is not None else {}
        if not paper or (less_baseline and not subtract):
            return "-"
        shown = []
        for key in self.columns:
            value = paper.get(key, math.nan) - (subtract.get(key, math.nan) if subtract else 0)
            written = _signed(value) if less_baseline else f"{value:.1f}"
            shown.append("-" if math.isnan(value) else written)
        return "-" if set(shown) == {"-"} else " / ".join(shown)

    def _baseline(self) -> RowResult | None:
        return next((r for r in self.rows if r.row.run == self.table.baseline), None)


def markdown(result: AblationResult) -> str:
    """Returns the tables as Markdown that reads as plain text too."""
    keys, several = result.columns, len(result.seeds) > 1
    paper = "paper " + " / ".join(keys)
    scores = [
        [
            each.row.label,
            *(result.cell(each, key) for key in keys),
            result.paper_cell(each),
            result.seeds_cell(each),
        ]
        for each in result.rows
    ]
    baseline = next(r.row.label for r in result.rows if r.row.run == result.table.baseline)
    gains = [
        [
            each.row.label,
            *(result.difference_cell(each, key) for key in keys),
            result.paper_cell(each, less_baseline=True),
        ]
        for each in result.rows
        if each.row.run != result.table.baseline
    ]
    by_name = _name_table(result)
    mean = "mean (largest less smallest seed)" if several else "one seed"
    pairs = "mean [least, most] over seeds" if several else "one seed"
    failures = [
        f"failed: {each.row.label}, seed {seed}: {why}"
        for each in result.rows
        for seed, why in each.failures.items()
    ]
    parts = [
        f"# {result.table.title}",
        f"{result.subject}. AP in percent, {mean}.",
        _aligned(["", *keys, paper, "seeds"], scores),
        f"Less '{baseline}' of the same seed, {pairs}:",
        _aligned(["", *keys, "paper"], gains),
        *by_name,
        "The paper's numbers are of R50, 36 epochs, boxes, on LVIS v1 val (AP50: OV-COCO); on "
        "another data set only orders and signs can be compared.",
        *([result.table.note] if result.table.note else []),
        *failures,
        *result.remarks,
    ]
    return "\n\n".join(parts) + "\n"


def _name_table(result: AblationResult) -> list[str]:
    others = [each for each in result.rows if each.row.run != result.table.baseline]
    counts = {
        key: found.names
        for key in result.columns
        for each in others
        if (found := result.name_difference(each, key)) is not None
    }
    if not counts:
        return []
    rows = [[each.row.label, *(result.name_cell(each, key) for key in counts)] for each in others]
    shown = ", ".join(f"{count} in {key}" for key, count in counts.items())
    return [
        f"The same name by name ({shown}), mean ± standard error over names; what another seed "
        "would change is not in it:",
        _aligned(["", *counts], rows),
    ]


def comma_separated(result: AblationResult) -> str:
    """Returns one line a row and seed, in percent; rows that did not run have empty numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    papers = [f"paper_{key}" for key in result.columns]
    writer.writerow(("table", "row", "label", "seed", "state", *result.columns, *papers))
    for each in result.rows:
        paper = [each.row.paper.get(key, "") for key in result.columns]
        for seed in result.seeds:
            metrics = [each.values(key).get(seed) for key in result.columns]
            state = NOT_RUN
            if seed in each.by_seed:
                state = "done"
            elif seed in each.failures:
                state = "failed"
            shown = ["" if value is None else f"{value:.4f}" for value in metrics]
            writer.writerow(
                (result.table.name, each.row.run, each.row.label, seed, state, *shown, *paper)
            )
    return text.getvalue()


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # no -0.0


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])
