"""An ablation as a picture: a dot a seed, a bar at the mean, the baseline as a line."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dkdetr.engine.ablation_results import NOT_RUN, AblationResult

_DOT, _MEAN, _PAPER, _SOFT = "#2f6fbd", "#1c1e21", "#d9660a", "#8a929c"


def plot_png(result: AblationResult, *, with_paper: bool) -> bytes:
    """Returns a PNG with one panel a metric and one line a row.

    Args:
        result: what is shown; a row that was not run is named and left empty.
        with_paper: draw the paper's numbers too: only where they are of the same data set.
    """
    figure = Figure(figsize=(3.1 * len(result.columns) + 1.5, 0.42 * len(result.rows) + 1.3))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(result.columns), sharey=True, squeeze=False)[0]
    places = list(range(len(result.rows)))[::-1]
    for panel, key in zip(panels, result.columns, strict=True):
        for place, each in zip(places, result.rows, strict=True):
            values = list(each.values(key).values())
            if values:
                mean = sum(values) / len(values)
                panel.plot(values, [place] * len(values), "o", color=_DOT, alpha=0.55, ms=6)
                panel.plot([mean], [place], "|", color=_MEAN, ms=16, mew=2)
                if each.row.run == result.table.baseline:
                    panel.axvline(mean, color=_SOFT, lw=1, ls="--", zorder=0)
            if with_paper and key in each.row.paper:
                panel.plot([each.row.paper[key]], [place], "D", color=_PAPER, mfc="none", ms=7)
        panel.set_title(key.replace("_", " "), fontsize=10)
        panel.grid(axis="x", color="#e3e4e2", lw=0.7)
        panel.tick_params(labelsize=8, length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.margins(x=0.12)
    labels = [r.row.label + ("" if r.by_seed else f" ({NOT_RUN})") for r in result.rows]
    panels[0].set_yticks(places, labels, fontsize=9)
    panels[0].set_ylim(-0.6, len(places) - 0.4)
    legend = "dot: a seed, bar: mean, dashed: baseline" + (", diamond: paper" if with_paper else "")
    figure.supxlabel(f"AP in percent ({legend})", fontsize=8, color="#63686f")
    figure.suptitle(result.table.title, fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": "dkdetr ablate"})
    return picture.getvalue()
