import hashlib
import os
from pathlib import Path

import orjson
import pytest

from dkdetr.data.cached_split import load_cached_split
from dkdetr.data.coco_names import OVCOCO_BASE, OVCOCO_NOVEL
from dkdetr.data.split_sources import known_splits, list_splits
from dkdetr.data.splits import load_split
from dkdetr.errors import DataError, UsageError
from tests.unit.data_world import (
    annotation,
    category_id,
    coco_document,
    write_images,
    write_json,
    write_world,
)

NOWHERE = Path("/nonexistent")


def test_ovcoco_names_are_the_published_48_and_17():
    assert len(OVCOCO_BASE) == 48
    assert len(OVCOCO_NOVEL) == 17
    assert not OVCOCO_BASE & OVCOCO_NOVEL
    novel = (
        "airplane bus cake cat couch cow cup dog elephant keyboard knife scissors sink skateboard "
        "snowboard tie umbrella"
    )
    assert " ".join(sorted(OVCOCO_NOVEL)) == novel
    base = "\n".join(sorted(OVCOCO_BASE)).encode()
    assert hashlib.sha256(base).hexdigest()[:16] == "cf4db8f336c46d76"


def test_every_documented_name_is_known():
    assert set(known_splits()) >= {
        "lvis_train", "lvis_val", "lvis_minival", "ovcoco_train", "ovcoco_val", "ovcoco_val5k",
        "coco_train", "coco_val", "objects365_val", "voc2007_test", "pictograms_tiny_train",
        "pictograms_full_val",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["lvis", "lvis_v1_train", "", "pictograms_huge_train", "pictograms_tiny_test"]
)
def test_an_unknown_split_lists_the_known_ones(name):
    with pytest.raises(UsageError, match=r"ovcoco_val5k.*coco:IMAGES_DIR:ANNOTATIONS\.json"):
        load_split(name, NOWHERE)


@pytest.mark.parametrize("name", ["voc:a", "coco:", "coco:x", "ovcoco:a:", "lvis::b", ":a:b"])
def test_a_malformed_own_split_says_the_form(name):
    with pytest.raises(UsageError, match="KIND:IMAGES_DIR"):
        load_split(name, NOWHERE)


@pytest.mark.parametrize("name", [n for n in known_splits() if ":" not in n])
def test_missing_data_is_one_line_that_names_a_path_and_a_remedy(name):
    with pytest.raises(DataError, match="/nonexistent") as caught:
        load_split(name, NOWHERE)
    assert caught.value.exit_code == 3
    remedy = "data prepare pictograms --size" if "pictograms" in name else "--data-root"
    assert remedy in str(caught.value)


def test_a_missing_image_folder_is_named(tmp_path):
    path = write_json(tmp_path / "a.json", coco_document())
    with pytest.raises(DataError, match="no image folder /nonexistent"):
        load_split(f"coco:/nonexistent:{path}", tmp_path)


def test_data_that_a_cache_no_longer_finds_have_three_remedies(tmp_path):
    path = write_json(tmp_path / "a.json", coco_document())
    with pytest.raises(DataError, match=r"no image folder /nonexistent\. .*docker run -v.*--split"):
        load_cached_split(f"coco:/nonexistent:{path}", tmp_path)
    with pytest.raises(DataError) as caught:
        load_cached_split("lvis_train", NOWHERE)
    assert "cache-teacher" not in str(caught.value)


def test_ovcoco_hides_novel_boxes_and_drops_unused_names(tmp_path):
    document = coco_document(3)
    document["annotations"] = [
        annotation(1, 1, "person", [1, 1, 9, 9]),
        annotation(2, 1, "cat", [2, 2, 9, 9]),
        annotation(3, 1, "traffic light", [3, 3, 9, 9]),
        annotation(4, 1, "person", [4, 4, 9, 9], iscrowd=1),
        annotation(5, 2, "cat", [5, 5, 9, 9]),
        annotation(6, 3, "traffic light", [6, 6, 9, 9]),
    ]
    train = load_split(write_world(tmp_path, document, "my_train"), tmp_path)
    assert train.is_train
    assert train.protocol == "ovcoco"
    assert len(train.categories) == 65
    assert sum(each.is_base for each in train.categories) == 48
    assert [image.image_id for image in train.images] == [1]
    assert train.base_boxes(1).category_ids.tolist() == [category_id("person")]
    assert train.base_boxes(1).boxes_xyxy.tolist() == [[1, 1, 10, 10]]
    assert len(train.all_boxes(1).category_ids) == 3

    val = load_split(write_world(tmp_path, document, "instances_val"), tmp_path)
    assert not val.is_train
    assert [image.image_id for image in val.images] == [1, 2]
    assert len(val.base_boxes(2).category_ids) == 0


@pytest.mark.parametrize(
    ("name", "is_train"),
    [
        ("mine", True), ("latest", True), ("interval_3", True), ("instances_train2017", True),
        ("train_val", True), ("instances_val2017", False), ("my-test", False),
        ("image_info_test-dev", False), ("lvis_v1_minival", False),
        ("valid/_annotations.coco", False), ("train/_annotations.coco", True),
        ("val2017/annotations/instances_default", False), ("test/train/mine", True),
        ("test/labels/mine", False),
        ("test/instances_train", True), ("train/my-val", False),
        ("test/a/mine", True), ("test_of_mine/mine", True), ("dev/mine", True),
    ],
)  # fmt: skip
def test_the_nearest_word_says_whether_one_may_train(name, is_train, tmp_path):
    kind_and_paths = write_world(tmp_path, coco_document(), name)
    assert load_split(kind_and_paths, tmp_path).is_train is is_train


def test_the_three_ovcoco_splits_and_plain_coco(tmp_path):
    document = coco_document(4)
    document["annotations"].append(annotation(99, 4, "cat", [1, 1, 5, 5]))
    document["images"].append({"id": 50, "file_name": "50.png", "height": 20, "width": 20})
    sizes = {each["file_name"]: (each["height"], each["width"]) for each in document["images"]}
    for part in ("train", "val"):
        write_images(tmp_path / f"coco/{part}2017", sizes)
        write_json(tmp_path / f"coco/annotations/instances_{part}2017.json", document)
    counts = {
        name: len(load_split(name, tmp_path).images)
        for name in known_splits()
        if "coco_" in name and ":" not in name
    }
    assert counts == {
        "ovcoco_train": 3, "ovcoco_val": 4, "ovcoco_val5k": 5, "coco_train": 5, "coco_val": 5,
    }  # fmt: skip
    assert {name for name, problem in list_splits(tmp_path).items() if not problem} == set(counts)
    assert list_splits(tmp_path)["lvis_val"].endswith(f"no {tmp_path}/lvis/lvis_v1_val.json")
    plain = load_split("coco_train", tmp_path)
    assert all(each.is_base for each in plain.categories)
    assert len(plain.categories) == 66
    plain.require_images()


def test_own_groups_come_from_the_categories(tmp_path):
    document = coco_document(2)
    document["categories"] = [
        {"id": number, "name": f"n{number}", "split": "novel" if number % 2 else "base"}
        for number in range(1, 67)
    ]
    split = load_split(write_world(tmp_path, document), tmp_path)
    assert [each.is_base for each in split.categories[:4]] == [False, True, False, True]
    document["categories"][3]["split"] = "other"
    with pytest.raises(DataError, match=r'"split".* 4'):
        load_split(write_world(tmp_path, document), tmp_path)
    for each in document["categories"]:
        del each["split"]
    with pytest.raises(DataError, match=r"lacks 65 of the 65.*key \"split\""):
        load_split(write_world(tmp_path, document), tmp_path)


def lvis_document() -> dict:
    document = coco_document(3)
    document["categories"] = [
        {"id": number, "name": f"n{number}", "frequency": "rcf"[number % 3]}
        for number in range(1, 67)
    ]
    for image in document["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return document


def test_lvis_rare_is_novel_and_no_image_is_dropped(tmp_path):
    document = lvis_document()
    name = write_world(tmp_path, document, "train").replace("ovcoco:", "lvis:")
    split = load_split(name, tmp_path)
    assert split.protocol == "lvis"
    rare = {each.category_id for each in split.categories if each.frequency == "r"}
    assert rare == {number for number in range(1, 67) if number % 3 == 0}
    assert {each.category_id for each in split.categories if not each.is_base} == rare
    assert len(split.images) == 3
    for image in split.images:
        assert not rare & set(split.base_boxes(image.image_id).category_ids.tolist())
    assert any(
        rare & set(split.all_boxes(image.image_id).category_ids.tolist()) for image in split.images
    )
    del document["categories"][5]["frequency"]
    with pytest.raises(DataError, match=r"frequency.* 6\."):
        load_split(write_world(tmp_path, document).replace("ovcoco:", "lvis:"), tmp_path)


def test_a_file_that_is_not_lvis_v1_is_refused_under_its_name(tmp_path):
    write_json(tmp_path / "lvis/lvis_v1_train.json", lvis_document())
    (tmp_path / "coco").mkdir()
    with pytest.raises(DataError, match="866 base, 337 novel"):
        load_split("lvis_train", tmp_path)


def test_lvis_val_images_are_found_in_train2017_and_missing_ones_are_counted(tmp_path):
    document = lvis_document()
    for image, folder in zip(document["images"], ("val", "train", "train"), strict=True):
        image["coco_url"] = f"http://images.cocodataset.org/{folder}2017/{image['file_name']}"
    path = write_json(tmp_path / "val.json", document)
    hw = {each["file_name"]: (each["height"], each["width"]) for each in document["images"]}
    write_images(tmp_path / "coco/train2017", {"2.png": hw["2.png"]})
    write_images(tmp_path / "coco/val2017", {"1.png": hw["1.png"]})
    split = load_split(f"lvis:{tmp_path / 'coco'}:{path}", tmp_path)
    assert split.image_path(split.images[1]) == tmp_path / "coco/train2017/2.png"
    with pytest.raises(DataError, match=r"1 of 3 images.*15,000.*: 1 here.*train2017/3\.png"):
        split.require_images()
    write_images(tmp_path / "coco/train2017", {"3.png": hw["3.png"]})
    split.require_images()


def test_a_split_whose_file_names_leave_the_folder_is_refused(tmp_path):
    document = coco_document(2)
    name = write_world(tmp_path, document)
    document["images"][0]["file_name"] = "../train.json"
    write_json(tmp_path / "train.json", document)
    split = load_split(name, tmp_path)
    with pytest.raises(DataError, match="refused"):
        split.require_images()
    with pytest.raises(DataError, match="refused"):
        split.image_path(split.images[0])


def test_two_categories_of_one_name_are_refused(tmp_path):
    document = coco_document(2)
    document["categories"][-1]["name"] = "car"
    with pytest.raises(DataError, match="share a name: car"):
        load_split(write_world(tmp_path, document), tmp_path)


@pytest.mark.parametrize("protocol", ["lvis", "ovcoco"])
def test_pictograms_say_their_protocol(protocol, tmp_path):
    document = lvis_document() if protocol == "lvis" else coco_document()
    root = tmp_path / "pictograms/tiny"
    sizes = {each["file_name"]: (each["height"], each["width"]) for each in document["images"]}
    for part in ("train", "val"):
        write_images(root / f"images/{part}", sizes)
        write_json(root / f"annotations/{part}.json", document)
    (root / "dataset.json").write_bytes(orjson.dumps({"protocol": protocol}))
    train = load_split("pictograms_tiny_train", tmp_path)
    assert (train.protocol, train.is_train) == (protocol, True)
    train.require_images()
    assert not load_split("pictograms_tiny_val", tmp_path).is_train
    for text in ('{"protocol": "coco"}', "[]", "{}", "x"):
        (root / "dataset.json").write_text(text)
        with pytest.raises(DataError, match=r"dataset\.json"):
            load_split("pictograms_tiny_train", tmp_path)


@pytest.mark.skipif("DKDETR_TEST_COCO" not in os.environ, reason="DKDETR_TEST_COCO is not set")
def test_real_coco_photographs_are_all_found():
    root = Path(os.environ["DKDETR_TEST_COCO"])
    for part in ("train2017", "val2017"):
        name = f"ovcoco:{root / part}:{root / f'annotations/instances_{part}.json'}"
        split = load_split(name, root)
        assert split.is_train is (part == "train2017")
        split.require_images()
        assert len(split.categories) == 65
