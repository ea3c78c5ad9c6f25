"""Results and annotations in the forms that other projects' tools load."""

import json

import numpy as np
import pytest
import supervision
from PIL import Image

from dkdetr.evaluation.mask_column import encode_segmentation
from dkdetr.evaluation.official import import_lvis
from dkdetr.evaluation.results import read_results
from dkdetr.evaluation.results_writer import ResultsWriter
from tests.e2e.commands import call, call_well
from tests.unit.data_world import coco_document, write_world


def write_results(path, document, *, as_masks=False):
    """One detection of each object, where it is, and the image's best last."""
    sizes = {each["id"]: (each["height"], each["width"]) for each in document["images"]}
    with ResultsWriter(path) as writer:
        for image_id, size in sizes.items():
            own = [each for each in document["annotations"] if each["image_id"] == image_id]
            boxes = np.array([each["bbox"] for each in own], dtype=np.float32)
            scores = np.linspace(0.3, 0.9, len(own), dtype=np.float32)
            labels = np.array([each["category_id"] for each in own])
            if as_masks:
                masks = [
                    {"size": size, "counts": encode_segmentation(each["segmentation"], *size)}
                    for each in own
                ]
                writer.write_masks(image_id, masks, scores, labels)
            else:
                boxes[:, 2:] += boxes[:, :2]
                writer.write(image_id, boxes, scores, labels)
    return path


def document_with_areas():
    document = coco_document(4)
    for each in document["annotations"]:
        x, y, w, h = each["bbox"]
        each |= {"area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    return document


@pytest.mark.parametrize("as_masks", [False, True])
def test_the_official_tools_load_them(as_masks, tmp_path, capsys):
    from pycocotools.coco import COCO

    document = document_with_areas()
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(document))
    results = write_results(tmp_path / "results.json", document, as_masks=as_masks)
    found = COCO(str(path)).loadRes(str(results))
    assert len(found.anns) == len(document["annotations"])
    assert ("bbox" in json.loads(results.read_text())[0]) is not as_masks
    lvis = import_lvis()
    for each in document["images"]:
        each |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    path.write_text(json.dumps(document))
    loaded = lvis.LVISResults(lvis.LVIS(str(path)), str(results))
    assert len(loaded.anns) == len(document["annotations"])
    capsys.readouterr()


def test_supervision_reads_them(tmp_path):
    """As its users do: the records of one image become its Detections."""
    document = document_with_areas()
    results = write_results(tmp_path / "results.json", document)
    records = [each for each in json.loads(results.read_text()) if each["image_id"] == 2]
    boxes = np.array([each["bbox"] for each in records])
    detections = supervision.Detections(
        xyxy=supervision.xywh_to_xyxy(boxes),
        confidence=np.array([each["score"] for each in records]),
        class_id=np.array([each["category_id"] for each in records]),
    )
    own = [each for each in document["annotations"] if each["image_id"] == 2]
    assert len(detections) == len(own)
    assert detections.confidence[0] == pytest.approx(0.9)
    x, y, w, h = own[-1]["bbox"]
    assert detections.xyxy[0] == pytest.approx([x, y, x + w, y + h], abs=1e-3)


def test_supervision_reads_results_put_into_the_annotation_file(tmp_path):
    """The way of the README, which is FiftyOne's too: a COCO file whose boxes are detections."""
    document = document_with_areas()
    write_world(tmp_path, document, "val")
    results = write_results(tmp_path / "results.json", document)
    records = [
        each | {"id": number, "iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3]}
        for number, each in enumerate(json.loads(results.read_text()), start=1)
    ]
    as_dataset = tmp_path / "detections.json"
    as_dataset.write_text(json.dumps(document | {"annotations": records}))
    dataset = supervision.DetectionDataset.from_coco(
        images_directory_path=str(tmp_path / "images"), annotations_path=str(as_dataset)
    )
    assert len(dataset) == len(document["images"])
    assert sum(len(own) for _, _, own in dataset) == len(records)
    names = {each["id"]: each["name"] for each in document["categories"]}
    assert set(dataset.classes) == set(names.values())
    _, _, first = next(iter(dataset))
    own = [each for each in records if each["image_id"] == 1]
    assert [dataset.classes[i] for i in first.class_id] == [names[e["category_id"]] for e in own]


def test_masks_are_scored_from_a_file(tmp_path):
    document = document_with_areas()
    split = write_world(tmp_path, document, "val").replace("ovcoco", "coco")
    results = write_results(tmp_path / "results.json", document, as_masks=True)
    read = read_results(results)
    assert not read.has_boxes
    assert read.masks is not None
    assert read.boxes_xywh[0, 2] > 3
    words = ("eval", "--predictions", "results.json", "--split", split, "--json", "-")
    values = json.loads(call_well(*words, cwd=tmp_path))
    assert values["segm.AP"] == 1
    assert "AP" not in values
    table = call_well(*words[:-2], cwd=tmp_path)
    assert "segm." in table
    both = [
        mask | {"bbox": box["bbox"]}
        for mask, box in zip(
            json.loads(results.read_text()),
            json.loads(write_results(tmp_path / "boxes.json", document).read_text()),
            strict=True,
        )
    ]
    (tmp_path / "both.json").write_text(json.dumps(both))
    values = json.loads(call_well(*words[:2], "both.json", *words[3:], cwd=tmp_path))
    assert values["AP"] == pytest.approx(1, abs=1e-6)
    assert values["segm.AP"] == 1
    assert any("areas of the boxes" in note for note in values["notes"])
    for each in both:
        each["segmentation"]["size"].reverse()
    (tmp_path / "both.json").write_text(json.dumps(both))
    done = call(*words[:2], "both.json", *words[3:], cwd=tmp_path)
    assert done.returncode == 3
    assert "another size than their image" in done.stderr


def test_data_commands(tmp_path):
    document = document_with_areas()
    split = write_world(tmp_path, document, "val")
    assert "48 base and 17 novel" in call_well("data", "check", split, cwd=tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    document["annotations"][3]["bbox"] = [1, 1, -4, 4]
    (tmp_path / "val.json").write_text(json.dumps(document))
    done = call("data", "check", split, "--json", "-", cwd=tmp_path)
    assert done.returncode == 3
    (error,) = json.loads(done.stdout)["errors"]
    assert error["first"] == ["/annotations/3 (id 4)"]
    assert "error: 1 record of /annotations: negative width or height" in done.stderr
    listed = call_well("data", "list", cwd=tmp_path)
    for name in ("objects365_val", "voc2007_test", "lvis_minival", "ovcoco_val5k"):
        assert name in listed
    done = call("data", "prepare", "lvis", cwd=tmp_path)
    assert done.returncode == 3
    assert "lvis_v1_train.json" in done.stderr
