"""`--dry-run` times the decoder and the training as the run will use them, and counts its disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dkdetr.data.splits import load_split
from dkdetr.errors import UsageError
from dkdetr.student.build import build_trunk
from pipeline import calibrate, decoding, readable_images
from pipeline.calibrate import price_cache
from pipeline.fit import fit_plan
from pipeline.fit_training import NetworkTraining
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


def test_fit_is_timed_by_the_part_and_priced_for_the_ranks(
    of_jpegs: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []

    def a_second_an_image(self: NetworkTraining) -> tuple[float, float]:
        at_once.append(self._config.data.batch_size)
        return 0.0, float(self._config.data.batch_size)

    monkeypatch.setattr(NetworkTraining, "time_step", a_second_an_image)
    asked = replace(
        of_jpegs, proposals="fit", experiment="trial", fit_epochs=2, decoder="pillow",
        overrides=(
            "data.image_size=64", "student.backbone.weights=random", "data.batch_size=8",
            "compute.micro_batches=2",
        ),
    )  # fmt: skip
    for ranks, where in ((1, "in one process"), (4, "on 4 ranks")):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        fit = price_cache(asked).stages[0]
        assert f"of 8 images first, {where}, 2 micro-batches each" in fit.amount
        assert fit.seconds == pytest.approx(2 * (NUM_IMAGES // 8) * 8 / ranks)
    assert at_once == [4, 1]
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 ranks of 2 micro-batches: lower"):
        price_cache(asked)


def test_proposals_alone_are_priced_by_themselves(
    of_jpegs: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NetworkTraining, "time_step", lambda _: (0.0, 3.0))
    asked = replace(
        of_jpegs, proposals="fit", experiment="trial", fit_epochs=2, only_proposals=True,
        overrides=("data.image_size=64", "student.backbone.weights=random", "data.batch_size=8"),
    )  # fmt: skip
    price = price_cache(asked)
    steps = 2 * (NUM_IMAGES // 8)
    assert [(each.stage, each.seconds) for each in price.stages] == [("fit", 3.0 * steps)]
    assert (price.max_crops, price.num_shards, price.num_texts, price.bytes_neighbors) == (0,) * 4
    split = load_split(asked.split, asked.data_root)
    trunk = build_trunk(fit_plan(asked, split).config.student, load_weights=False)
    held = sum(each.nbytes for each in trunk.state_dict().values())
    assert price.bytes_needed == 6 * held  # weights, two moments, of this state and of the next
    shown = "\n".join(price.lines())
    assert "fit" in shown
    assert "crops" not in shown
    (asked.out / "proposals").mkdir(parents=True)
    (asked.out / "proposals/network.safetensors").touch()
    price = price_cache(asked)
    assert (price.bytes_needed, price.calibration) == (0, "nothing to measure")
    assert "nothing to train" in "\n".join(price.lines())


def test_the_disk_that_neighbour_lists_take_is_told(of_jpegs: CacheRequest) -> None:
    dim = price_cache(of_jpegs).embed_dim
    price = price_cache(replace(of_jpegs, neighbors=True))
    # Five regions an image: a searched vector in halves, 16 neighbours with cosines, and where it
    # lies; of an image the most related ones.
    assert price.bytes_neighbors == NUM_IMAGES * (5 * (2 * dim + 16 * 6 + 8) + 64 * 8)
    assert "more while neighbour lists are built" in "\n".join(price.lines())
    assert "neighbour lists are built" not in "\n".join(price_cache(of_jpegs).lines())
