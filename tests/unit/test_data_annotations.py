import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dkdetr.data.annotations import read_annotations
from dkdetr.errors import DataError
from tests.unit.data_world import annotation, coco_document, write_json


def read(tmp_path: Path, document, style="coco"):
    return read_annotations(write_json(tmp_path / "a.json", document), style=style)


def test_boxes_are_grouped_by_image_in_file_order(tmp_path):
    document = coco_document(3)
    document["annotations"] = [
        annotation(5, 2, "cat", [1, 2, 3, 4]),
        annotation(9, 1, "dog", [0, 0, 10, 20], iscrowd=1),
        annotation(7, 2, "car", [5.5, 6, 7, 8]),
    ]
    document["images"].reverse()
    found = read(tmp_path, document)
    assert [image.image_id for image in found.images] == [1, 2, 3]
    first, second, third = (found.boxes.of_image(i) for i in range(3))
    assert first.boxes_xyxy.tolist() == [[0, 0, 10, 20]]
    assert first.is_crowd.tolist() == [True]
    np.testing.assert_array_equal(second.boxes_xyxy, [[1, 2, 4, 6], [5.5, 6, 12.5, 14]])
    assert second.boxes_xyxy.dtype == np.float32
    assert second.category_ids.dtype == np.int64
    assert len(third.boxes_xyxy) == 0
    assert found.notes == ()


def test_boxes_over_the_border_are_cut_and_empty_ones_left_out_and_both_are_counted(tmp_path):
    document = coco_document(1)
    document["images"][0] |= {"height": 50, "width": 60}
    document["annotations"] = [
        annotation(1, 1, "cat", [-4, -5, 20, 20]),
        annotation(2, 1, "cat", [50, 40, 10.25, 10]),  # a part of a pixel: rounding, no remark
        annotation(918, 1, "cat", [29.65, 38.33, 1.03, 0.0]),
    ]
    found = read(tmp_path, document)
    assert found.boxes.of_image(0).boxes_xyxy.tolist() == [[0, 0, 16, 15], [50, 40, 60, 50]]
    assert len(found.notes) == 2
    assert found.notes[0].startswith("1 boxes without width")
    assert found.notes[1].startswith("1 boxes stood out")


def test_cutting_polygons_before_parsing_changes_nothing_else():
    document = coco_document(4)
    document["info"] = {"note": 'a "segmentation": [1, 2] in a string stays', "x": [1]}
    document["annotations"][0]["segmentation"] = {"counts": [1, 2, 3], "size": [4, 5]}
    document["annotations"][1] = {"segmentation": [[1, 2.5e-3]], **document["annotations"][1]}
    from dkdetr.data import annotation_file as module

    for text in (json.dumps(document).encode(), orjson.dumps(document)):
        cut = orjson.loads(module._POLYGONS.sub(b'"segmentation":null', text))
        assert cut["annotations"][0]["segmentation"] == {"counts": [1, 2, 3], "size": [4, 5]}
        assert cut["annotations"][1]["segmentation"] is None
        for record in (*cut["annotations"], *document["annotations"]):
            record.pop("segmentation", None)
        assert cut == document
        document["annotations"][0]["segmentation"] = {"counts": [1, 2, 3], "size": [4, 5]}
        document["annotations"][1]["segmentation"] = [[1, 2]]


def _set(table, index, key, value):
    def mutate(document):
        document[table][index][key] = value

    return mutate


def _delete(table, index, key):
    def mutate(document):
        del document[table][index][key]

    return mutate


def _top(key, value):
    def mutate(document):
        document[key] = value

    return mutate


THIRD = "/annotations/2 (id 3)"

MUTATIONS = {
    "no images": (_top("images", []), "images"),
    "images an object": (_top("images", {}), "no list 'images'"),
    "annotations null": (_top("annotations", None), "no list 'annotations'"),
    "categories a string": (_top("categories", "x"), "no list 'categories'"),
    "an image a number": (lambda d: d["images"].append(3), "/images/4"),
    "an annotation a list": (lambda d: d["annotations"].append([]), "/annotations/13"),
    "a category null": (lambda d: d["categories"].append(None), "/categories/66"),
    "image id twice": (_set("images", 1, "id", 1), "more than once"),
    "annotation id twice": (_set("annotations", 1, "id", 1), "more than once"),
    "category id twice": (_set("categories", 1, "id", 1), "more than once"),
    "image id text": (_set("images", 0, "id", "1"), "/images/0"),
    "image id true": (_set("images", 0, "id", True), "/images/0"),
    "image id missing": (_delete("images", 2, "id"), "/images/2"),
    "image id huge": (_set("images", 0, "id", 2**63), "64 bits"),
    "height zero": (_set("images", 3, "height", 0), "(id 4)"),
    "width negative": (_set("images", 3, "width", -5), "(id 4)"),
    "width fraction": (_set("images", 3, "width", 5.5), "(id 4)"),
    "width missing": (_delete("images", 0, "width"), "(id 1)"),
    "file name missing": (_delete("images", 0, "file_name"), "no 'file_name'"),
    "file name a number": (_set("images", 0, "file_name", 7), "no 'file_name'"),
    "file name empty": (_set("images", 0, "file_name", ""), "no 'file_name'"),
    "category name missing": (_delete("categories", 4, "name"), "no name: /categories/4 (id 5)"),
    "category name a list": (_set("categories", 4, "name", []), "no name: /categories/4 (id 5)"),
    "category name blank": (_set("categories", 4, "name", " "), "no name: /categories/4 (id 5)"),
    "unknown category": (
        _set("annotations", 2, "category_id", 900),
        "unknown category_id: /annotations/2 (id 3)",
    ),
    "unknown image": (
        _set("annotations", 2, "image_id", 900),
        "unknown image_id: /annotations/2 (id 3)",
    ),
    "category a fraction": (_set("annotations", 2, "category_id", 1.0), "(id 3)"),
    "image id of box missing": (_delete("annotations", 2, "image_id"), "(id 3)"),
    "box missing": (_delete("annotations", 2, "bbox"), "(id 3)"),
    "box of three": (_set("annotations", 2, "bbox", [1, 2, 3]), "(id 3)"),
    "box of five": (_set("annotations", 2, "bbox", [1, 2, 3, 4, 5]), "(id 3)"),
    "box text": (_set("annotations", 2, "bbox", "1 2 3 4"), "(id 3)"),
    "box with null": (_set("annotations", 2, "bbox", [1, 2, None, 4]), "(id 3)"),
    "box with true": (_set("annotations", 2, "bbox", [1, 2, True, 4]), "(id 3)"),
    "box nested": (_set("annotations", 2, "bbox", [1, 2, [3], 4]), "(id 3)"),
    "negative width": (_set("annotations", 2, "bbox", [9, 9, -3, 4]), "negative"),
    "not a number": (
        _set("annotations", 2, "bbox", [1, 2, float("nan"), 4]),
        "not finite: /annotations/2 (id 3)",
    ),
    "infinite": (
        _set("annotations", 2, "bbox", [1, 2, float("inf"), 4]),
        "not finite: /annotations/2 (id 3)",
    ),
    "right of image": (
        _set("annotations", 2, "bbox", [500, 2, 5, 5]),
        "outside its image: /annotations/2 (id 3)",
    ),
    "above image": (
        _set("annotations", 2, "bbox", [5, -9, 5, 5]),
        "outside its image: /annotations/2 (id 3)",
    ),
    "crowd 2": (_set("annotations", 2, "iscrowd", 2), "iscrowd"),
    "crowd text": (_set("annotations", 2, "iscrowd", "no"), "iscrowd"),
    "crowd a list": (_set("annotations", 2, "iscrowd", []), "iscrowd"),
}


@pytest.mark.parametrize("kind", MUTATIONS)
def test_each_kind_of_bad_record_is_named(kind, tmp_path):
    mutate, expected = MUTATIONS[kind]
    document = coco_document(4)
    mutate(document)
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        read(tmp_path, document)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert "a.json" in str(caught.value)


def test_twenty_ids_are_shown_and_all_are_counted(tmp_path):
    document = coco_document(30)
    for record in document["annotations"][:50]:
        record["category_id"] = 900
    with pytest.raises(DataError, match=r"50 records.* \(id 20\) and 30 more") as caught:
        read(tmp_path, document)
    assert "id 21" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"{} x", b"\xff\xfe", b'{"images": NaN'])
def test_what_is_no_annotation_file_is_said_in_one_line(text, tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=r"broken\.json"):
        read_annotations(path, style="coco")


def test_a_missing_file_and_a_folder_are_said_in_one_line(tmp_path):
    with pytest.raises(DataError, match="no annotation file"):
        read_annotations(tmp_path / "no.json", style="coco")
    with pytest.raises(DataError, match="cannot read"):
        read_annotations(tmp_path, style="coco")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_value_anywhere_is_read_or_refused_but_never_crashes(data, tmp_path):
    document = copy.deepcopy(coco_document(2))
    style = data.draw(st.sampled_from(["coco", "lvis"]))
    for image in document["images"]:
        image |= {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
    table = data.draw(st.sampled_from(["images", "annotations", "categories"]))
    record = data.draw(st.sampled_from(document[table]))
    key = data.draw(st.sampled_from(sorted(record)))
    record[key] = data.draw(JSON_VALUES)
    try:
        found = read(tmp_path, document, style)
    except DataError:
        return
    assert np.isfinite(found.boxes.boxes_xyxy).all()
    assert (found.boxes.boxes_xyxy[:, 2:] > found.boxes.boxes_xyxy[:, :2]).all()


def test_lvis_paths_come_from_the_url_and_federated_lists_are_needed(tmp_path):
    document = coco_document(2)
    lists = {"neg_category_ids": [3, 1], "not_exhaustive_category_ids": [2]}
    document["images"][0] |= lists
    document["images"][0] |= {"coco_url": "http://images.cocodataset.org/val2017/000000000009.jpg"}
    document["images"][1] |= lists
    found = read(tmp_path, document, "lvis")
    assert found.images[0].file_name == "val2017/000000000009.jpg"
    assert found.images[0].neg_category_ids == (3, 1)
    assert found.images[0].not_exhaustive_category_ids == (2,)
    assert found.images[1].file_name == "2.png"
    del document["images"][1]["neg_category_ids"]
    with pytest.raises(DataError, match=r"neg_category_ids.*\(id 2\)"):
        read(tmp_path, document, "lvis")


@pytest.mark.skipif("DKDETR_TEST_COCO" not in os.environ, reason="DKDETR_TEST_COCO is not set")
@pytest.mark.parametrize("part", ["train2017", "val2017"])
def test_real_coco_files_read_as_the_standard_library_reads_them(part):
    path = Path(os.environ["DKDETR_TEST_COCO"]) / "annotations" / f"instances_{part}.json"
    plain = json.loads(path.read_text())
    found = read_annotations(path, style="coco")
    assert len(found.images) == len(plain["images"])
    real = [each for each in plain["annotations"] if min(each["bbox"][2:]) > 0]
    assert len(found.boxes.category_ids) == len(real)
    by_image = {image.image_id: i for i, image in enumerate(found.images)}
    sums = {image.image_id: 0.0 for image in found.images}
    for each in real:
        sums[each["image_id"]] += sum(each["bbox"][:2])
    for image_id, expected in sums.items():
        boxes = found.boxes.of_image(by_image[image_id]).boxes_xyxy
        assert boxes[:, :2].sum() == pytest.approx(expected, rel=1e-4, abs=0.5)


def test_reading_lvis_keeps_to_its_share_of_three_gigabytes():
    # The whole of it: python -m tests.benchmarks.annotations.
    program = Path(__file__).parents[1] / "benchmarks/annotations.py"
    command = [sys.executable, program, "--annotations", "65000", "--images", "5000"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, before = re.search(r"peak ([\d.]+) GB \(before: ([\d.]+)\)", said).groups()
    assert said.startswith("65,000 boxes of 5,000 images")
    assert float(peak) - float(before) < 3 * 65_000 / 1.3e6
