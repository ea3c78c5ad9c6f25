"""What stage 1 records of a cache's making: all that decides a byte, each refused by its name."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from cache.layout import Head, load_plan
from cache.spec import StaleCacheError
from cache.writer import create_or_resume
from pipeline.build import cache_teacher
from pipeline.request import CacheRequest
from tests.e2e.tiny_stage_one import TINY_CLIP

FIELDS = {
    "schema",
    "split.name", "split.protocol", "split.num_images", "split.image_ids_xxh3_128",
    "split.base_category_ids_xxh3_128", "split.base_boxes_xxh3_128",
    "images.content_xxh3_128", "images.total_bytes", "images.decoder", "images.exif",
    "proposals.source", "proposals.xxh3_128", "proposals.keep", "proposals.nms_iou",
    "proposals.min_side", "proposals.pre_nms",
    "crops.mode", "crops.scales", "crops.combine", "crops.min_side", "crops.views", "crops.clamp",
    "crops.rounding",
    "teacher.name", "teacher.model", "teacher.activation", "teacher.weights_sha256",
    "teacher.random", "teacher.embed_dim", "teacher.precision", "teacher.image_size_hw",
    "teacher.mean", "teacher.std", "teacher.interpolation", "teacher.resampling",
    "storage.region_embeddings",
    "batch_layout.crop_batch", "batch_layout.image_batch",
}  # fmt: skip


def leaves(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def changed(parts: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    table = json.loads(json.dumps(dict(parts)))
    place = table
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    place[path[-1]] = not old if isinstance(old, bool) else (
        old + 1 if isinstance(old, (int, float)) else [*old, 9] if isinstance(old, list)
        else f"{old}x"
    )  # fmt: skip
    return table


def test_every_field_is_there_and_refused_by_its_name(request_: CacheRequest) -> None:
    cache_teacher(request_)
    parts, plan = Head.load(request_.out).parts, load_plan(request_.out)
    found = {".".join(path): path for path in leaves(parts)}
    model = {f"teacher.architecture.{'.'.join(path)}" for path in leaves(TINY_CLIP)}
    assert found.keys() == FIELDS | model
    for name, path in found.items():
        with pytest.raises(StaleCacheError) as caught:
            create_or_resume(request_.out, parts=changed(parts, path), plan=plan, provenance={})
        lines = str(caught.value).splitlines()
        assert [line.split()[0] for line in lines if "  cache: " in line] == [name]
        assert caught.value.exit_code == 4
        assert "next: the same command with another --out" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"precision": "bf16"}, r"teacher\.precision"),
        ({"storage": "int8"}, "storage"),
        ({"crop_batch": 8}, "batch_layout"),
        ({"image_batch": 2}, "batch_layout"),
        ({"keep": 4}, r"proposals\.keep"),
    ],
)
def test_a_setting_that_decides_a_byte_reaches_the_fingerprint(
    request_: CacheRequest, change: dict[str, Any], named: str
) -> None:
    cache_teacher(request_)
    with pytest.raises(StaleCacheError, match=named):
        cache_teacher(replace(request_, **change))
