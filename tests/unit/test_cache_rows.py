from dataclasses import replace

import numpy as np
import pytest

from cache.arrays import array_specs, blocks_of
from cache.codec import cosine_errors, quantize
from cache.rows import check_rows, empty_rows, rows_problem
from cache.spec import CorruptCacheError
from tests.cache_samples import HEIGHT, WIDTH, sample_plan, sample_rows, unit_rows


@pytest.fixture
def plan():
    return sample_plan()


@pytest.fixture
def rows(plan):
    found = next(r for i in range(99) if len((r := sample_rows(i, plan)).gt_boxes_xyxy) > 1)
    assert rows_problem(found, plan) is None
    return found


def _with(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("boxes_xyxy", (0, 0), np.nan, "boxes_xyxy has a value that is not finite"),
        ("boxes_xyxy", (0, 0), -1.0, "boxes_xyxy row 0 .* lies outside"),
        ("boxes_xyxy", (0, 2), WIDTH + 1.0, "boxes_xyxy row 0 .* lies outside"),
        ("boxes_xyxy", (0, 3), HEIGHT + 1.0, "boxes_xyxy row 0 .* lies outside"),
        ("boxes_xyxy", (0, 2), 0.0, "boxes_xyxy row 0 .* no area"),
        ("gt_boxes_xyxy", (1, 2), WIDTH + 2.0, "gt_boxes_xyxy row 1 .* lies outside"),
        ("objectness", 0, -9.0, "objectness is not sorted: it rises at row 1"),
        ("max_base_iou", 0, 1.1, "max_base_iou has a value outside"),
        ("region_embeddings", 0, 1.0, "region_embeddings row 0 has norm 4,"),
        ("region_embeddings", 1, 0.0, "region_embeddings row 1 has norm 0,"),
        ("region_embeddings", (0, 0), np.inf, "region_embeddings has a value that is not finite"),
        ("image_embedding", slice(None), 0.5, "image_embedding row 0 has norm 2,"),
        ("gt_embeddings", 0, 1.0, "gt_embeddings row 0 has norm 4,"),
    ],
)
def test_a_bad_value_is_refused_by_image_and_array(plan, rows, name, index, value, message):
    bad = replace(rows, **{name: _with(getattr(rows, name), index, value)})
    with pytest.raises(CorruptCacheError, match=f"image {rows.image_id} .*{message}"):
        check_rows(bad, plan)


def test_bad_shapes_and_counts_are_refused(plan, rows):
    short = replace(rows, objectness=rows.objectness[:-1])
    assert "objectness has shape" in str(rows_problem(short, plan))
    narrow = replace(plan, max_regions=1)
    assert "regions, and the plan has room for 1" in str(rows_problem(rows, narrow))
    few = replace(plan, max_gt=1)
    assert "ground-truth boxes, and the plan has room for 1" in str(rows_problem(rows, few))
    assert "image_size_hw" in str(rows_problem(replace(rows, image_size_hw=(0, 5)), plan))


def test_blocks_hold_an_image_in_its_place_and_its_truth_without_padding(plan, rows):
    blocks = blocks_of([rows, empty_rows(7, plan), rows], plan)
    n, m = rows.num_regions, len(rows.gt_boxes_xyxy)
    assert blocks["image_id"].tolist() == [rows.image_id, 7, rows.image_id]
    for name in ("boxes_xyxy", "objectness", "max_base_iou"):
        np.testing.assert_array_equal(blocks[name][2, :n], getattr(rows, name))
    half = rows.region_embeddings.astype(np.float16)
    np.testing.assert_array_equal(blocks["region_embeddings"][2, :n], half)
    assert blocks["gt/num_boxes"].tolist() == [m, 0, m]
    assert blocks["gt/first_row"].tolist() == [0, m, m]
    twice = np.concatenate([rows.gt_category_ids, rows.gt_category_ids])
    np.testing.assert_array_equal(blocks["gt/category_ids"], twice)


def test_places_without_a_row_are_nan_or_minus_one(plan):
    blocks = blocks_of([empty_rows(7, plan)], plan)
    for spec in array_specs(plan):
        if spec.dtype.startswith("float"):
            assert np.isnan(blocks[spec.name]).all(), spec.name
    assert (blocks["gt/category_ids"] == -1).all()
    assert blocks["num_regions"][0] == blocks["gt/num_boxes"][0] == 0
    assert blocks["image_id"][0] == 7


@pytest.mark.parametrize("dim", [2, 8, 512])
def test_int8_keeps_the_norm_and_the_direction(dim):
    embeddings = unit_rows(np.random.default_rng(0), 400, dim)
    levels, scale = quantize(embeddings)
    back = levels * scale.astype(np.float32)[:, None]
    assert np.abs(np.linalg.norm(back, axis=1) - 1).max() < 1e-3
    cosines = (back * embeddings).sum(1) / np.linalg.norm(back, axis=1)
    assert cosines.min() > 0.9999
    assert levels.min() >= -127


@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_the_error_of_storing_is_the_angle_between_what_goes_in_and_what_comes_out(storage):
    embeddings = unit_rows(np.random.default_rng(1), 50, 64)
    errors = cosine_errors(embeddings, storage)
    levels, scale = quantize(embeddings)
    back = (
        embeddings.astype(np.float16) if storage == "fp16" else levels * np.float64(scale)[:, None]
    )
    back = back.astype(np.float64) / np.linalg.norm(back.astype(np.float64), axis=1, keepdims=True)
    given = embeddings.astype(np.float64)
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    np.testing.assert_allclose(errors, 1 - (back * given).sum(1), atol=1e-12)
    assert (1e-9 < errors.max() < 1e-6) if storage == "fp16" else (1e-6 < errors.max() < 1e-4)
