"""A GPU computes while the CPU decodes and unpacks; and what is copied to it and from it.

There is no GPU here. Order and errors are looked at on a CPU that is taken for one; copies are
counted on a fake CUDA device, whose tensors have shapes and no numbers.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from device_copies import Copies
from tiny_student import TEXT_DIM, image_batch, text_embeddings, tiny_config, tiny_student
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dkdetr import DKDETR
from dkdetr.data import transforms
from dkdetr.data.picture_input import decoded_batch
from dkdetr.data.picture_input import image_batch as views_of
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import DataError
from dkdetr.evaluation import detect as detect_module
from dkdetr.evaluation.detect import detect, one_ahead
from dkdetr.evaluation.postprocess import Detections
from dkdetr.inference import predict as predict_module
from dkdetr.inference.prediction import Prediction
from dkdetr.structures import DecodedImages, ImageBatch
from dkdetr.student.attention_backend import use_backend
from dkdetr.student.build import build_student

CPU = torch.device("cpu")
SIDE = 128


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the CPU for a device that computes by itself."""
    monkeypatch.setattr(detect_module, "works_beside", lambda _: True)
    monkeypatch.setattr(detect_module, "_passed", lambda _: None)


def three_batches() -> list[ImageBatch]:
    return [
        replace(image_batch(seed=number), image_ids=(2 * number, 2 * number + 1))
        for number in range(3)
    ]


def found_in(student: nn.Module, batches, **more) -> list[tuple[int, Detections]]:
    return list(detect(student, batches, text_embeddings(), device=CPU, max_detections=9, **more))


def same(one: Detections, other: Detections) -> bool:
    pairs = [(getattr(one, n), getattr(other, n)) for n in ("boxes_xyxy", "scores", "labels")]
    return all(torch.equal(*pair) for pair in pairs) and one.masks == other.masks


def test_results_and_their_order_stay(beside: None):
    student = tiny_student()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect_module, "works_beside", lambda _: False)
        wanted = found_in(student, three_batches())
    found = found_in(student, three_batches())
    assert [image_id for image_id, _ in found] == [0, 1, 2, 3, 4, 5]
    assert [image_id for image_id, _ in wanted] == [0, 1, 2, 3, 4, 5]
    assert all(same(one, other) for (_, one), (_, other) in zip(found, wanted, strict=True))
    assert not found_in(student, [])


class Watched(nn.Module):
    """Says in a list when it is asked."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.inner, self.said = tiny_student(), said

    def forward(self, images, text_embeddings):
        self.said.append(f"asked {images.image_ids[0]}")
        return self.inner(images, text_embeddings)


def order_of(monkeypatch: pytest.MonkeyPatch, **more) -> list[str]:
    said: list[str] = []
    unpack = detect_module.unpack
    monkeypatch.setattr(
        detect_module, "unpack", lambda *args: said.append("unpacked") or unpack(*args)
    )

    def batches() -> Iterator[ImageBatch]:
        for batch in three_batches():
            said.append(f"loaded {batch.image_ids[0]}")
            yield batch

    student = Watched(said)
    if more:
        student.inner = tiny_student(tiny_config(mask_head=True))
    found_in(student, batches(), **more)
    return said


def test_the_next_batch_is_begun_before_the_last_is_unpacked(
    beside: None, monkeypatch: pytest.MonkeyPatch
):
    assert order_of(monkeypatch) == [
        "loaded 0", "asked 0", "loaded 2", "asked 2", "unpacked", "loaded 4", "asked 4",
        "unpacked", "unpacked",
    ]  # fmt: skip


def test_masks_and_cpus_go_batch_by_batch(monkeypatch: pytest.MonkeyPatch):
    one_by_one = [
        "loaded 0", "asked 0", "unpacked", "loaded 2", "asked 2", "unpacked", "loaded 4",
        "asked 4", "unpacked",
    ]  # fmt: skip
    assert order_of(monkeypatch) == one_by_one
    monkeypatch.setattr(detect_module, "works_beside", lambda _: True)
    monkeypatch.setattr(detect_module, "_passed", lambda _: None)
    assert order_of(monkeypatch, with_masks=True) == one_by_one


def test_an_error_comes_after_what_went_before_it():
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("the third")

    ahead = one_ahead(items())
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(DataError, match="the third"):
        next(ahead)
    assert list(one_ahead(iter([]))) == []
    assert list(one_ahead(iter([7]))) == [7]


def detector(student, config) -> DKDETR:
    rows = text_embeddings().numpy()
    names = tuple(f"name {number}" for number in range(len(rows)))
    numbers = tuple(range(len(rows)))
    true, empty = (True,) * len(rows), ("",) * len(rows)
    vocabulary = Vocabulary(names, numbers, true, empty, ("a {}.",), "t", rows)
    return DKDETR(student, config, vocabulary)


def small_views():
    config = tiny_config()
    return replace(config, data=replace(config.data, image_size=SIDE))


def picture(seed: int, height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_bad_picture_is_told_where_it_stands(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(detect_module, "works_beside", lambda _: ahead)
    monkeypatch.setattr(detect_module, "_passed", lambda _: None)
    model = detector(tiny_student(), small_views())
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    pictures = [picture(0), picture(1), picture(2), tmp_path / "bad.jpg", picture(3)]
    stream = model.stream(pictures, threshold=0.0, batch_size=1)
    for number in range(3):
        np.testing.assert_array_equal(next(stream).image, picture(number))
    with pytest.raises(DataError, match=r"bad\.jpg"):
        next(stream)


def test_a_batch_of_pictures_is_the_one_that_waits_for_its_views():
    pictures = [picture(0), picture(1, 200, 31)]
    wanted = views_of(pictures, [5, 6], image_size=SIDE)
    decoded = decoded_batch(pictures, [5, 6], image_size=SIDE)
    assert isinstance(decoded, DecodedImages)
    (one,), (other,) = (
        [each for _, each in found_in(tiny_student(), [batch])][:1] for batch in (wanted, decoded)
    )
    # A grey level here and there (test_data_device_views.py) moves a score by a thousandth.
    torch.testing.assert_close(one.scores, other.scores, atol=5e-3, rtol=0)
    assert decoded.image_ids == wanted.image_ids
    assert torch.equal(decoded.original_sizes_hw, wanted.original_sizes_hw)
    assert torch.equal(decoded.image_sizes_hw, wanted.image_sizes_hw)


def nothing_in(image: np.ndarray) -> Prediction:
    return Prediction(image, np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64), ())


def copies_of(pictures: list[np.ndarray], batch_size: int, monkeypatch) -> Copies:
    """Predicts on a fake CUDA device; where a copy may not be waited for, not even downwards."""
    monkeypatch.setattr(detect_module, "_passed", lambda _: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    # Whatever asks for numbers on the CPU, where there are none either.
    monkeypatch.setattr(detect_module, "unpack", lambda packed, _: [None] * len(packed))
    monkeypatch.setattr(predict_module, "_least_scores", lambda *_: None)
    monkeypatch.setattr(predict_module, "_keep", lambda found, **_: found)
    monkeypatch.setattr(predict_module, "_prediction", lambda image, *_: nothing_in(image))
    transforms._mean_and_std.cache_clear()
    copies = Copies(down_may_wait=False)
    model = detector(tiny_student(), small_views())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device("cuda"):
                student = build_student(small_views(), text_dim=TEXT_DIM).eval()
            use_backend(student, "torch", CPU)
            model.student, model._device = student, torch.device("cuda")
            model._precision = "fp32"  # of the fake device nobody knows what it can do
            # Copied once in a process's life.
            transforms._mean_and_std(torch.zeros(0, device="cuda").device)
            with copies:
                assert len(model.predict(pictures, batch_size=batch_size)) == len(pictures)
    finally:
        transforms._mean_and_std.cache_clear()  # fake numbers are nobody else's
    return copies


def test_pictures_go_up_as_bytes_and_one_copy_of_a_batch_comes_down(monkeypatch):
    pictures = [picture(number, 480, 640) for number in range(4)]
    copies = copies_of(pictures, 2, monkeypatch)
    assert len(copies.down) == 2
    of_a_batch = 6  # pixels, sizes of three kinds, corners, mirrored or not
    assert len(copies.up) == 1 + 2 * of_a_batch  # and the text embeddings, once
    beside_pixels = 2 * 2 * (4 * 2 * 8 + 1) + text_embeddings().numel() * 4
    assert copies.bytes_up == 4 * 480 * 640 * 3 + beside_pixels
