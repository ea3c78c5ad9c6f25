import json

import pytest

from dkdetr.data.splits import load_split
from dkdetr.errors import DataError
from dkdetr.evaluation.ground_truth import ground_truth_of


def coco_file(tmp_path, annotations):
    path = tmp_path / "val.json"
    images = [{"id": i, "file_name": f"{i}.png", "height": 50, "width": 60} for i in (4, 2)]
    categories = [
        {"id": 7, "name": "cat", "split": "base"},
        {"id": 3, "name": "gnu", "split": "novel"},
    ]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def annotation(number, **more):
    record = {"id": number, "image_id": 4, "category_id": 7, "bbox": [1.1, 2.2, 10.3, 20.7]}
    return record | {"area": 99.5, "iscrowd": 0} | more


def test_the_numbers_of_the_file_are_kept_as_they_are(tmp_path):
    records = [
        annotation(1),
        annotation(2, image_id=2, category_id=3, iscrowd=1),
        annotation(3, bbox=[50.25, 2, 30, 5]),  # stands out of its image
        annotation(4, bbox=[5, 5, 0, 5]),  # has no width
    ]
    path = coco_file(tmp_path, records)
    truth = ground_truth_of(load_split(f"ovcoco:{tmp_path}:{path}", tmp_path))
    assert truth.protocol == "ovcoco"
    assert [c.is_base for c in truth.categories] == [c.name == "cat" for c in truth.categories]
    assert truth.boxes_xywh.tolist() == [r["bbox"] for r in records]
    assert truth.areas.tolist() == [99.5] * 4
    assert truth.is_crowd.tolist() == [False, True, False, False]
    assert truth.of_image(4).tolist() == [0, 2, 3]


def test_missing_areas_are_made_up_for_and_said(tmp_path):
    record = annotation(1)
    del record["area"]
    path = coco_file(tmp_path, [record, annotation(2)])
    truth = ground_truth_of(load_split(f"coco:{tmp_path}:{path}", tmp_path))
    assert truth.areas.tolist() == pytest.approx([10.3 * 20.7, 99.5])
    assert truth.notes[0].startswith("1 boxes have no area")


@pytest.mark.parametrize("area", [None, "3", float("nan"), [1]])
def test_an_area_that_is_no_number_is_refused(area, tmp_path):
    path = coco_file(tmp_path, [annotation(1), annotation(2, area=area)])
    split = load_split(f"coco:{tmp_path}:{path}", tmp_path)
    with pytest.raises(DataError, match="COCO or LVIS form"):
        ground_truth_of(split)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[1, 2, 3, 4]],
        "x",
        {"size": [50, 60]},
        {"size": [50, 60], "counts": 5},
        {"size": [50, 60], "counts": ""},
        {"size": [5, 6], "counts": "0N"},
        [[None] * 6],
    ],
)
def test_an_object_without_an_outline_is_named_where_masks_are_wanted(segmentation, tmp_path):
    good = annotation(1, segmentation=[[1, 1, 9, 1, 9, 9]])
    path = coco_file(tmp_path, [good, annotation(7, segmentation=segmentation)])
    split = load_split(f"coco:{tmp_path}:{path}", tmp_path)
    with pytest.raises(DataError, match=r"1 of 2 annotations have no segmentation.* id 7"):
        ground_truth_of(split, with_masks=True)


def test_a_file_that_changed_since_is_refused(tmp_path):
    path = coco_file(tmp_path, [annotation(1)])
    split = load_split(f"coco:{tmp_path}:{path}", tmp_path)
    for text, words in (("{}", "COCO or LVIS form"), ("[", "not JSON")):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            ground_truth_of(split)
    path.unlink()
    with pytest.raises(DataError, match="no annotation file"):
        ground_truth_of(split)
