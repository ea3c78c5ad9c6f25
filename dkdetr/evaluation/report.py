"""One self-contained HTML page: what ran, how well, and pictures of what was found.

Nothing in it is fetched from anywhere: pictures are inlined, there are no scripts, and names are
escaped wherever they come from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dkdetr.atomic_file import write_bytes
from dkdetr.data.image_files import read_image
from dkdetr.data.splits import Split
from dkdetr.evaluation.detection_metrics import Metrics
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.inline_pictures import data_uri
from dkdetr.evaluation.labels import place_labels
from dkdetr.evaluation.page_templates import page_environment
from dkdetr.evaluation.pictures import (
    DRAWING_RULE,
    ChosenImages,
    DrawnBox,
    annotated_boxes,
    detected_boxes,
)
from dkdetr.evaluation.protocols import GROUP_KEYS, in_group_order, metric_meaning
from dkdetr.evaluation.report_analysis import (
    CONFUSION_RULE,
    EXAMPLE_RULE,
    analyse,
    confusion_tables,
    error_rows,
    loss_charts,
    precision_charts,
    recall_rows,
    score_charts,
)
from dkdetr.evaluation.results import Results
from dkdetr.evaluation.table import format_percent
from dkdetr.evaluation.teacher_agreement import TeacherAgreement

_LONGEST_SIDE = 800

_TEMPLATES = ("report.html", "report_analysis.html", "charts.html")


@dataclass(frozen=True)
class RunForReport:
    """One column of the report: a run's name, a line on what it is, its numbers and detections.

    `name` says too what the numbers are of where that is not the run's own: it heads every column.
    `history` are the records of its training's diary, `agreement` what was measured of it, and
    `agreement_note` of what weights, if these are not those of the numbers; `settings` are its flat
    settings, of which the report shows those that differ between runs.
    """

    name: str
    note: str
    metrics: Metrics
    results: Results
    history: Sequence[Mapping[str, Any]] = ()
    agreement: Sequence[TeacherAgreement] = ()
    agreement_note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_report(
    path: Path,
    *,
    title: str,
    about: Sequence[tuple[str, str]],
    split: Split,
    truth: GroundTruth,
    runs: Sequence[RunForReport],
    chosen: ChosenImages,
    notes: Sequence[str],
) -> None:
    """Writes the page of one or several runs on the same split.

    Args:
        path: the HTML file, written atomically.
        title: the heading.
        about: (label, value) pairs of what ran: command, versions, machine, date.
        split: where the pictures are.
        truth: its ground truth.
        runs: side by side, in this order; with two, a column shows the second less the first.
        chosen: the images to show and the rule that chose them (`pictures.choose_images`).
        notes: paragraphs at the end: attributions, remarks.

    Raises:
        DataError: a chosen image cannot be read.
    """
    assert runs, "a report needs a run"
    assert all(run.metrics.split == truth.name for run in runs)
    environment = page_environment(dict.fromkeys(_TEMPLATES, "dkdetr.evaluation"))
    environment.filters["percent"] = format_percent
    environment.filters["difference"] = _format_difference
    environment.filters["decimals"] = _format_decimals
    template = environment.get_template("report.html")
    analyses = [analyse(split, truth, run.results) for run in runs]
    histories = [run.history for run in runs]
    pictures = [_picture(split, truth, runs, image_id) for image_id in chosen.image_ids]
    page = template.render(
        title=title,
        about=about,
        truth=truth,
        runs=runs,
        metric_rows=_metric_rows(runs),
        bar_rows=_bar_rows(runs),
        category_groups=_category_groups(runs),
        has_novel=any(not category.is_base for category in truth.categories),
        has_groups=bool(GROUP_KEYS[truth.protocol]),
        is_federated=truth.protocol == "lvis",
        pictures=pictures,
        totals=_totals(pictures, runs),
        choosing_rule=chosen.rule,
        drawing_rule=DRAWING_RULE,
        precision_charts=precision_charts(analyses),
        recall_rows=recall_rows(analyses),
        errors=error_rows(analyses),
        confusions=confusion_tables(analyses),
        confusion_rule=CONFUSION_RULE,
        examples=[each.examples for each in analyses],
        example_rule=EXAMPLE_RULE,
        loss_charts=[*score_charts(histories), *loss_charts(histories)],
        setting_rows=_setting_rows(runs),
        notes=[*dict.fromkeys(note for run in runs for note in run.metrics.notes), *notes],
    )
    write_bytes(path, page.encode())


def _format_difference(values: Sequence[float]) -> str:
    first, second = values
    change = second - first
    return "-" if math.isnan(change) else f"{100 * change:+.1f}"


def _format_decimals(value: float, places: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{places}f}"


def _setting_rows(runs: Sequence[RunForReport]) -> list[dict[str, Any]]:
    """Returns the settings that are not the same in all runs that say theirs."""
    keys = sorted({key for run in runs for key in run.settings})
    table = {key: [run.settings.get(key, "-") for run in runs] for key in keys}
    return [
        {"key": key, "values": values}
        for key, values in table.items()
        if any(value != values[0] for value in values)
    ]


def _format_score(score: float) -> str:
    return f"{score:.2f}".removeprefix("0")


def _metric_rows(runs: Sequence[RunForReport]) -> list[dict[str, Any]]:
    protocol = runs[0].metrics.protocol
    return [
        {
            "key": key,
            "meaning": metric_meaning(key),
            "is_group": key in GROUP_KEYS[protocol],
            "values": [run.metrics.values[key] for run in runs],
        }
        for key in runs[0].metrics.values
    ]


def _bar_rows(runs: Sequence[RunForReport]) -> list[dict[str, Any]]:
    """Returns the bars of the protocol's groups, as shares of the longest of them."""
    metrics = runs[0].metrics
    keys = list(GROUP_KEYS[metrics.protocol]) or ["AP", "AP50", "AP75"]
    # VOC has no AP over thresholds, and a file of masks no boxes.
    keys = [key for key in keys if key in metrics.values] or list(metrics.values)
    table = {key: [run.metrics.values[key] for run in runs] for key in keys}
    defined = [value for row in table.values() for value in row if not math.isnan(value)]
    longest = max(defined, default=0.0) or 1.0
    return [
        {
            "key": key,
            "meaning": metric_meaning(key),
            "bars": [
                {"value": value, "share": 0.0 if math.isnan(value) else 100 * value / longest}
                for value in row
            ],
        }
        for key, row in table.items()
    ]


def _category_groups(runs: Sequence[RunForReport]) -> list[dict[str, Any]]:
    lines = list(zip(*(run.metrics.per_category for run in runs), strict=True))
    groups = in_group_order(line[0].group for line in lines)
    return [
        {
            "name": group or "all",
            "rows": [
                {"name": line[0].name, "num_gt": line[0].num_gt, "values": [one.ap for one in line]}
                for line in sorted(lines, key=lambda line: line[0].name)
                if line[0].group == group
            ],
        }
        for group in groups
    ]


def _picture(
    split: Split, truth: GroundTruth, runs: Sequence[RunForReport], image_id: int
) -> dict[str, Any]:
    image = next(each for each in split.images if each.image_id == image_id)
    objects = annotated_boxes(truth, image_id)
    panels = [_panel("annotated", objects, image.width, image.height)]
    for run in runs:
        drawn = detected_boxes(truth, run.results, image_id)
        panels.append(_panel(run.name, drawn, image.width, image.height))
    return {
        "image_id": image_id,
        "file_name": image.file_name,
        "width": image.width,
        "height": image.height,
        "stroke": image.width / 180,
        "data_uri": _picture_uri(split.image_path(image), (image.height, image.width)),
        "num_novel": sum(box.is_novel for box in objects),
        "num_base": sum(not box.is_novel for box in objects),
        "panels": panels,
    }


def _panel(name: str, boxes: Sequence[DrawnBox], width: int, height: int) -> dict[str, Any]:
    texts = [
        box.name if box.score is None else f"{box.name} {_format_score(box.score)}" for box in boxes
    ]
    labels = place_labels([box.box_xyxy for box in boxes], texts, width=width, height=height)
    right = [box for box in boxes if box.score is not None and box.is_right]
    return {
        "name": name,
        "boxes": list(zip(boxes, labels, strict=True)),
        "found_novel": sum(box.is_novel for box in right),
        "found_base": sum(not box.is_novel for box in right),
    }


def _totals(pictures: Sequence[dict[str, Any]], runs: Sequence[RunForReport]) -> dict[str, Any]:
    return {
        "num_novel": sum(picture["num_novel"] for picture in pictures),
        "num_base": sum(picture["num_base"] for picture in pictures),
        "runs": [
            {
                "name": run.name,
                "novel": sum(p["panels"][place]["found_novel"] for p in pictures),
                "base": sum(p["panels"][place]["found_base"] for p in pictures),
            }
            for place, run in enumerate(runs, start=1)
        ],
    }


def _picture_uri(path: Path, size_hw: tuple[int, int]) -> str:
    picture = Image.fromarray(read_image(path, expected_hw=size_hw))
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return data_uri(picture, png_up_to=256)
