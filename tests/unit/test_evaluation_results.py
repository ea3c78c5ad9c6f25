import json

import numpy as np
import pytest

from dkdetr.errors import CorruptArtefactError, DataError
from dkdetr.evaluation.results import read_results
from dkdetr.evaluation.results_writer import ResultsWriter


def write(writer, image_id, scores, category_ids=None):
    n = len(scores)
    boxes = np.tile(np.array([[1, 2, 11.5, 22]], dtype=np.float32), (n, 1))
    labels = np.arange(n) if category_ids is None else np.array(category_ids)
    writer.write(image_id, boxes, np.array(scores, dtype=np.float32), labels)


def test_order_is_canonical_whatever_the_order_of_writing(tmp_path):
    blocks = {5: [0.1, 0.9, 0.9], 2: [0.3], 9: []}
    contents = set()
    for order in ((5, 2, 9), (9, 2, 5)):
        path = tmp_path / f"{order}.json"
        with ResultsWriter(path) as writer:
            for image_id in order:
                write(writer, image_id, blocks[image_id])
            assert writer.num_images == 3
        contents.add(path.read_bytes())
    assert len(contents) == 1
    found = [(r["image_id"], r["category_id"], r["score"]) for r in json.loads(contents.pop())]
    assert found == [(2, 0, 0.3), (5, 1, 0.9), (5, 2, 0.9), (5, 0, 0.1)]


def test_reads_back_what_was_written(tmp_path):
    path = tmp_path / "results.json"
    with ResultsWriter(path) as writer:
        write(writer, 7, [0.25, 0.5], [30, 10])
    results = read_results(path)
    assert results.image_ids.tolist() == [7, 7]
    assert results.category_ids.tolist() == [10, 30]
    assert results.boxes_xywh.tolist() == [[1, 2, 10.5, 20]] * 2
    assert results.scores.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("image_ids", [(), (3,)])
def test_nothing_found_is_an_empty_list(tmp_path, image_ids):
    path = tmp_path / "results.json"
    with ResultsWriter(path) as writer:
        for image_id in image_ids:
            write(writer, image_id, [])
    assert json.loads(path.read_text()) == []
    assert len(read_results(path)) == 0


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    writer = ResultsWriter(path)
    write(writer, 1, [0.5])
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


GOOD = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5.5, 5], "score": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": "1"},
        {"image_id": 1.5},
        {"category_id": None},
        {"bbox": [0, 0, 5]},
        {"bbox": [0, 0, -5, 5]},
        {"bbox": "all"},
        {"score": "high"},
        {"score": None},
    ],
)
def test_bad_records_are_named(tmp_path, change):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, GOOD | change, GOOD]))
    with pytest.raises(DataError, match=r"1 of 3 records .* at index 1\.") as raised:
        read_results(path)
    assert raised.value.exit_code == 3


def test_good_records_may_say_more(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD | {"segmentation": [], "area": 3}]))
    assert len(read_results(path)) == 1


def test_only_twenty_bad_records_are_listed(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{}] * 25))
    with pytest.raises(DataError, match="19 and 5 more"):
        read_results(path)


@pytest.mark.parametrize("text", ["[{", "", '[{"score": NaN}]'])
def test_broken_json_is_corrupt(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(CorruptArtefactError, match="not whole JSON"):
        read_results(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"annotations": []}')
    with pytest.raises(DataError, match="hold a dict"):
        read_results(path)
    with pytest.raises(DataError, match="cannot read"):
        read_results(tmp_path / "absent.json")
