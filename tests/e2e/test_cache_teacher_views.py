"""Crop rules and views of a cache, and what is measured of it before and after."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.spec import StaleCacheError
from cache.store import open_cache
from dkdetr.data.image_files import read_image
from dkdetr.errors import DataError, UsageError
from pipeline.build import cache_teacher
from pipeline.calibrate import price_cache
from pipeline.crops import CropRule
from pipeline.inspect import verify_and_report
from pipeline.request import CacheRequest
from pipeline.teacher import load_teacher
from tests.e2e.tiny_stage_one import (
    NUM_IMAGES,
)


def test_views_and_crop_rules_are_stored_and_part_of_the_fingerprint(
    request_: CacheRequest, teacher_spec: str, world: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(teacher_spec)
    picture = read_image(world / "images" / "012.png", expected_hw=(62, 80))
    mirrored = picture[:, ::-1].copy()
    rules = {
        "flip": CropRule(views="orig,flip"),
        "avg": CropRule(views="avg"),
        "sum": CropRule("clip_center", (1.0, 1.5), "sum"),
        "context": CropRule("context_square", (1.0,)),
        "pad": CropRule("pad_square", (2.0,)),
        "native": CropRule("native"),
    }
    prints: set[str] = set()
    for name, rule in rules.items():
        out = tmp_path / name
        cache_teacher(replace(request_, out=out, crops=rule))
        reader = open_cache(out)
        prints.add(reader.info.fingerprint)
        rows = reader.rows(12)
        plain = replace(rule, views="orig") if rule.views == "orig,flip" else rule
        expected = teacher.encode_regions(picture, rows.boxes_xyxy, plain)
        assert ((rows.region_embeddings * expected).sum(1) > 0.999).all(), name
        if name == "flip":
            x1, y1, x2, y2 = rows.boxes_xyxy.T
            boxes = np.stack((80 - x2, y1, 80 - x1, y2), axis=1)
            expected = teacher.encode_regions(mirrored, boxes, plain)
            assert ((rows.flipped_embeddings * expected).sum(1) > 0.9999).all()
            assert ((rows.region_embeddings * expected).sum(1) < 0.9999).any()
            assert reader.rows(7).flipped_embeddings.shape == (0, 16)
        else:
            assert rows.flipped_embeddings is None
        with pytest.raises(StaleCacheError, match=r"crops\."):
            cache_teacher(replace(request_, out=out))
    assert len(prints) == len(rules)


def test_int8_keeps_both_views(request_: CacheRequest, tmp_path: Path) -> None:
    both = replace(request_, crops=CropRule(views="orig,flip"))
    cache_teacher(both)
    cache_teacher(replace(both, out=tmp_path / "int8", storage="int8"))
    half, byte = open_cache(request_.out).rows(3), open_cache(tmp_path / "int8").rows(3)
    for name in ("region_embeddings", "flipped_embeddings"):
        cosine = (getattr(half, name) * getattr(byte, name)).sum(1)
        assert (cosine > 0.999).all()
        assert not np.array_equal(getattr(half, name), getattr(byte, name))


def test_verify_names_base_objects_by_crop_mode(request_: CacheRequest, world: Path) -> None:
    cache_teacher(request_)
    checked = verify_and_report(request_.out, world, crop_modes="all", device="cpu")
    assert [each.mode for each in checked.zero_shot] == [
        "squash, as cached", "squash", "clip_center", "pad_square", "context_square",
    ]  # fmt: skip
    cached, again, *_ = checked.zero_shot
    assert (cached.num_objects, cached.num_names) == (70, 2)
    assert cached.top5 == 1.0  # of two names
    assert again.top1 == pytest.approx(cached.top1, abs=1.5 / 70)
    base, novel = checked.recall
    assert base.num_objects == 70
    assert novel.num_objects == 35
    # The cached figure, by hand.
    reader = open_cache(request_.out)
    metadata, names = reader.text()
    assert metadata["is_base"] == [True, True, False]
    right = []
    for number in reader.image_ids.tolist():
        rows = reader.rows(number)
        best = (rows.gt_embeddings @ names[:2].T).argmax(1)
        right += [
            (3, 5)[label] == wanted
            for label, wanted in zip(best, rows.gt_category_ids, strict=True)
        ]
    assert cached.top1 == pytest.approx(np.mean(right))
    with pytest.raises(UsageError, match="--crop-modes"):
        verify_and_report(request_.out, world, crop_modes="round")


def test_the_times_of_every_stage_are_measured(request_: CacheRequest, tmp_path: Path) -> None:
    price = price_cache(request_)
    assert not request_.out.exists()
    fit, shards, text = price.stages
    assert fit.seconds is None
    assert fit.amount == "nothing to train"
    assert shards.seconds > 0
    # Three proposals an image at two scales, two base boxes at two, the picture itself.
    assert f"about {NUM_IMAGES * 11:,} crops" in shards.amount
    assert text.seconds > 0
    assert "8 images of two shards and 16 of their crops" in price.calibration
    trained = replace(
        request_, proposals="fit", experiment="trial", fit_epochs=2,
        overrides=(
            "data.image_size=64", "student.backbone.weights=random", "data.augment=auto",
        ),
    )  # fmt: skip
    price = price_cache(trained)
    assert price.stages[0].seconds > 0
    assert f"{price.fit_iterations} training steps" in price.stages[0].amount
    absent = replace(request_, teacher="ViT-B-32-quickgelu:openai")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("pipeline.calibrate.load_teacher", _unreachable)
        price = price_cache(absent)
    assert price.calibration == "not measured: no network"
    assert all(stage["seconds"] is None for stage in price.as_json()["stages"])


def _unreachable(*_: object, **__: object) -> None:
    raise DataError("no network")
