import json

import numpy as np
import pytest

from dkdetr.errors import CorruptArtefactError, DataError
from dkdetr.evaluation import results as module
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


def mask(size=(4, 6), counts="0h0"):
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    "change",
    [
        {"segmentation": None},
        {"segmentation": []},
        {"segmentation": {"size": [4, 6]}},
        {"segmentation": mask(counts="")},
        {"segmentation": mask(counts="a b")},
        {"segmentation": mask(counts="P")},  # goes on, and there is nothing more
        {"segmentation": mask(counts="ä")},
        {"segmentation": mask(counts="04")},  # does not fill the image
        {"segmentation": mask(counts=[4, 20])},
        {"segmentation": mask(size=(4,))},
        {"segmentation": mask(size=(0, 6))},
        {"segmentation": mask(size=(4.0, 6))},
    ],
)
def test_bad_masks_are_named(tmp_path, change):
    path = tmp_path / "results.json"
    good = {"image_id": 1, "category_id": 2, "segmentation": mask(), "score": 1}
    path.write_text(json.dumps([good, good | change, good]))
    with pytest.raises(DataError, match=r"1 of 3 records .* at index 1\..*compressed RLE"):
        read_results(path)


@pytest.mark.parametrize("layout", [None, 1])
def test_large_files_are_read_in_pieces(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(module, "_PIECE_BYTES", 1000)
    rng = np.random.default_rng(0)
    records = [
        {
            "image_id": index,
            # What looks like the end of a record and is none.
            "extra": [{"a": "},{"}, {"b": "\\"}] if rng.random() < 0.5 else "}, {",
            "category_id": int(rng.integers(90)),
            "bbox": rng.uniform(0, 9, 4).tolist(),
            "score": rng.random(),
        }
        for index in range(500)
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(records, indent=layout))
    found = read_results(path)
    assert found.image_ids.tolist() == list(range(500))
    assert found.boxes_xywh.tolist() == [each["bbox"] for each in records]
    for index in (0, 250, 499):
        broken = [dict(each) for each in records]
        broken[index]["score"] = None
        path.write_text(json.dumps(broken, indent=layout))
        with pytest.raises(DataError, match=rf"1 of 500 records .* at index {index}\."):
            read_results(path)
    path.write_text(json.dumps(records, indent=layout)[:-300])
    with pytest.raises(CorruptArtefactError, match="not whole JSON"):
        read_results(path)


def test_one_writer_takes_over_what_another_holds(tmp_path):
    with ResultsWriter(tmp_path / "whole.json") as whole:
        for image_id in (1, 2, 3, 4):
            write(whole, image_id, [0.1, 0.5][: image_id % 3])
    with ResultsWriter(tmp_path / "first.json") as first:
        write(first, 4, [0.1])
        with ResultsWriter(tmp_path / "other.json", commits=False) as other:
            for image_id in (3, 1, 2):
                write(other, image_id, [0.1, 0.5][: image_id % 3])
            first.absorb(other.places, other.pieces())
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "other.json").exists()
