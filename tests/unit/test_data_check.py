import pytest

from dkdetr.data.check import GroupCount, summarise_split
from dkdetr.data.splits import load_split
from dkdetr.errors import DataError
from tests.unit.data_world import annotation, coco_document, write_world


def test_counts_by_hand(tmp_path):
    document = coco_document(4)  # three images with a cat, two persons, a car; one with a cat
    document["annotations"].append(annotation(99, 1, "car", [0, 0, 70, 20], iscrowd=1))
    document["annotations"].append(annotation(100, 4, "dog", [0, 0, 5, 0]))
    split = load_split(write_world(tmp_path, document, "a_val"), tmp_path)
    found = summarise_split(split)
    assert (found.num_images, found.num_trainable_images, found.num_crowds) == (4, 3, 1)
    assert found.groups == (GroupCount("base", 48, 2, 9), GroupCount("novel", 17, 1, 4))
    assert len(found.notes) == 2
    (tmp_path / "images/3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 4 images.*3\.png"):
        summarise_split(split)
