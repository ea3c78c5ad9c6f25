"""`dkdetr report` on run folders as train and eval leave them."""

import html
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dkdetr.engine.report_runs import ReportRequest, report_runs
from dkdetr.errors import DataError, UsageError
from dkdetr.evaluation.scored_weights import ScoredWeights
from dkdetr.evaluation.teacher_agreement import GroupAgreement, TeacherAgreement


@pytest.fixture
def world(tmp_path):
    """Two pictures with a frequent cat and a rare yak each, and the split's name."""
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in (1, 2):
        noise = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{image_id}.png")
        for category_id, x in ((2, 5), (3, 45)):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
                | {"bbox": [x, 5, 30, 40], "area": 1200}
            )
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 60, "width": 80}
        | {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        for i in (1, 2)
    ]
    categories = [
        {"id": 2, "name": "cat", "frequency": "f"}, {"id": 3, "name": "yak<", "frequency": "r"}
    ]  # fmt: skip
    path = tmp_path / "val.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return tmp_path, f"lvis:{tmp_path}:{path}"


def make_run(folder, split, rows, *, weight, diary=(), **of_weights):
    scored = folder / "eval" / "val"
    scored.mkdir(parents=True)
    results = [
        {"image_id": i, "category_id": c, "bbox": list(box), "score": s} for i, c, box, s in rows
    ]
    (scored / "results.json").write_text(json.dumps(results))
    (scored / "metrics.json").write_text(json.dumps({"split": split, **of_weights}))
    (folder / "config.toml").write_text(f'name = "trial"\nseed = 0\n[kd.skd]\nweight = {weight}\n')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in diary))
    return folder


def test_the_page_compares_runs_and_says_why(world):
    root, split = world
    yak, cat = (45, 5, 30, 40), (5, 5, 30, 40)
    diary = [{"kind": "train", "iteration": n, "time": 0.0, "total": 9.0 / n} for n in (20, 40)]
    plain = make_run(root / "a", split, [(1, 2, cat, 0.9), (1, 2, yak, 0.8)], weight=0.0)
    rows = [(1, 2, cat, 0.9), (1, 3, yak, 0.8), (2, 3, (45, 5, 30, 16), 0.7)]
    better = make_run(root / "b", split, rows, weight=1.0, diary=diary)
    group = GroupAgreement("all", 12, 0.5, 0.251, 0.0123, math.nan)
    measured = TeacherAgreement("KD queries", "x_val", True, 3, (group,))
    (better / "eval" / "agreement.json").write_text(json.dumps([measured.as_json()]))
    out = root / "page.html"
    assert report_runs(ReportRequest([plain, better], split, out, root)) == out
    page = out.read_text(encoding="utf-8")
    assert "kd.skd.weight" in page
    assert "<td>seed</td>" not in page  # the same in both
    assert "precision over recall" in page
    assert page.count('class="line1"') >= 1
    assert "classification" in page
    assert "localisation" in page
    assert "0.251" in page
    assert "3 held-out images" in page
    assert '<path class="line2"' in page  # only the second has a diary, and keeps its colour
    assert "yak&lt;" in page
    assert "yak<" not in page.replace("yak&lt;", "")
    assert "nan" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page).replace("annotat", "")
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    # Yaks: one found of two; the other has a box near it.
    assert re.search(r"rare</td><td>2</td><td>0\.0</td><td>50\.0</td>", page)


def test_the_page_tells_the_names_taken_for_others(world):
    root, split = world
    annotations = json.loads((root / "val.json").read_text())

    def box_of(number):
        return [4 * (number % 20), 46 + 4 * (number // 20), 3, 3]

    # 51 more names, each of which one of 51 yaks is called; one yak is a cat, twice.
    for number in range(51):
        annotations["categories"].append(
            {"id": 10 + number, "name": f"n{number}", "frequency": "c"}
        )
        bbox = box_of(number)
        annotations["annotations"].append(
            {"id": 100 + number, "image_id": 1, "category_id": 3, "bbox": bbox, "area": 9}
        )
    annotations["images"][0]["neg_category_ids"] = list(range(10, 61))
    (root / "val.json").write_text(json.dumps(annotations))
    rows = [(1, 10 + n, box_of(n), 0.4) for n in range(51)]
    rows += [(i, 2, (45, 5, 30, 40), 0.9) for i in (1, 2)]
    run = make_run(root / "a", split, rows, weight=0.0)
    page = report_runs(ReportRequest([run], split, None, root, num_pictures=0)).read_text()
    assert "53 objects in 52 pairs of names, the first 50" in page
    # 53 yaks: the two that were there and these.
    cells = r"<td>yak&lt;</td><td class=\"left\">{}</td><td>{}</td><td>53</td><td>{}</td>"
    assert re.search(cells.format("cat", 2, "3.8"), page)
    assert re.search(cells.format("n0", 1, "1.9") + r'<td class="left">rare as common</td>', page)
    assert len(re.findall(cells.format(r"\w+", r"\d", ".*?"), page)) == 50
    assert "score 0.3 and more" in page


def test_a_results_file_alone_is_enough(world):
    root, split = world
    run = make_run(root / "a", split, [(1, 2, (5, 5, 30, 40), 0.9)], weight=0.0)
    results = run / "eval" / "val" / "results.json"
    page = report_runs(ReportRequest([results], split, root / "p.html", root))
    assert "Agreement with the teacher" not in page.read_text()
    assert report_runs(ReportRequest([run], split, None, root)) == run / "report.html"


def test_runs_of_one_name_are_told_apart(world):
    root, split = world
    runs = [make_run(root / seed / "both", split, [], weight=0.0) for seed in ("seed0", "seed1")]
    page = report_runs(ReportRequest(runs, split, root / "p.html", root)).read_text()
    assert "seed0/both" in page
    assert "seed1/both" in page


def test_what_was_not_scored_is_refused_with_the_next_command(world):
    root, split = world
    run = make_run(root / "a", "another", [], weight=0.0)
    with pytest.raises(DataError, match="next: dkdetr eval"):
        report_runs(ReportRequest([run], split, None, root))
    with pytest.raises(UsageError):
        report_runs(ReportRequest([], split, None, root))
    with pytest.raises(DataError, match="no run folder"):
        report_runs(ReportRequest([root / "nothing"], None, None, root))


def test_runs_whose_last_folders_are_alike_too_are_told_apart(world):
    root, split = world
    places = ("a/runs/x", "b/runs/x", "b/runs/y")
    runs = [make_run(root / place, split, [], weight=0.0) for place in places]
    asked = [*runs, runs[0]]
    page = report_runs(ReportRequest(asked, split, root / "p.html", root)).read_text()
    assert "<title>a/runs/x, b/runs/x, y, a/runs/x (2)" in page


def test_a_run_scored_with_its_average_alone_says_so(world):
    root, split = world
    run = make_run(root / "a", split, [], weight=0.0)
    plain = run / "eval" / "val"
    shutil.copytree(plain, run / "eval" / "val-ema")
    page = report_runs(ReportRequest([run], split, None, root)).read_text()
    assert "averaged weights" not in page
    shutil.rmtree(plain)
    page = report_runs(ReportRequest([run], split, None, root)).read_text()
    assert "a, averaged weights" in page


def test_a_run_that_was_trained_on_since_its_scores_says_so(world):
    root, split = world
    run = make_run(root / "a", split, [], weight=0.0, iteration=4, words="own")
    (run / "checkpoints").mkdir()
    for step, words in ((4, "trial, scores of step 4"), (8, "of step 4, trained to step 8 since")):
        (run / "checkpoints" / f"step_{step:08d}.json").write_text("{}")
        page = report_runs(ReportRequest([run], split, None, root)).read_text()
        assert f"{words})" in page


def name_of(run, split, root, **said):
    """Returns how the page's columns call a run whose metrics.json says so, and its note."""
    (run / "eval" / "val" / "metrics.json").write_text(json.dumps({"split": split, **said}))
    page = report_runs(ReportRequest([run], split, None, root, num_pictures=0)).read_text()
    name = html.unescape(re.search(r"<th>AP (.*?)</th>", page)[1])
    # Wherever the run is named it is this name: tables, keys, titles.
    assert html.unescape(page).count(f"<th>{name}</th>") >= 2
    note = re.search(r'</i>.*? <span class="small">\((.*?)\)</span>', page)
    return name, html.unescape(note[1])


def test_columns_say_what_the_scores_are_of_where_it_is_not_the_runs_own(world):
    root, split = world
    run = make_run(root / "a", split, [], weight=0.0)
    own = {"words": "own", "vocabulary_hash": "v1", "precision": "fp32"}
    # A run that does not say what it was trained on and with: nothing to compare.
    assert name_of(run, split, root, **own) == ("a", "trial")
    assert name_of(run, split, root) == ("a", "trial, the scores do not say what words were asked")
    (run / "run.json").write_text(json.dumps({"split": "lvis_train", "vocabulary_hash": "v1"}))
    (run / "config.toml").write_text('name = "trial"\n[optim]\nprecision = "fp32"\n')
    names = [
        name_of(run, split, root, **{**own, **other})[0]
        for other in (
            {}, {"words": "split"}, {"words": "clean"}, {"words": "other"},
            {"vocabulary_hash": "v2"}, {"precision": "bf16"},
        )
    ]  # fmt: skip
    there = "a, on val.json"
    others = f"{there}, of other words than the student's own"
    assert names == [
        there,
        f"{there}, asked for the split's own names",
        f"{there}, of names put right (--clean-names)",
        others,
        others,
        f"{there}, of precision bf16, where the student's own is fp32",
    ]


def test_a_run_on_ones_own_pictures_names_no_validation_split_to_compare(world):
    root, split = world
    run = make_run(root / "a", split, [], weight=0.0)
    (run / "run.json").write_text(json.dumps({"split": split}))
    assert name_of(run, split, root, words="own", vocabulary_hash="v")[0] == "a"


def test_an_agreement_of_other_weights_than_the_scores_is_marked(world):
    root, split = world
    group = GroupAgreement("all", 12, 0.5, 0.251, 0.0123, 0.5)
    said = {"weights_xxh3_128": "abc", "words": "own", "vocabulary_hash": "v", "precision": "fp32"}
    run = make_run(root / "a", split, [], weight=0.0, **said)

    def told(weights):
        measured = TeacherAgreement("KD queries", "x_val", True, 3, (group,), weights)
        (run / "eval" / "val" / "agreement.json").write_text(json.dumps([measured.as_json()]))
        page = report_runs(ReportRequest([run], split, None, root, num_pictures=0)).read_text()
        assert ("<td>a *</td>" in page) == ("images of x_val (* " in page)
        return re.search(r"images of x_val(.*?)\. ", page)[1]

    same = ScoredWeights("abc", "v", "own", "fp32", epoch=2, iteration=8)
    assert told(same) == ""
    older = replace(same, xxh3_128="def", epoch=1, iteration=4)
    assert told(older) == " (* of other weights than the scores, those of step 4)"
    assert told(None) == " (* of weights that it does not name)"
    half = " (* of precision bf16, where the scores are of fp32)"
    assert told(replace(same, precision="bf16")) == half
    # Scores of before say less: what they do not say is not compared.
    metrics = run / "eval" / "val" / "metrics.json"
    new = json.loads(metrics.read_text())
    metrics.write_text(json.dumps({key: new[key] for key in new.keys() - {"precision"}}))
    assert told(replace(same, precision="auto")) == ""
    assert told(older) == " (* of other weights than the scores, those of step 4)"
    metrics.write_text(json.dumps({key: new[key] for key in new.keys() - {"weights_xxh3_128"}}))
    assert told(older) == " (* the scores do not name their weights)"
    assert told(None) == " (* of weights that it does not name)"
