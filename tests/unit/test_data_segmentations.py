"""Masks move as boxes do: by hand, at random, and through the loader."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dkdetr.boxes import cxcywh_to_xyxy
from dkdetr.config import DataConfig, ExperimentConfig, KDConfig, OptimConfig, StudentConfig
from dkdetr.data import datasets
from dkdetr.data.loader import make_training_loader
from dkdetr.data.segmentations import read_segmentations, render_masks
from dkdetr.data.splits import load_split
from dkdetr.data.transforms import ViewGeometry, draw_geometry, visible_boxes
from dkdetr.errors import DataError
from dkdetr.run_lengths import encode_masks
from tests.unit.data_world import annotation, coco_document, vocabulary_of, write_world

# Half the size, cut out at (20, 10), 60 x 40 of it; the box becomes (10, 10, 30, 30), mirrored
# (30, 10, 50, 30).
STRAIGHT = ViewGeometry((100, 200), (50, 100), 10, 20, (40, 60), flip=False)
BOX = (60.0, 40.0, 100.0, 80.0)


def ring_of(box) -> np.ndarray:
    x0, y0, x1, y1 = (float(side) for side in box)
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float32)


def packed(box, size_hw) -> str:
    mask = np.zeros((1, *size_hw), dtype=bool)
    x0, y0, x1, y1 = (int(side) for side in box)
    mask[0, y0:y1, x0:x1] = True
    return encode_masks(mask)[0]["counts"]


@pytest.mark.parametrize(("flip", "columns"), [(False, (10, 30)), (True, (30, 50))])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_rectangle_by_hand(flip, columns, stride):
    geometry = replace(STRAIGHT, flip=flip)
    expected = torch.zeros(64 // stride, 64 // stride, dtype=torch.bool)
    left, right = (edge // stride for edge in columns)
    expected[10 // stride : 30 // stride, left:right] = True
    outlines = [(ring_of(BOX),), packed(BOX, (100, 200))]
    for mask in render_masks(outlines, geometry, side=64 // stride, stride=stride):
        assert torch.equal(mask, expected)
    box = geometry.move_boxes(torch.tensor([BOX]))
    assert box.tolist() == [[columns[0], 10, columns[1], 30]]


def test_rings_are_joined_and_cut_at_the_view():
    # The first sticks out at the left and top of the view, the second lies beyond its right.
    outline = (ring_of((0, 0, 60, 40)), ring_of((180, 30, 400, 90)))
    mask = render_masks([outline], STRAIGHT, side=64, stride=1)[0]
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[:10, :10] = True
    assert torch.equal(mask, expected)
    # An outline that leaves the picture leaves no trace in the padding either.
    small = ViewGeometry((40, 40), (40, 40), 0, 0, (40, 40), flip=False)
    mask = render_masks([(ring_of((30, 30, 60, 60)),)], small, side=64, stride=1)[0]
    assert mask.sum() == 100
    assert mask[30:40, 30:40].all()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("stride", [1, 2])
def test_a_mask_follows_its_box(seed, stride):
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(60, 200, 2))
    left, top = int(random.integers(0, width - 30)), int(random.integers(0, height - 30))
    box = (left, top, left + int(random.integers(20, 30)), top + int(random.integers(20, 30)))
    boxes = torch.tensor([box], dtype=torch.float32)
    geometry = draw_geometry(
        (height, width), boxes,
        image_size=128, scale_range=(0.4, 2.0), flip_probability=0.5,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    outlines = [(ring_of(box),), packed(box, (height, width))]
    drawn = render_masks(outlines, geometry, side=128 // stride, stride=stride)
    cut, seen = visible_boxes(geometry, boxes)
    assert bool(seen)
    if (cut[0, 2:] - cut[0, :2]).min() < 2 * stride:
        return  # too thin a sliver to have a pixel of its own for sure
    for mask in drawn:
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        found = [int(edge) * stride for edge in edges]
        np.testing.assert_allclose(cut[0].numpy(), found, atol=stride / 2 + 0.51)
        assert mask.sum() == (edges[2] - edges[0]) * (edges[3] - edges[1])


def world(tmp_path, **changes):
    """A data set whose outlines are the boxes themselves, packed for every third object."""
    document = coco_document(num_images=6)
    sizes = {each["id"]: (each["height"], each["width"]) for each in document["images"]}
    for each in document["annotations"]:
        x, y, w, h = (round(side) for side in each["bbox"])
        each["bbox"] = [x, y, w, h]
        size = sizes[each["image_id"]]
        each["segmentation"] = [ring_of((x, y, x + w, y + h)).ravel().tolist()]
        if each["id"] % 3 == 0:
            counts = packed((x, y, x + w, y + h), size)
            each["segmentation"] = {"size": list(size), "counts": counts}
        if each["id"] in changes.get("drop", ()):
            del each["segmentation"]
    crowd = annotation(900, 1, "person", [0, 0, 60, 40], iscrowd=1)
    crowd["segmentation"] = {"size": list(sizes[1]), "counts": [0, sizes[1][0] * sizes[1][1]]}
    document["annotations"].append(crowd)
    return load_split(write_world(tmp_path, document), tmp_path)


def config_of(mask_head: bool) -> ExperimentConfig:
    return ExperimentConfig(
        name="test",
        student=StudentConfig(mask_head=mask_head),
        kd=KDConfig(regions_per_image=0),
        optim=OptimConfig(epochs=3),
        data=DataConfig(batch_size=2, workers=0, image_size=100, scale_range=(0.8, 2.0)),
    )


def test_the_loader_s_masks_lie_in_the_loader_s_boxes(tmp_path):
    split = world(tmp_path)
    loader = make_training_loader(split, vocabulary_of(split), config_of(True), cache_path=None)
    seen = 0
    for batch in loader:
        for target, size in zip(batch.targets, batch.images.image_sizes_hw.tolist(), strict=True):
            # 100 pixels at stride 8 are 13 places, four times finer 52.
            assert target.masks.shape == (len(target.labels), 52, 52)
            scale = torch.tensor([size[1], size[0]] * 2)
            for mask, box in zip(target.masks, cxcywh_to_xyxy(target.boxes_cxcywh), strict=True):
                x0, y0, x1, y1 = (box * scale / 2).tolist()
                if min(x1 - x0, y1 - y0) < 2:
                    continue
                rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                found = [float(edge) for edge in edges]
                np.testing.assert_allclose([x0, y0, x1, y1], found, atol=1)
                seen += 1
    assert seen > 20


def test_without_a_mask_head_no_outline_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "read_segmentations", None)
    split = world(tmp_path)
    loader = make_training_loader(split, vocabulary_of(split), config_of(False), cache_path=None)
    assert all(target.masks is None for target in next(iter(loader)).targets)


def test_boxes_and_pixels_do_not_notice_masks(tmp_path):
    split = world(tmp_path)
    batches = [
        next(iter(make_training_loader(split, vocabulary_of(split), config_of(masks),
                                       cache_path=None)))
        for masks in (False, True)
    ]  # fmt: skip
    assert torch.equal(batches[0].images.pixels, batches[1].images.pixels)
    for plain, masked in zip(batches[0].targets, batches[1].targets, strict=True):
        assert torch.equal(plain.boxes_cxcywh, masked.boxes_cxcywh)
        assert torch.equal(plain.labels, masked.labels)


def test_objects_without_an_outline_are_named_novel_ones_not_looked_at(tmp_path):
    # Of each image's four objects the first is a cat: novel.
    novel = world(tmp_path / "novel", drop=(1, 5))
    read_segmentations(novel.annotations_path, novel.base_table, novel.images)
    split = world(tmp_path / "base", drop=(2, 7))
    with pytest.raises(DataError, match=r"2 of \d+ objects.*id 2 .*id 7 .*mask_head=false") as seen:
        make_training_loader(split, vocabulary_of(split), config_of(True), cache_path=None)
    assert seen.value.exit_code == 3


@pytest.mark.parametrize("area", ["12.5", "NaN"])
def test_rows_keep_their_outlines(tmp_path, area):
    """In a file, too, that is no JSON for a number that is none, as `data check` reads it."""
    split = world(tmp_path)
    path = split.annotations_path
    path.write_text(path.read_text().replace('"bbox"', f'"area": {area}, "bbox"', 1))
    table = read_segmentations(split.annotations_path, split.base_table, split.images)
    view = ViewGeometry((60, 64), (60, 64), 0, 0, (60, 64), flip=False)
    for row, box in enumerate(split.base_table.boxes_xyxy):
        outline = table.of_row(row)
        if isinstance(outline, str):
            image = split.images[split.base_table.image_of_row()[row]]
            size = (image.height, image.width)
            view = ViewGeometry(size, size, 0, 0, size, flip=False)
            mask = render_masks([outline], view, side=64, stride=1)[0]
            rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [int(edge) for edge in found] == box.tolist()
        else:
            assert np.array_equal(outline[0], ring_of(box))


def test_odd_outlines(tmp_path):
    split = world(tmp_path)
    text = split.annotations_path.read_text()
    ring = f"[{', '.join(str(float(v)) for v in ring_of(split.base_table.boxes_xyxy[0]).ravel())}]"
    assert ring in text
    table, images = split.base_table, split.images

    def read_with(other: str):
        split.annotations_path.write_text(text.replace(f"[{ring}]", other, 1))
        return read_segmentations(split.annotations_path, table, images)

    # Too few corners: the box stands in.
    assert np.array_equal(read_with("[[1, 2, 3, 4]]").of_row(0)[0], ring_of(table.boxes_xyxy[0]))
    for other in ("[]", "null", "7", "[[1, 2, 3, 4, 5, 6, 7]]", '{"size": [1, 1], "counts": "1"}'):
        with pytest.raises(DataError, match=r"1 of \d+ objects"):
            read_with(other)
