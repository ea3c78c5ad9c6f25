"""`--dry-run` times the decoder that the run will use, as the run uses it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline import calibrate, decoding, readable_images
from pipeline.calibrate import price_cache
from pipeline.readable_images import READ_THREADS
from pipeline.request import CacheRequest
from tests.e2e.tiny_stage_one import NUM_IMAGES, tiny_request, write_world

A_PICTURE_BY_PILLOW = 80.0
A_PICTURE_BY_THE_DEVICE = 7.0


class Clock:
    """Stands for `time`: it goes on only where pictures are decoded."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Decoders of known slowness; remembers what was asked of whom."""
    clock, asked = Clock(), list[object]()
    choose, by_pillow, by_device = (
        calibrate.choose_decoder, readable_images.decode_image, decoding.decode_jpeg
    )  # fmt: skip

    def chosen(choice: str, device: torch.device) -> str:
        asked.append((choice, device.type))
        # A GPU with nvJPEG would answer so (test_pipeline_decoding.py).
        return "torchvision" if choice == "auto" else choose(choice, device)

    def pillow(*args, **options):
        clock.now += A_PICTURE_BY_PILLOW
        return by_pillow(*args, **options)

    def device(data, **options):
        clock.now += A_PICTURE_BY_THE_DEVICE * len(data)
        asked.append(len(data))
        return by_device(data, **options)

    monkeypatch.setattr(calibrate, "time", clock)
    monkeypatch.setattr(calibrate, "choose_decoder", chosen)
    monkeypatch.setattr(readable_images, "decode_image", pillow)
    monkeypatch.setattr(decoding, "decode_jpeg", device)
    return asked


@pytest.fixture
def of_jpegs(teacher_spec: str, tmp_path: Path) -> CacheRequest:
    """The small world, but for its first picture in JPEGs."""
    write_world(tmp_path)
    for path in sorted((tmp_path / "images").glob("*.png"))[1:]:
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    annotations = json.loads((tmp_path / "train.json").read_text())
    for image in annotations["images"][1:]:
        image["file_name"] = image["file_name"].replace(".png", ".jpg")
    (tmp_path / "train.json").write_text(json.dumps(annotations))
    return tiny_request(tmp_path, teacher_spec, tmp_path / "cache")


def test_pillow_is_timed_in_the_threads_that_read(
    of_jpegs: CacheRequest, decoders: list[object]
) -> None:
    price = price_cache(replace(of_jpegs, decoder="pillow"))
    wanted = NUM_IMAGES * A_PICTURE_BY_PILLOW / READ_THREADS
    assert price.stages[1].seconds == pytest.approx(wanted)
    assert "decoded by pillow" in price.calibration
    assert decoders == [("pillow", "cpu")]


def test_a_device_s_decoder_is_timed_in_its_one_thread(
    of_jpegs: CacheRequest, decoders: list[object]
) -> None:
    """Not Pillow, which takes only what is no JPEG; and not the device's first batch."""
    price = price_cache(of_jpegs)
    by_device, by_pillow = A_PICTURE_BY_THE_DEVICE * 7 / 8, A_PICTURE_BY_PILLOW / 8 / READ_THREADS
    assert by_device > by_pillow
    assert price.stages[1].seconds == pytest.approx(NUM_IMAGES * by_device)
    assert "decoded by torchvision" in price.calibration
    assert decoders == [("auto", "cpu"), 7, 7]
