"""The curves of runs as one document, drawn anew from their diaries each time it is asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from dkdetr.evaluation.page_templates import page_environment
from dkdetr.evaluation.report_analysis import loss_charts, score_charts

_ROOMS = {"serve_curves.html": "dkdetr.inference", "charts.html": "dkdetr.evaluation"}


def curves_page(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the HTML document of the scores and losses of runs, by the runs' names."""
    environment = page_environment(_ROOMS)
    runs = [
        {"name": name, "step": int(history[-1]["iteration"]) if history else 0}
        for name, history in histories.items()
    ]
    template = environment.get_template("serve_curves.html")
    told = list(histories.values())
    return template.render(runs=runs, charts=[*score_charts(told), *loss_charts(told)])
