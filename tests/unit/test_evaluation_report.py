import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dkdetr.data.splits import load_split
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.ground_truth import ground_truth_of
from dkdetr.evaluation.labels import place_labels
from dkdetr.evaluation.pictures import choose_images, detected_boxes
from dkdetr.evaluation.report import RunForReport, write_report
from dkdetr.evaluation.results import Results
from dkdetr.evaluation.table import format_percent, metrics_table

EVIL = '<img src=x onerror="alert(1)">&'
CATEGORIES = (
    {"id": 1, "name": EVIL, "frequency": "r"},
    {"id": 2, "name": "cat", "frequency": "f"},
    {"id": 3, "name": "yak", "frequency": "r"},
)


@pytest.fixture
def split(tmp_path):
    """Image 1: cat, yak; 2: yak, yak; 3: cat; 4: the evil name; 5: nothing."""
    names_in = {1: (2, 3), 2: (3, 3), 3: (2,), 4: (1,), 5: ()}
    annotations = []
    for image_id, ids in names_in.items():
        Image.new("RGB", (80, 60), (40 * image_id, 90, 90)).save(tmp_path / f"{image_id}.png")
        for place, category_id in enumerate(ids):
            bbox = [5 + 35 * place, 5, 30, 40]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
                | {"bbox": bbox, "area": 900}
            )
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 60, "width": 80}
        | {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        for i in names_in
    ]
    path = tmp_path / "val.json"
    file = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path.write_text(json.dumps(file))
    return load_split(f"lvis:{tmp_path}:{path}", tmp_path)


def results_of(rows):
    columns = np.array(rows, dtype=float).reshape(-1, 7)
    return Results(
        columns[:, 0].astype(int), columns[:, 1].astype(int), columns[:, 2:6], columns[:, 6]
    )


def test_images_are_chosen_by_novel_names_not_shown_before(split):
    truth = ground_truth_of(split)
    # Novel are the evil name (4) and yak (1, 2): 2 has two of them, then 4 brings a new name.
    assert choose_images(truth, count=10).image_ids == (2, 4, 1)
    assert choose_images(truth, count=1).image_ids == (2,)
    chosen = choose_images(truth, count=9, most_objects=1)
    assert chosen.image_ids == (4,)
    assert "at most 1 objects" in chosen.rule


def test_drawn_boxes_follow_the_rule(split):
    truth = ground_truth_of(split)
    results = results_of(
        [
            (1, 2, 5, 5, 30, 40, 0.5),
            (1, 3, 6, 5, 30, 40, 0.9),  # hides the right one: it overlaps and scores higher
            (1, 3, 41, 6, 30, 40, 0.4),
            (1, 3, 5, 50, 8, 8, 0.3),  # a third, where only two objects are annotated
            (2, 3, 5, 5, 30, 40, 1.0),
        ]
    )
    drawn = detected_boxes(truth, results, 1)
    assert [(box.score, box.name, box.is_novel, box.is_right) for box in drawn] == [
        (0.9, "yak", True, False),
        (0.4, "yak", True, True),
    ]
    assert detected_boxes(truth, results, 5) == []


def test_an_object_is_found_only_once(split):
    truth = ground_truth_of(split)
    twice = [(1, 2, 5, 5, 30, 20.5, 0.9), (1, 2, 5, 24.5, 30, 20.5, 0.8)]
    assert [box.is_right for box in detected_boxes(truth, results_of(twice), 1)] == [True, False]


def test_labels_keep_clear_of_each_other_and_inside():
    boxes = [(10.0, 50.0, 60.0, 90.0), (12.0, 50.0, 70.0, 90.0), (95.0, 0.0, 100.0, 8.0)]
    labels = place_labels(boxes, ["one", "two", "three"], width=100, height=100)
    for label in labels:
        assert label.left >= 0
        assert label.top >= 0
        assert label.left + label.width <= 100.001
        assert label.top + label.height <= 100.001
    assert labels[0].top != labels[1].top


def make_report(split, path, rows, *, notes=()):
    truth = ground_truth_of(split)
    runs = [
        RunForReport(name, note, score(truth, results), results)
        for name, note, results in ((n, o, results_of(r)) for n, o, r in rows)
    ]
    write_report(
        path,
        title="A <title>",
        about=[("Command", "dkdetr demo <now>")],
        split=split,
        truth=truth,
        runs=runs,
        chosen=choose_images(truth, count=3),
        notes=notes,
    )
    return path.read_text(encoding="utf-8")


def test_the_report_is_one_file_that_asks_for_nothing(split, tmp_path):
    rows = [(2, 3, 5, 5, 30, 40, 0.9), (3, 2, 5, 5, 30, 40, 0.8)]
    page = make_report(
        split,
        tmp_path / "deep" / "report.html",
        [("plain", "", []), ("distilled <b>", "same batches", rows)],
        notes=["drawings: <them>, CC BY-SA 4.0"],
    )
    assert "<script" not in page
    for address in re.findall(r'<[^>]*(?:src|href|url)\s*[=(]\s*"?([^"\s)]+)', page):
        assert address.startswith(("data:image/", "#picture")), address
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == 3
    for raw in ("<img", "<title>A <", "distilled <b>", "<them>", "<now>"):
        assert raw not in page
    assert "&lt;img src=x onerror=" in page
    # What it shows is what was measured: the second run found one of two yaks in picture 2.
    assert "found 1 of 2 novel" in page
    assert "found 0 of 2 novel" in page
    assert "without a look at any detection" in page


def test_undefined_metrics_are_a_dash(split, tmp_path):
    page = make_report(split, tmp_path / "report.html", [("only", "", [])])
    assert "<td>-</td>" in page  # no common category
    assert "nan" not in page.lower().replace("annotat", "")
    assert "difference" not in page


def test_the_terminal_table_fits_and_escapes(split):
    truth = ground_truth_of(split)
    metrics = score(truth, results_of([(3, 2, 5, 5, 30, 40, 0.8)]))
    screen = io.StringIO()
    Console(width=80, file=screen).print(metrics_table([("[bold]one", metrics), ("two", metrics)]))
    text = screen.getvalue()
    assert "[bold]one" in text
    for key in ("AP", "AP50", "APr", "APc", "APf"):
        assert key in text
    assert text.count("50.5") == 2  # APf: one of two cats
    assert (format_percent(math.nan), format_percent(0.1234)) == ("-", "12.3")
