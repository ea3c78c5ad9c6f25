"""Masks of a prediction: drawn for what is kept alone, the same in every form."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from tiny_student import TEXT_DIM, tiny_config, tiny_student

from dkdetr import DKDETR
from dkdetr.data.picture_input import image_batch
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.evaluation import detect as detect_module
from dkdetr.evaluation.detect import detect
from dkdetr.inference.picture_sources import NamedPicture
from dkdetr.inference.prediction_files import predict_to_folder
from dkdetr.run_lengths import encode_masks

# pycocotools speaks to NumPy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
ROWS = np.eye(3, TEXT_DIM, dtype=np.float32)
VOCABULARY = Vocabulary(
    ("cat", "dog", "cone"), (4, 5, 9), (True,) * 3, ("",) * 3, ("a {}.",), "t", ROWS
)


@pytest.fixture(scope="module")
def detector() -> DKDETR:
    config = tiny_config(mask_head=True)
    config = replace(config, data=replace(config.data, image_size=128))
    return DKDETR(tiny_student(config), config, VOCABULARY)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def test_masks_are_the_evaluations(detector):
    (found,) = detector.predict(picture(), threshold=0.0)
    batch = image_batch([picture()], [0], image_size=128)
    ((_, expected),) = detect(
        detector.student, [batch], torch.from_numpy(ROWS), device=torch.device("cpu"),
        max_detections=300, with_masks=True,
    )  # fmt: skip
    assert found.masks == expected.masks
    assert found.mask_arrays().shape == (len(found), 60, 90)


def test_only_what_is_kept_is_drawn(detector, monkeypatch):
    drawn = []
    real = detect_module.mask_rles

    def counted(masks, image, queries, **sizes):
        drawn.append(len(queries))
        return real(masks, image, queries, **sizes)

    monkeypatch.setattr(detect_module, "mask_rles", counted)
    scores = detector.predict(picture(), threshold=0.0, masks=False)[0].scores
    assert not drawn
    threshold = float(scores[4])
    (found,) = detector.predict([picture()], threshold=threshold)
    assert drawn == [len(found)] == [5]
    assert detector.predict(picture(), threshold=1.0)[0].mask_arrays().shape == (0, 60, 90)


def test_every_form_holds_the_same_masks(detector):
    (found,) = detector.predict(picture(), threshold=0.0, max_detections=6)
    masks = found.mask_arrays()
    assert masks.any()
    assert not masks.all()
    for record, mask in zip(found.to_coco(3), masks, strict=True):
        np.testing.assert_array_equal(coco_masks.decode(record["segmentation"]), mask)
        assert len(record["bbox"]) == 4
    assert all("bbox" not in record for record in found.to_coco(3, boxes=False))
    np.testing.assert_array_equal(found.to_supervision().mask, masks)
    json.dumps(found.to_coco())


def test_a_plot_tints_masks_and_nothing_else(detector):
    (found,) = detector.predict(picture(), threshold=0.0, max_detections=1)
    mask = np.zeros((60, 90), dtype=bool)
    mask[50:, 70:] = True
    drawn = replace(found, masks=tuple(encode_masks(mask[None])))
    plain = np.asarray(replace(found, masks=None).plot()).astype(int)
    tinted = np.asarray(drawn.plot()).astype(int)
    changed = (plain != tinted).any(axis=-1)
    assert changed[mask].mean() > 0.8
    assert not changed[~mask].any()


def test_the_document_holds_masks_and_their_areas(detector, tmp_path: Path):
    pictures = [NamedPicture("x/a.png", picture(1)), NamedPicture("y/a.png", picture(2))]
    predict_to_folder(
        detector, pictures, VOCABULARY, tmp_path, num_files=2, threshold=0.0, max_detections=3
    )
    coco = COCO(str(tmp_path / "predictions.json"))
    assert len(coco.anns) == 6
    for annotation in coco.anns.values():
        assert coco.annToMask(annotation).sum() == annotation["area"]
    assert [image["file_name"] for image in coco.imgs.values()] == ["x/a.png", "y/a.png"]
    for name in ("a.jpg", "a-2.jpg"):
        with Image.open(tmp_path / name) as shown:
            assert shown.size == (90, 60)
