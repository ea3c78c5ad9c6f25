"""The table that `eval` prints: one line a run, one column a metric, in percent."""

import math
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dkdetr.evaluation.detection_metrics import Metrics

_WIDTH_OF_A_FILE = 160


def format_percent(value: float) -> str:
    """Returns an AP in [0, 1] as papers print it: `13.2`; `-` where there is nothing to average."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def metrics_table(runs: Sequence[tuple[str, Metrics]]) -> Table:
    """Returns the metrics of one or several runs on the same split, side by side."""
    first = runs[0][1]
    assert all(metrics.protocol == first.protocol for _, metrics in runs)
    table = Table(
        title=f"{escape(first.split)}: {first.num_images} images, AP in percent",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption=f"scored by {first.evaluator}",
        caption_justify="left",
    )
    table.add_column("run", overflow="fold")
    for key in first.values:
        table.add_column(key.replace("_", "\n").replace(".", ".\n"), justify="right", no_wrap=True)
    for name, metrics in runs:
        table.add_row(escape(name), *(format_percent(value) for value in metrics.values.values()))
    return table


def print_metrics(runs: Sequence[tuple[str, Metrics]]) -> None:
    """Prints `metrics_table`; whole, too, where the output is no terminal and has no width."""
    is_terminal = sys.stdout.isatty()
    Console(width=None if is_terminal else _WIDTH_OF_A_FILE).print(metrics_table(runs))
