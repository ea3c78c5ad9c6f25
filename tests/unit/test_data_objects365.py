import numpy as np
import pytest

from dkdetr.data.clean_names import CLEAN_NAMES, clean_name, with_clean_names
from dkdetr.data.splits import load_split
from dkdetr.errors import DataError
from tests.unit.data_world import write_images, write_json

PLACES = ("images/v1/patch0/a.jpg", "images/v2/patch3/b.jpg", "images/v2/patch16/c.jpg")
ABSENT = "images/v2/patch16/objects365_v2_00908726.jpg"


def objects365(root, num_categories=365):
    images = [
        {"id": number, "file_name": name, "height": 30, "width": 40}
        for number, name in enumerate((*PLACES, ABSENT), start=1)
    ]
    annotations = [
        {"id": n, "image_id": n, "category_id": 2, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
        for n in range(1, 5)
    ]
    names = {1: "Person", 2: "Moniter/TV", 3: "Table Tennis ", 4: "Noddles"}
    categories = [
        {"id": n, "name": names.get(n, f"name {n}")} for n in range(1, num_categories + 1)
    ]
    write_json(
        root / "objects365/annotations/zhiyuan_objv2_val.json",
        {"images": images, "annotations": annotations, "categories": categories},
    )
    # As the archives unpack, as the json says, and all in one folder.
    write_images(root / "objects365/val/patch0", {"a.jpg": (30, 40)})
    write_images(root / "objects365/val/images/v2/patch3", {"b.jpg": (30, 40)})
    write_images(root / "objects365/val", {"c.jpg": (30, 40)})


def test_images_are_found_in_any_of_the_usual_places(tmp_path):
    objects365(tmp_path)
    split = load_split("objects365_val", tmp_path)
    root = tmp_path / "objects365/val"
    split.require_images()
    assert [split.image_path(image) for image in split.images] == [
        root / "patch0/a.jpg", root / "images/v2/patch3/b.jpg", root / "c.jpg",
    ]  # fmt: skip
    assert any("1 images left out" in note for note in split.notes)
    assert len(split.box_table.category_ids) == 3
    assert np.diff(split.box_table.offsets).tolist() == [1, 1, 1]
    assert (split.protocol, split.is_train, len(split.categories)) == ("coco", False, 365)
    (root / "patch0/a.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images.*v1/patch0/a\.jpg.* and .*patch0/a\.jpg"):
        split.require_images()


def test_another_number_of_names_is_another_version(tmp_path):
    objects365(tmp_path, num_categories=364)
    with pytest.raises(DataError, match="364 categories, not 365"):
        load_split("objects365_val", tmp_path)


def test_names_are_verbatim_unless_clean_ones_are_asked_for(tmp_path):
    objects365(tmp_path)
    split = load_split("objects365_val", tmp_path)
    assert [each.name for each in split.categories[:4]] == [
        "Person", "Moniter/TV", "Table Tennis ", "Noddles",
    ]  # fmt: skip
    clean = with_clean_names(split)
    assert [each.name for each in clean.categories[:4]] == [
        "Person", "Monitor/TV", "Table Tennis", "Noodles",
    ]  # fmt: skip
    assert [each.category_id for each in clean.categories] == list(range(1, 366))


def test_clean_names_stay_clean_and_different():
    assert clean_name("tvmonitor") == "tv monitor"
    assert clean_name("person") == "person"
    assert len(set(CLEAN_NAMES.values())) == len(CLEAN_NAMES)
    for name in CLEAN_NAMES.values():
        assert clean_name(name) == name
