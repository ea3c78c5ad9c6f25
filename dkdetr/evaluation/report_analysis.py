"""The parts of the report that ask why: curves, errors, recall, agreement, examples, losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dkdetr.data.splits import Split
from dkdetr.evaluation.charts import Chart, Line, line_chart
from dkdetr.evaluation.confusion import LEAST_SCORE, ConfusedPair, confused_pairs
from dkdetr.evaluation.curves import (
    ERROR_KINDS,
    RECALL_THRESHOLDS,
    ErrorKind,
    GroupCurve,
    error_kinds,
    group_curves,
)
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.inline_pictures import data_uri
from dkdetr.evaluation.protocols import GROUP_KEYS
from dkdetr.evaluation.results import Results
from dkdetr.evaluation.scored_weights import USUAL_WORDS
from dkdetr.evaluation.verdicts import Judged, Verdict, judge

EXAMPLE_RULE = (
    "Of each run: novel names (all names where none is novel), one example a name. True and false "
    "ones are the name's highest-scored detection of that kind, names in the order of that score; "
    "missed ones are the name's largest object that no detection found. No score is a threshold."
)
CONFUSION_RULE = (
    f"Detections of score {LEAST_SCORE} and more, best first, each claim one object at IoU .50: "
    "one of their name or, where none of their name lies, one of another. Each object is claimed "
    "once."
)
_NUM_PAIRS = 50
_NUM_EXAMPLES = 8
_SIDE = 112
_MARGIN = 0.35
# Whatever else a diary holds (rates, memory, waiting) is no loss.
_LOSSES = ("total", "class", "bbox", "giou", "skd", "rkd_image", "rkd_batch", "kd_margin")


@dataclass(frozen=True)
class Analysis:
    """One run's answers."""

    curves: Sequence[GroupCurve]
    errors: Sequence[ErrorKind]
    confused: Sequence[ConfusedPair]
    examples: Mapping[str, Sequence[dict[str, Any]]]


def analyse(split: Split, truth: GroundTruth, results: Results) -> Analysis:
    """Returns a run's curves, errors, confused names and examples (`true`, `false`, `missed`: crops
    as data)."""
    judged = judge(truth, results)
    return Analysis(
        curves=group_curves(truth, judged),
        errors=error_kinds(truth, judged),
        confused=confused_pairs(truth, results),
        examples=_examples(split, truth, judged),
    )


def precision_charts(analyses: Sequence[Analysis]) -> list[Chart]:
    """Returns a chart a group, one line a run."""
    charts = []
    for place, curve in enumerate(analyses[0].curves):
        if not curve.num_objects:
            continue
        recalls = RECALL_THRESHOLDS.tolist()
        lines = [
            Line(run, list(zip(recalls, each.curves[place].precision.tolist(), strict=True)))
            for run, each in enumerate(analyses, start=1)
        ]
        title = f"{curve.group}: precision over recall, IoU .50"
        charts.append(line_chart(title, "recall", lines, x_range=(0, 1), y_range=(0, 1)))
    return charts


def recall_rows(analyses: Sequence[Analysis]) -> list[dict[str, Any]]:
    """Returns, by group, each run's recall under the right name and under any."""
    return [
        {
            "group": curve.group,
            "num_objects": curve.num_objects,
            "found": [each.curves[place].recall for each in analyses],
            "reached": [each.curves[place].reached for each in analyses],
        }
        for place, curve in enumerate(analyses[0].curves)
        if curve.num_objects
    ]


def error_rows(analyses: Sequence[Analysis]) -> dict[str, Any]:
    """Returns the kinds of errors: share and cost of each run, by group."""
    groups = [curve.group for curve in analyses[0].curves if curve.num_objects]
    shown = [group for group in groups if group in ("all", "novel", "rare")]
    rows = [
        {
            "kind": kind,
            "meaning": meaning,
            "shares": [each.errors[place].share for each in analyses],
            "costs": [[each.errors[place].cost[group] for each in analyses] for group in shown],
        }
        for place, (kind, meaning) in enumerate(ERROR_KINDS.items())
    ]
    return {"groups": shown, "rows": rows}


def confusion_tables(analyses: Sequence[Analysis]) -> list[dict[str, Any]]:
    """Returns each run's most frequent pairs, how many there are in all, and their objects."""
    return [
        {
            "pairs": each.confused[:_NUM_PAIRS],
            "num_pairs": len(each.confused),
            "num_objects": sum(pair.count for pair in each.confused),
        }
        for each in analyses
    ]


def loss_charts(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """Returns a chart for each loss that any run's diary (`metrics.jsonl`) knows."""
    charts = []
    for name in _LOSSES:
        told = [[r for r in history if r.get(name) is not None] for history in histories]
        lines = [
            Line(run, [(float(r["iteration"]), float(r[name])) for r in history])
            for run, history in enumerate(told, start=1)
        ]
        values = [y for line in lines for _, y in line.points]
        if values:
            # The first steps would flatten all that follows: the axis ends at the 98th percentile.
            low, high = float(np.min(values)), float(np.percentile(values, 98))
            y_range = (low, high) if high > low else None
            charts.append(line_chart(name.replace("_", " "), "step", lines, y_range=y_range))
    return charts


def score_charts(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """Returns charts, in percent, for each split that a run was scored on at several steps.

    One for each group of the split's protocol, else one of AP, else of AP50: of VOC there is no
    other. Of the last weights, asked with the usual words (`scored_weights.USUAL_WORDS`) in the
    precision of a run's last scoring, by the lines of kind `eval` in the runs' diaries.
    """
    scored = [
        [
            r
            for r in history
            if r.get("kind") == "eval"
            and not r["averaged"]
            and r.get("words", "own") in USUAL_WORDS
        ]
        for history in histories
    ]
    charts = []
    for split in dict.fromkeys(r["split"] for history in scored for r in history):
        of_split = [_comparable([r for r in own if r["split"] == split]) for own in scored]
        for key in _drawn_keys([r for own in of_split for r in own]):
            told = [[r for r in own if r.get(key) is not None] for own in of_split]
            lines = [
                Line(run, [(float(r["iteration"]), 100 * r[key]) for r in own])
                for run, own in enumerate(told, start=1)
            ]
            if any(len({step for step, _ in line.points}) > 1 for line in lines):
                # One's own split is named by its paths, of which the last file says enough.
                title = f"{key.replace('_', ' ')}, {split.rpartition('/')[2]}"
                charts.append(line_chart(title, "step", lines))
    return charts


def _comparable(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the last record of each step, of those in the precision of the last one."""
    wanted = records[-1].get("precision") if records else None
    alike = [r for r in records if r.get("precision") == wanted]
    return list({r["iteration"]: r for r in alike}.values())


def _drawn_keys(records: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """Returns which numbers of one split are drawn: those of groups tell a protocol."""
    known = {key for record in records for key, value in record.items() if value is not None}
    groups = [key for keys in GROUP_KEYS.values() for key in keys if key in known]
    return groups or [key for key in ("AP", "AP50") if key in known][:1]


def _examples(split: Split, truth: GroundTruth, judged: Judged) -> dict[str, list[dict[str, Any]]]:
    novel = {c.category_id for c in truth.categories if not c.is_base}
    names = {c.category_id: c.name for c in truth.categories}
    wanted = list(novel or names)
    found = judged.verdicts == Verdict.FOUND
    false = ~found & (judged.verdicts != Verdict.IGNORED)
    results = judged.results
    order = np.argsort(-results.scores, kind="stable")
    cutter = _Cutter(split)
    examples: dict[str, list[dict[str, Any]]] = {}
    for kind, chosen in (("true", found), ("false", false)):
        rows = order[chosen[order] & np.isin(results.category_ids[order], wanted)]
        examples[kind] = [
            {
                "name": names[int(results.category_ids[row])],
                "score": f"{results.scores[row]:.2f}".removeprefix("0"),
                "why": Verdict(int(judged.verdicts[row])).name.lower(),
                "is": _name_of_partner(truth, judged, int(row), names),
                "picture": cutter.cut(int(results.image_ids[row]), results.boxes_xywh[row]),
            }
            for row in _first_of_each(rows, results.category_ids)
        ]
    missed = judged.counted & (judged.finder < 0) & np.isin(truth.category_ids, wanted)
    sizes = truth.boxes_xywh[:, 2] * truth.boxes_xywh[:, 3]
    rows = np.argsort(-sizes, kind="stable")
    examples["missed"] = [
        {
            "name": names[int(truth.category_ids[row])],
            "picture": cutter.cut(int(truth.image_ids[row]), truth.boxes_xywh[row]),
        }
        for row in _first_of_each(rows[missed[rows]], truth.category_ids)
    ]
    return examples


def _name_of_partner(truth: GroundTruth, judged: Judged, row: int, names: dict[int, str]) -> str:
    """Returns what the object is that a false name stands on; '' where that is not the error."""
    if judged.verdicts[row] not in (Verdict.CLASSIFICATION, Verdict.BOTH):
        return ""
    return names[int(truth.category_ids[judged.partner[row]])]


def _first_of_each(rows: np.ndarray, ids: np.ndarray) -> list[int]:
    _, first = np.unique(ids[rows], return_index=True)
    return rows[np.sort(first)][:_NUM_EXAMPLES].tolist()


class _Cutter:
    """Cuts boxes with some of their surroundings out of the split's pictures."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def cut(self, image_id: int, box_xywh: np.ndarray) -> dict[str, Any]:
        """Returns the picture as data, and the box in it in hundredths of its sides."""
        image = self._split.image_of(image_id)
        whole = Image.fromarray(self._split.read(image))
        x, y, width, height = box_xywh.tolist()
        # Square, so that crops of all shapes stand in one row.
        side = min(max(width, height, 8.0) * (1 + 2 * _MARGIN), max(image.width, image.height))
        left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
        square = (round(left), round(top), round(left + side), round(top + side))
        view = whole.crop(square).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        inside = [(x - left) / side, (y - top) / side, width / side, height / side]
        return {"uri": data_uri(view), "box": [f"{100 * value:.1f}" for value in inside]}
