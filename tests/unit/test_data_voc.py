import math

import numpy as np
import pytest

from dkdetr.data.problems import Problems
from dkdetr.data.splits import load_split
from dkdetr.data.voc import VOC_NAMES, parse_xml
from dkdetr.errors import DataError, UsageError
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.ground_truth import ground_truth_of
from dkdetr.evaluation.report import RunForReport, _bar_rows
from dkdetr.evaluation.results import Results
from tests.unit.data_world import write_images

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"""


def write_voc(devkit, images, name="test", folder="VOC2007"):
    """`images`: name -> (height, width, [(name, corners, is difficult)])."""
    root = devkit / folder
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / f"ImageSets/Main/{name}.txt").write_text("".join(f"{key}\n" for key in images))
    for key, (height, width, objects) in images.items():
        text = "".join(
            OBJECT.format(*corners, name=what, difficult=int(hard))
            for what, corners, hard in objects
        )
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (root / f"Annotations/{key}.xml").write_text(f"<annotation>{size}{text}</annotation>")
    write_images(root / "JPEGImages", {f"{key}.jpg": value[:2] for key, value in images.items()})


SMALL = {
    "000009": (40, 60, [("cat", (1, 1, 10, 20), False), ("person", (5, 6, 60, 40), True)]),
    "000002": (50, 30, [("tvmonitor", (3, 4, 5, 6), False)]),
}


def test_boxes_are_zero_based_and_hold_their_last_pixel(tmp_path):
    write_voc(tmp_path / "VOCdevkit", SMALL)
    split = load_split("voc2007_test", tmp_path)
    split.require_images()
    assert [(i.image_id, i.file_name, i.height) for i in split.images] == [
        (2, "000002.jpg", 50), (9, "000009.jpg", 40),
    ]  # fmt: skip
    assert [category.name for category in split.categories] == list(VOC_NAMES)
    assert not split.is_train
    assert split.all_boxes(9).boxes_xyxy.tolist() == [[0, 0, 10, 20], [4, 5, 60, 40]]
    assert split.base_boxes(9).category_ids.tolist() == [8]  # the difficult one is not trained on
    truth = ground_truth_of(split)
    assert truth.boxes_xywh.tolist() == [[2, 3, 3, 3], [0, 0, 10, 20], [4, 5, 56, 35]]
    assert truth.is_crowd.tolist() == [False, False, True]
    with pytest.raises(DataError, match="boxes only"):
        ground_truth_of(split, with_masks=True)


def test_a_list_of_ones_own(tmp_path):
    write_voc(tmp_path, {f"2008_00000{i}": SMALL["000002"] for i in (3, 1)}, "mine", "VOC2012")
    split = load_split(f"voc:{tmp_path}:VOC2012/mine", tmp_path)
    assert [image.image_id for image in split.images] == [2008000001, 2008000003]
    assert split.is_train
    same = load_split(f"voc:{tmp_path / 'VOC2012'}:mine.txt", tmp_path)
    assert [image.image_id for image in same.images] == [2008000001, 2008000003]
    for name in ("../mine", "VOC2012/../../x", "a\\b"):
        with pytest.raises(DataError, match="refused"):
            load_split(f"voc:{tmp_path}:{name}", tmp_path)
    for name in ("voc:", "voc:x", "voc::mine"):
        with pytest.raises(UsageError, match="VOCDEVKIT_DIR"):
            load_split(name, tmp_path)
    listed = tmp_path / "VOC2012/ImageSets/Main/mine.txt"
    for text, words in (("", "is empty"), ("a\na\n", "twice: a"), ("../a\n", "refused")):
        listed.write_text(text)
        with pytest.raises(DataError, match=words):
            load_split(f"voc:{tmp_path}:VOC2012/mine", tmp_path)


BAD_FILES = {
    "no XML": "<annotation>",
    "nothing": "",
    "document type": '<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>',
    "system entity": '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
    "no size": "<annotation/>",
    "a size of nothing": "<annotation><size><width>0</width><height>4</height></size></annotation>",
    "deep": "<a>" * 40 + "</a>" * 40,
    "large": "<a>" + " " * (1 << 20) + "</a>",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_and_nothing_else_is_read(kind, tmp_path):
    write_voc(tmp_path, SMALL)
    path = tmp_path / "VOC2007/Annotations/000009.xml"
    path.write_text(BAD_FILES[kind])
    name = f"voc:{tmp_path}:VOC2007/test"
    with pytest.raises(DataError, match=r"000009\.xml") as caught:
        load_split(name, tmp_path)
    assert caught.value.exit_code == 3
    problems = Problems("x")
    assert len(load_split(name, tmp_path, problems).images) == 1
    assert [problem.total for problem in problems.found] == [1]


@pytest.mark.parametrize(
    ("what", "corners"),
    [("dragon", (1, 1, 9, 9)), ("cat", (9, 1, 5, 9)), ("cat", (100, 1, 120, 9)), ("cat", "x1yz")],
)
def test_a_bad_object_is_named(what, corners, tmp_path):
    write_voc(tmp_path, {"7": (40, 60, [(what, corners, False)])})
    with pytest.raises(DataError, match=r"7\.xml"):
        load_split(f"voc:{tmp_path}:VOC2007/test", tmp_path)


def test_files_of_one_fault_are_one_problem(tmp_path):
    images = {f"{number:06d}": (40, 60, [("cat", (1, 1, 9, 9), False)]) for number in range(1, 92)}
    write_voc(tmp_path, images)
    folder = tmp_path / "VOC2007/Annotations"
    for number, name in enumerate(images):
        text = (folder / f"{name}.xml").read_text()
        if number < 40:
            (folder / f"{name}.xml").unlink()
        elif number < 70:
            (folder / f"{name}.xml").write_text(text.replace(">cat<", f">dragon{number}<"))
        elif number < 90:
            (folder / f"{name}.xml").write_text("\n" * number + "<annotation>")
    problems = Problems("x")
    name = f"voc:{tmp_path}:VOC2007/test"
    assert len(load_split(name, tmp_path, problems).images) == 1
    found = {problem.why: problem for problem in problems.found}
    assert [problem.total for problem in found.values()] == [40, 30, 20]
    assert str(found["No such file or directory"]) == (
        "40 records of annotation files: No such file or directory: "
        + ", ".join(f"{number:06d}.xml" for number in range(1, 21)) + " and 20 more"
    )  # fmt: skip
    assert "000041.xml (object 1: 'dragon40')" in str(problems.found[1])
    assert str(tmp_path) not in " ".join(map(str, problems.found))
    with pytest.raises(DataError, match="and 20 more") as raised:
        load_split(name, tmp_path)
    assert len(str(raised.value)) < 4000


def test_a_missing_xml_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.xml"):
        parse_xml(tmp_path / "a.xml")


def plain_voc_ap(truth, results, category_id, threshold):
    """The protocol again, detection by detection, as one reads it in mmdetection's prose."""
    objects = {}
    for image_id, own, box, hard in zip(
        truth.image_ids, truth.category_ids, truth.boxes_xywh, truth.is_crowd, strict=True
    ):
        if own == category_id:
            x, y, w, h = box
            objects.setdefault(image_id, []).append(
                [(x, y, x + w - 1, y + h - 1), bool(hard), False]
            )
    total = sum(not hard for own in objects.values() for _, hard, _ in own)
    if not total:
        return math.nan
    rows = [
        (-score, image_id, index)
        for index, (image_id, own, score) in enumerate(
            zip(results.image_ids, results.category_ids, results.scores, strict=True)
        )
        if own == category_id
    ]
    right = wrong = 0
    curve = []
    for _, image_id, index in sorted(rows):
        x, y, w, h = results.boxes_xywh[index]
        best, best_iou = None, -1.0
        for each in objects.get(image_id, []):
            left, top, r, b = each[0]
            across = min(r, x + w) - max(left, x) + 1
            down = min(b, y + h) - max(top, y) + 1
            shared = max(across, 0) * max(down, 0)
            iou = shared / ((w + 1) * (h + 1) + (r - left + 1) * (b - top + 1) - shared)
            if iou > best_iou:
                best, best_iou = each, iou
        if best is None or best_iou < threshold:
            wrong += 1
        elif not best[1]:
            right, wrong = (right, wrong + 1) if best[2] else (right + 1, wrong)
            best[2] = True
        curve.append((right / total, right / max(right + wrong, 1e-9)))
    steps = [k * 0.1 for k in range(11)]  # 0.1 * 3 is above 3 / 10, as in mmdetection
    return sum(max([p for r, p in curve if r >= step], default=0.0) for step in steps) / 11


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_equals_a_plain_implementation(seed, tmp_path):
    rng = np.random.default_rng(seed)
    names = VOC_NAMES[:4]
    images = {}
    for number in range(1, 13):
        corners = rng.integers(1, 60, size=(int(rng.integers(0, 6)), 2))
        sides = rng.integers(0, 40, size=corners.shape)
        boxes = np.concatenate((corners, corners + sides), axis=1).tolist()
        images[f"{number:06d}"] = (
            100, 100, [(str(rng.choice(names)), box, rng.random() < 0.2) for box in boxes],
        )  # fmt: skip
    write_voc(tmp_path, images)
    truth = ground_truth_of(load_split(f"voc:{tmp_path}:VOC2007/test", tmp_path))
    rows = rng.integers(0, len(truth.image_ids), size=150)
    boxes = np.abs(truth.boxes_xywh[rows] + rng.normal(0, 3, size=(150, 4)).round(1))
    results = Results(
        image_ids=np.where(rng.random(150) < 0.9, truth.image_ids[rows], 1),
        category_ids=np.where(rng.random(150) < 0.9, truth.category_ids[rows], 2),
        boxes_xywh=boxes,
        scores=rng.random(150).round(1),
    )
    metrics = score(truth, results)
    assert list(metrics.values) == ["AP50", "AP75"]
    assert metrics.evaluator.startswith("dkdetr")
    for key, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        plain = [plain_voc_ap(truth, results, c.category_id, threshold) for c in truth.categories]
        assert metrics.values[key] == pytest.approx(np.nanmean(plain), abs=1e-12)
        own = [getattr(line, key.lower()) for line in metrics.per_category]
        assert own == pytest.approx(plain, abs=1e-12, nan_ok=True)
    assert 0.02 < metrics.values["AP75"] < metrics.values["AP50"]
    bars = _bar_rows([RunForReport("one", "", metrics, results)])
    assert [bar["key"] for bar in bars] == ["AP50", "AP75"]
    with pytest.raises(UsageError, match="no official Python package"):
        score(truth, results, evaluator="official")
