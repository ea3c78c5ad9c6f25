"""Control proposals: the true ones are the annotated boxes and the novel ones, chance is chance."""

import numpy as np
import pytest

from dkdetr.data.splits import load_split
from pipeline.pictograms import dataset
from pipeline.pictograms.control_proposals import coco_results, control_boxes
from pipeline.pictograms.dataset import prepare_pictograms
from pipeline.pictograms.worlds import WorldSize, plan_world

MINI = WorldSize(14, 10, 64, 12, 2, 0, (2, 4), (18, 34))


@pytest.fixture(scope="module")
def world():
    return plan_world(MINI, protocol="lvis-like", seed=3)


def test_true_proposals_are_the_annotated_boxes_and_the_novel_ones(world, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SIZES", {"tiny": MINI})
    prepare_pictograms(tmp_path, size="tiny", protocol="lvis-like", seed=3)
    split = load_split("pictograms_tiny_train", tmp_path)
    novel = 0
    for image, boxes in control_boxes(world, "true"):
        found = {tuple(each["bbox"]) for each in coco_results(image.image_id, boxes)}
        base = split.base_boxes(image.image_id).boxes_xyxy
        wanted = {(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in base.tolist()}
        assert wanted <= found
        novel += len(found - wanted)
    planned = [o for i in world.images if i.part == "train" for o in i.plan.objects]
    assert novel == sum(not world.categories[each.label].is_base for each in planned)
    assert novel > 0


def test_boxes_by_chance_lie_inside_and_are_the_same_again(world):
    one, other = (list(control_boxes(world, "chance")) for _ in range(2))
    assert len(one) == MINI.num_train
    for (image, boxes), (_, again) in zip(one, other, strict=True):
        assert image.part == "train"
        np.testing.assert_array_equal(boxes, again)
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (boxes >= 0).all()
        assert (boxes <= MINI.image_size).all()
        assert (sides >= 18).all()
        assert (sides <= 34).all()
    assert not np.array_equal(one[0][1], one[1][1])


def test_results_are_scored_downwards_and_hidden_objects_left_out():
    boxes = np.array([[1, 2, 4, 8], [5, 5, 5, 9], [0, 0, 2, 2]], np.float32)
    assert coco_results(7, boxes) == [
        {"image_id": 7, "category_id": 1, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 1.0},
        {"image_id": 7, "category_id": 1, "bbox": [0.0, 0.0, 2.0, 2.0], "score": 0.5},
    ]
