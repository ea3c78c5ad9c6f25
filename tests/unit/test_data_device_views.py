"""Views made on the student's device are the loader's: the reference is `render_view`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dkdetr.config import DataConfig, ExperimentConfig, KDConfig, OptimConfig, StudentConfig
from dkdetr.data import device_views
from dkdetr.data.device_views import decoded_images, on_device, render_images, settle_views
from dkdetr.data.loader import make_evaluation_loader, make_training_loader
from dkdetr.data.splits import load_split
from dkdetr.data.transforms import (
    PIXEL_STD,
    ViewGeometry,
    draw_geometry,
    evaluation_geometry,
    render_view,
)
from dkdetr.engine import train as train_module
from dkdetr.engine.train import train
from dkdetr.errors import PreemptedError
from dkdetr.experiment_file import load_experiment
from dkdetr.structures import DecodedBatch, DecodedImages
from tests.faults.test_train_resume import interrupt, terminate
from tests.training_world import checkpoint_of, difference, make_world, settings
from tests.unit.data_world import coco_document, vocabulary_of, write_world

CPU = torch.device("cpu")
A_LEVEL = 1 / torch.tensor(PIXEL_STD)[:, None, None]


def picture(random, height: int, width: int, *, smooth: bool) -> np.ndarray:
    if not smooth:
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * (0.05 + 0.1 * c) + y * (0.2 - 0.05 * c)) for c in range(3)]
    return np.round(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)


def both_ways(images, geometries, side: int):
    """Returns (device's batch, the loader's pixels, its padding masks)."""
    found = render_images(decoded_images(images, geometries, range(len(images)), image_size=side))
    pairs = zip(images, geometries, strict=True)
    wanted = [render_view(image, view, image_size=side) for image, view in pairs]
    return found, torch.stack([w[0] for w in wanted]), torch.stack([w[1] for w in wanted])


def assert_close(found, wanted) -> None:
    """Torchvision's uint8 kernel has weights of 16 bits: it may round the other way, twice."""
    levels = (found - wanted).abs() / A_LEVEL
    assert levels.max() < 2.001
    assert (levels > 1.5).float().mean() < 1e-3
    assert (levels > 0.5).float().mean() < 0.15


def assert_same_views(images, geometries, side: int) -> None:
    found, pixels, masks = both_ways(images, geometries, side)
    assert torch.equal(found.padding_mask, masks)
    assert found.image_sizes_hw.tolist() == [list(view.view_hw) for view in geometries]
    assert (found.pixels[masks[:, None].expand_as(pixels)] == 0).all()
    assert_close(found.pixels, pixels)


@pytest.mark.parametrize("seed", range(12))
def test_random_views_are_the_loader_s(seed):
    random = np.random.default_rng(seed)
    side = int(random.integers(48, 130))
    images, geometries = [], []
    for number in range(5):
        height, width = (int(n) for n in random.integers(1 if number == 4 else 30, 160, 2))
        images.append(picture(random, height, width, smooth=number % 2 == 0))
        geometries.append(
            draw_geometry(
                (height, width), torch.zeros(0, 4), image_size=side, scale_range=(0.1, 2.0),
                flip_probability=0.5, generator=torch.Generator().manual_seed(100 * seed + number),
            )
        )  # fmt: skip
    assert any(view.flip for view in geometries) or seed != 0
    assert_same_views(images, geometries, side)


def test_the_edges_of_what_may_be_asked():
    random = np.random.default_rng(0)
    sizes = [(1, 1), (1, 90), (200, 3), (64, 64), (40, 64), (40, 64)]
    images = [picture(random, *size, smooth=False) for size in sizes]
    whole = [evaluation_geometry(size, image_size=64) for size in sizes[:4]]
    far_corner = ViewGeometry((40, 64), (80, 128), 16, 64, (64, 64), flip=True)
    near_corner = replace(far_corner, crop_top=0, crop_left=0)
    assert_same_views(images, [*whole, far_corner, near_corner], 64)
    # A size that stays is not resampled at all: the picture itself, exactly.
    found, pixels, _ = both_ways([images[3]], [whole[3]], 64)
    assert torch.equal(found.pixels, pixels)


def test_images_that_do_not_fit_together_are_rendered_in_parts(monkeypatch):
    random = np.random.default_rng(1)
    sizes = [(40, 60), (90, 20), (100, 120), (30, 30), (31, 30)]
    images = [picture(random, *size, smooth=True) for size in sizes]
    views = [evaluation_geometry(size, image_size=64) for size in sizes]
    decoded = decoded_images(images, views, range(5), image_size=64)
    together = render_images(decoded)
    monkeypatch.setattr(device_views, "_PIXELS_AT_ONCE", 3000)
    parts = [part for part, _ in device_views._padded_parts(decoded)]
    assert [(part.start, part.stop) for part in parts] == [(0, 1), (1, 2), (2, 3), (3, 5)]
    apart = render_images(decoded)
    assert ((together.pixels - apart.pixels).abs() / A_LEVEL).max() < 1.001


@pytest.mark.parametrize("with_masks", [False, True])
def test_a_batch_differs_in_nothing_but_the_rounding_of_its_pixels(tmp_path, with_masks):
    document = coco_document()
    for each in document["annotations"]:
        x, y, w, h = each["bbox"]
        each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    split = load_split(write_world(tmp_path, document), tmp_path)
    config = ExperimentConfig(
        name="test",
        student=StudentConfig(mask_head=with_masks),
        kd=KDConfig(regions_per_image=0),
        optim=OptimConfig(epochs=2),
        data=DataConfig(batch_size=2, workers=0, image_size=96),
    )
    there = replace(config, data=replace(config.data, augment="device"))
    loaders = [
        make_training_loader(split, vocabulary_of(split), each, cache_path=None)
        for each in (config, there)
    ]
    seen = 0
    for wanted, loaded in zip(*loaders, strict=True):
        assert isinstance(loaded, DecodedBatch)
        assert loaded.images.pixels.dtype == torch.uint8
        found = on_device(loaded, CPU)
        for ours, theirs in zip(found.targets, wanted.targets, strict=True):
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.boxes_cxcywh, theirs.boxes_cxcywh)
            assert (ours.masks is None) == (not with_masks)
            assert ours.masks is None or torch.equal(ours.masks, theirs.masks)
        for name in ("padding_mask", "image_sizes_hw", "original_sizes_hw"):
            assert torch.equal(getattr(found.images, name), getattr(wanted.images, name))
        assert found.images.image_ids == wanted.images.image_ids
        assert_close(found.images.pixels, wanted.images.pixels)
        assert on_device(wanted, CPU).images is not None  # a finished batch only moves
        seen += 1
    assert seen == len(loaders[0]) > 2


@pytest.mark.parametrize("workers", [0, 1])
def test_images_to_be_scored_may_be_left_to_the_device(workers: int, tmp_path):
    split = load_split(write_world(tmp_path, coco_document(), "my_val"), tmp_path)
    config = ExperimentConfig(name="test", data=DataConfig(workers=workers, image_size=96))
    pairs = zip(
        make_evaluation_loader(split, config),
        make_evaluation_loader(split, config, leave_views=True),
        strict=True,
    )
    for wanted, left in pairs:
        assert isinstance(left, DecodedImages)
        assert left.pixels.dtype == torch.uint8
        found = render_images(left)
        assert found.image_ids == wanted.image_ids
        for name in ("padding_mask", "image_sizes_hw", "original_sizes_hw"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))
        assert_close(found.pixels, wanted.pixels)


def test_regions_are_the_same_and_a_cut_run_ends_bitwise_as_a_whole_one(tmp_path):
    world = make_world(tmp_path)
    there = settings(data={"augment": "device", "workers": 1}, compute={"micro_batches": 2})
    split = load_split(world.split, world.root)
    streams = []
    for augment in ("loader", "device"):
        config = replace(there, data=replace(there.data, augment=augment, workers=0))
        streams.append(
            make_training_loader(
                split, vocabulary_of(split), config, cache_path=world.cache, start_epoch=4
            )
        )
    for wanted, found in zip(*streams, strict=True):
        for name in ("boxes_cxcywh", "embeddings", "valid"):
            assert torch.equal(getattr(found.regions, name), getattr(wanted.regions, name))
    train(world.request("whole", there))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, terminate, 7, 1)
        with pytest.raises(PreemptedError):
            train(world.request("cut", there))
    train(world.request("cut", there))
    assert difference(checkpoint_of(world, "whole"), checkpoint_of(world, "cut")) == ""


@pytest.mark.parametrize(
    ("augment", "device", "settled"),
    [
        ("auto", "cuda:1", "device"), ("auto", "cpu", "loader"), ("loader", "cuda", "loader"),
        ("device", "cpu", "device"),
    ],
)  # fmt: skip
def test_auto_makes_views_where_the_student_is_if_that_is_a_gpu(augment, device, settled):
    config = settings(data={"augment": augment})
    found = settle_views(config, torch.device(device))
    assert found == replace(config, data=replace(config.data, augment=settled))


def test_a_training_of_auto_is_that_of_what_it_settles_on(tmp_path, monkeypatch):
    """On a CPU the loader's; taken for a GPU, the device's. The run says which."""
    world = make_world(tmp_path)
    plain = {
        augment: settings(data={"augment": augment}) for augment in ("auto", "loader", "device")
    }
    for augment in ("loader", "device"):
        train(world.request(augment, plain[augment]))
    train(world.request("on a cpu", plain["auto"]))
    assert difference(checkpoint_of(world, "on a cpu"), checkpoint_of(world, "loader")) == ""
    settle = train_module.settle_views
    gpu = torch.device("cuda")
    monkeypatch.setattr(train_module, "settle_views", lambda config, _: settle(config, gpu))
    request = world.request("on a gpu", plain["auto"])
    train(request)
    assert difference(checkpoint_of(world, "on a gpu"), checkpoint_of(world, "device")) == ""
    assert json.loads((request.run / "run.json").read_text())["augment"] == "device"
    assert load_experiment(str(request.run / "config.toml")).config.data.augment == "auto"


def test_float16_as_on_a_gpu_stays_as_close(monkeypatch):
    """Rounding alone: a CPU multiplies float16, adding in float32, as a GPU's matrix units do."""
    parts = device_views._padded_parts
    monkeypatch.setattr(
        device_views,
        "_padded_parts",
        lambda images: ((part, padded.half()) for part, padded in parts(images)),
    )
    random = np.random.default_rng(5)
    sizes = [(120, 160), (333, 90), (64, 200), (1, 40), (300, 300)]
    images = [picture(random, *size, smooth=number % 2 == 0) for number, size in enumerate(sizes)]
    views = [
        draw_geometry(
            size, torch.zeros(0, 4), image_size=160, scale_range=(0.1, 2.0),
            flip_probability=0.5, generator=torch.Generator().manual_seed(number),
        )
        for number, size in enumerate(sizes)
    ]  # fmt: skip
    assert_same_views(images, views, 160)
    found, pixels, masks = both_ways(images, views, 160)
    brighter = ((found.pixels - pixels) / A_LEVEL)[~masks[:, None].expand_as(pixels)]
    assert brighter.mean().abs() < 0.02  # halves that float16 makes go up as often as down


@pytest.mark.gpu
def test_float16_on_a_gpu_stays_as_close():
    random = np.random.default_rng(3)
    images = [picture(random, 480, 640, smooth=number % 2 == 0) for number in range(4)]
    views = [
        draw_geometry(
            (480, 640), torch.zeros(0, 4), image_size=1024, scale_range=(0.1, 2.0),
            flip_probability=0.5, generator=torch.Generator().manual_seed(number),
        )
        for number in range(4)
    ]  # fmt: skip
    decoded = decoded_images(images, views, range(4), image_size=1024)
    found = render_images(decoded.to("cuda")).pixels.cpu()
    assert_close(found, render_images(decoded).pixels)
