import json
import warnings

import pytest
from PIL import Image

from dkdetr.data import picture_faults
from dkdetr.data.check import GroupCount, check_split, count_split
from dkdetr.data.image_files import ALLOW_LINKS
from dkdetr.data.prepare import prepare_derived
from dkdetr.data.splits import load_split
from dkdetr.errors import DataError, UsageError
from tests.unit.data_world import (
    annotation,
    category_id,
    coco_document,
    png_header,
    write_images,
    write_json,
    write_world,
)


def test_counts_by_hand(tmp_path):
    document = coco_document(4)  # three images with a cat, two persons, a car; one with a cat
    document["annotations"].append(annotation(99, 1, "car", [0, 0, 70, 20], iscrowd=1))
    document["annotations"].append(annotation(100, 4, "dog", [0, 0, 5, 0]))
    name = write_world(tmp_path, document, "a_val")
    found = count_split(load_split(name, tmp_path))
    assert (found.num_images, found.num_trainable_images, found.num_crowds) == (4, 3, 1)
    assert found.groups == (GroupCount("base", 48, 2, 9), GroupCount("novel", 17, 1, 4))
    assert len(found.notes) == 2
    assert "(annotation ids 100)" in found.notes[0]
    assert "48 base and 17 novel categories, 65 in all" in found.lines()[1]
    report = check_split(name, tmp_path)
    assert report.summary == found
    assert not report.errors
    assert not report.oddities
    report.raise_problems()


def lvis_categories():
    groups = "f" * 405 + "c" * 461 + "r" * 337
    return [
        {"id": number, "name": f"n{number}", "frequency": group}
        for number, group in enumerate(groups, start=1)
    ]


def lvis_world(root):
    document = coco_document(3) | {"categories": lvis_categories()}
    for image in document["images"]:
        image |= {"neg_category_ids": [7], "not_exhaustive_category_ids": [], "file_name": "x"}
        image["coco_url"] = f"http://x/train2017/{image['id']}.png"
    for number, each in enumerate(document["annotations"]):
        each["category_id"] = 1000 if number % 2 else 1  # every other one is rare
    sizes = {f"{each['id']}.png": (each["height"], each["width"]) for each in document["images"]}
    write_images(root / "coco/train2017", sizes)
    return document


def test_lvis_has_866_and_337_categories(tmp_path):
    document = lvis_world(tmp_path)
    write_json(tmp_path / "lvis/lvis_v1_train.json", document)
    report = check_split("lvis_train", tmp_path)
    assert any("866 base and 337 novel categories, 1,203 in all" in each for each in report.lines())
    assert {each["group"]: each["num_categories"] for each in report.as_json()["groups"]} == {
        "f": 405, "c": 461, "r": 337,
    }  # fmt: skip
    document["categories"][0]["frequency"] = "r"
    write_json(tmp_path / "lvis/lvis_v1_train.json", document)
    with pytest.raises(DataError, match="866 base, 337 novel"):
        check_split("lvis_train", tmp_path)


def test_every_kind_of_fault_is_told_at_once(tmp_path):
    document = coco_document(30)
    name = write_world(tmp_path, document, "a_val").replace("ovcoco", "coco")
    annotations, images = document["annotations"], document["images"]
    for number in range(25):
        annotations[number]["bbox"][2] = -1
    annotations[30]["category_id"] = 900
    annotations[31]["image_id"] = 900
    annotations[32]["id"] = annotations[33]["id"]
    annotations[34]["bbox"] = [500, 1, 5, 5]
    annotations[35] = 7
    images[28]["height"] = 0
    document["categories"].append({"id": 500, "name": "Cat "})
    write_json(tmp_path / "a_val.json", document)
    (tmp_path / "images/3.png").unlink()
    report = check_split(name, tmp_path)
    kinds = {(each.table, each.why.split(" (")[0]): each for each in report.errors}
    negative = kinds["/annotations", "negative width or height"]
    assert negative.total == 25
    assert len(negative.first) == 20
    assert negative.first[1] == "/annotations/1 (id 2)"
    assert str(negative).endswith("and 5 more")
    assert kinds["/annotations", "unknown category_id"].first == ("/annotations/30 (id 31)",)
    assert kinds["/annotations", "unknown image_id"].first == ("/annotations/31 (id 32)",)
    assert kinds["/annotations", "the id occurs more than once"].total == 1
    assert kinds["/annotations", "box outside its image"].first == ("/annotations/34 (id 35)",)
    assert kinds["/annotations", "not an object"].first == ("/annotations/35",)
    assert kinds["/images", "'height' below 1 or too large"].first == ("/images/28 (id 29)",)
    missing = kinds["image files", "missing"]
    assert missing.first == ("3.png (id 3)",)
    assert f"looked for under {tmp_path / 'images'}" in missing.why
    assert report.summary is not None
    assert report.summary.num_images == 29
    assert [each.why for each in report.oddities] == ["names that read the same"]
    with pytest.raises(DataError, match="faults of 8 kinds"):
        report.raise_problems()
    json.dumps(report.as_json())


def test_oddities_do_not_stop_anyone(tmp_path):
    document = coco_document(4)
    document["images"][1]["file_name"] = "1.png"
    document["images"][1] |= {key: document["images"][0][key] for key in ("height", "width")}
    document["annotations"] += [annotation(90 + i, 3, "dog", [1, 1, 5, 5]) for i in range(2)]
    document["categories"] = [
        {"id": each["id"], "name": each["name"], "frequency": "f"}
        for each in document["categories"]
    ]
    for image in document["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    document["images"][0]["neg_category_ids"] = [category_id("cat")]
    document["images"][2]["not_exhaustive_category_ids"] = [999]
    report = check_split(write_world(tmp_path, document, "val").replace("ovcoco", "lvis"), tmp_path)
    assert not report.errors
    found = {each.why.split(";")[0]: each.first for each in report.oddities}
    assert found == {
        "file_name shared by images": ("1.png",),
        "the same box of the same category twice": ("3",),
        "a category is in neg_category_ids and has a box": ("1",),
        "federated lists name categories that do not exist": ("3",),
    }
    report.raise_problems()


@pytest.mark.parametrize(
    "file_name", ["../a.png", "/etc/passwd", "a\\..\\b", "a\0b", "http://x/a.png", "C:/a.png"]
)
def test_paths_that_leave_the_folder_are_named(file_name, tmp_path):
    document = coco_document(3)
    name = write_world(tmp_path, document, "val")
    document["images"][1]["file_name"] = file_name
    write_json(tmp_path / "val.json", document)
    (error,) = check_split(name, tmp_path).errors
    assert error.why == "file_name leads out of the image folder"
    assert error.first == (f"{file_name!r} (id 2)",)


def test_links_that_leave_the_folder_are_named(tmp_path, monkeypatch):
    name = write_world(tmp_path, coco_document(3), "val")
    (tmp_path / "images/2.png").rename(tmp_path / "secret.png")
    (tmp_path / "images/2.png").symlink_to(tmp_path / "secret.png")
    (error,) = check_split(name, tmp_path).errors
    assert error.why.startswith("reached through a link that leaves the folder: DKDETR_ALLOW")
    assert error.first == ("2.png (id 2)",)
    monkeypatch.setenv(ALLOW_LINKS, "1")
    report = check_split(name, tmp_path, decode=True)
    assert not report.errors
    (odd,) = report.oddities
    assert odd.why.endswith("leaves the folder, which is followed")
    assert odd.first == ("2.png (id 2)",)


def test_pictures_annotated_as_a_viewer_turns_them_are_named(tmp_path, monkeypatch):
    name = write_world(tmp_path, coco_document(8), "val")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    stored = {"2.png": (56, 64), "4.png": (64, 52), "5.png": (64, 56), "6.png": (9, 9)}
    write_images(tmp_path / "images", stored)  # 2.png: as annotated, whatever it is shown as
    for file in ("2.png", "4.png"):
        with Image.open(tmp_path / "images" / file) as picture:
            picture.load()
        picture.save(tmp_path / "images" / file, exif=sideways)
    (tmp_path / "images/8.png").write_bytes(b"GIF89a")
    report = check_split(name, tmp_path)
    turned, size, header = report.errors
    assert turned.first == ("4.png (id 4: 52 x 64, annotated 64 x 52)",)
    assert turned.why.endswith("turn the pixels for good, or annotate the stored pixels")
    assert [each[:5] for each in size.first] == ["5.png", "6.png"]
    assert header.first == ("8.png (id 8)",)
    with pytest.raises(DataError, match="4 faults of 3 kinds"):
        report.raise_problems()

    monkeypatch.setattr(picture_faults, "_MOST", 2)  # the first and the fifth
    (size,) = check_split(name, tmp_path).errors
    assert size.first == ("5.png (id 5: 56 x 64, annotated 64 x 56)",)
    assert size.why.endswith("(2 of 8 looked at)")


@pytest.mark.parametrize("decode", [False, True])
def test_whole_pictures_that_are_not_read_are_told_from_damaged_ones(tmp_path, decode):
    name = write_world(tmp_path, coco_document(6), "val")
    images = tmp_path / "images"
    with Image.open(images / "1.png") as picture:
        size = picture.size
    Image.new("I;16", size).save(images / "1.png")
    for file, side in (("2.png", 9500), ("3.png", 30000)):  # Pillow warns of one, refuses one
        (images / file).write_bytes(png_header(side))
    (images / "4.png").unlink()
    (images / "4.png").mkdir()
    (images / "5.png").write_bytes(b"GIF89a")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        unread, header, file = check_split(name, tmp_path, decode=decode).errors
    assert not told
    assert unread.why.endswith("than are read: convert it")
    assert unread.first == (
        "1.png (id 1: pixels of kind 'I;16', more than 8 bits a channel)",
        "2.png (id 2: 9500 x 9500 pixels, more than 89,478,485)",
        "3.png (id 3: more than 89,478,485 pixels)",
    )
    assert header.first == ("5.png (id 5)",)
    assert file.first == ("4.png (id 4: Is a directory)",)


def test_truncated_pictures_are_found_by_decoding_every_one(tmp_path, monkeypatch):
    name = write_world(tmp_path, coco_document(30), "val")
    monkeypatch.setattr(picture_faults, "_MOST", 2)
    for number in range(5, 30):
        path = tmp_path / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:-3000])  # the header is whole
    write_images(tmp_path / "images", {"2.png": (9, 9)})
    report = check_split(name, tmp_path)
    assert not report.errors
    assert "pictures: headers of 2 of 30 read; --decode decodes every one" in report.lines()
    report = check_split(name, tmp_path, decode=True)
    size, pixels = report.errors
    assert size.first == ("2.png (id 2: 9 x 9, annotated 64 x 56)",)
    assert pixels.names[0].startswith("5.png (id 5: ")
    assert "truncated" in pixels.names[0]
    assert (pixels.total, len(pixels.first)) == (25, 20)
    told = report.as_json()["errors"][1]
    assert [each.split(" ")[0] for each in told["names"]] == [f"{n}.png" for n in range(5, 30)]
    assert "pictures: 30 decoded" in report.lines()
    with pytest.raises(DataError, match=r"26 faults of 2 kinds, named above \(all .* by --json"):
        report.raise_problems()
    split = load_split(name, tmp_path)
    with pytest.raises(DataError, match=r"5\.png.* data check SPLIT --decode names all such"):
        split.read(split.images[4])


def test_prepare_writes_derived_files_and_touches_no_other(tmp_path):
    document = lvis_world(tmp_path)
    path = write_json(tmp_path / "lvis/lvis_v1_train.json", document)
    before = path.read_bytes()
    said = []
    (made,) = prepare_derived("lvis", tmp_path, said.append)
    assert made.path == tmp_path / "lvis/lvis_v1_train_norare.json"
    assert (made.num_images, made.was_there) == (3, False)
    derived = json.loads(made.path.read_text())
    assert derived["images"] == document["images"]
    assert derived["categories"] == document["categories"]
    # Polygons are carried over as they are.
    wanted = [each for each in document["annotations"] if each["category_id"] == 1]
    assert derived["annotations"] == wanted
    assert path.read_bytes() == before
    (again,) = prepare_derived("lvis", tmp_path, said.append)
    assert again.was_there
    made.path.write_text("mine")
    with pytest.raises(DataError, match="stays as it is"):
        prepare_derived("lvis", tmp_path, said.append)
    assert made.path.read_text() == "mine"
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "lvis_v1_train.json", "lvis_v1_train_norare.json",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="lvis, ovcoco"):
        prepare_derived("voc", tmp_path, said.append)


def test_prepared_ovcoco_files_give_the_splits_they_are_made_of(tmp_path):
    document = coco_document(5)
    document["annotations"].append(annotation(99, 5, "traffic light", [1, 1, 5, 5]))
    document["annotations"][0]["segmentation"] = {"counts": [5, 5], "size": [2, 5]}
    sizes = {each["file_name"]: (each["height"], each["width"]) for each in document["images"]}
    for part in ("train2017", "val2017"):
        write_images(tmp_path / "coco" / part, sizes)
        write_json(tmp_path / f"coco/annotations/instances_{part}.json", document)
    train, val = prepare_derived("ovcoco", tmp_path, lambda _: None)
    assert train.path.name == "instances_train2017_seen_2.json"
    assert val.path.name == "instances_val2017_all_2.json"
    for made, name, novel in ((train, "ovcoco_train", 0), (val, "ovcoco_val", 5)):
        split = load_split(name, tmp_path)
        derived = json.loads(made.path.read_text())
        assert [each["id"] for each in derived["images"]] == [i.image_id for i in split.images]
        assert len(derived["categories"]) == 65
        cats = [
            each for each in derived["annotations"] if each["category_id"] == category_id("cat")
        ]
        assert len(cats) == novel
        known = {each["id"]: each for each in document["annotations"]}
        assert all(known[each["id"]] == each for each in derived["annotations"])
    own = load_split(f"ovcoco:{tmp_path / 'coco/val2017'}:{val.path}", tmp_path)
    assert len(own.images) == len(load_split("ovcoco_val", tmp_path).images)
