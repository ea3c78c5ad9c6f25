"""Run lengths against masks painted by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dkdetr.run_lengths import (
    areas,
    boxes_xywh,
    decode_mask,
    encode_masks,
    rasterise,
    segmentation_rle,
    unpack_counts,
)

RING = [1.0, 2.0, 4.0, 2.0, 4.0, 5.0, 1.0, 5.0]


def painted() -> np.ndarray:
    mask = np.zeros((6, 7), dtype=bool)
    mask[2:5, 1:4] = True
    return mask


@settings(deadline=None, max_examples=60)
@given(arrays(bool, st.tuples(st.just(3), st.integers(1, 9), st.integers(1, 9))))
def test_there_and_back(masks):
    rles = encode_masks(masks)
    assert json.loads(json.dumps(rles)) == rles
    for mask, rle in zip(masks, rles, strict=True):
        assert np.array_equal(decode_mask(rle), mask)
        runs = np.diff(np.flatnonzero(np.diff(np.r_[2, mask.T.ravel(), 2])))
        expected = runs.tolist() if not mask[0, 0] else [0, *runs.tolist()]
        assert unpack_counts(rle["counts"]).tolist() == expected
    assert areas(rles).tolist() == masks.sum((1, 2)).tolist()


def test_a_pixel_is_an_area():
    assert np.array_equal(rasterise([np.array(RING).reshape(-1, 2)], (6, 7)), painted())
    rle = encode_masks(painted()[None])
    assert boxes_xywh(rle).tolist() == [[1, 2, 3, 3]]
    assert boxes_xywh(rle * 300).tolist() == [[1, 2, 3, 3]] * 300
    assert areas(rle * 300).tolist() == [9] * 300
    assert areas([]).tolist() == []
    assert boxes_xywh([]).shape == (0, 4)


def test_every_form_of_a_segmentation_is_the_same_mask():
    packed = encode_masks(painted()[None])[0]
    listed = {"size": [6, 7], "counts": [8, 3, 3, 3, 3, 3, 19]}
    for form in ([RING], packed, listed):
        assert np.array_equal(decode_mask(segmentation_rle(form, (6, 7))), painted())
    two = [RING, [5.0, 0.0, 7.0, 0.0, 7.0, 1.0, 5.0, 1.0]]
    both = painted()
    both[0, 5:7] = True
    assert np.array_equal(decode_mask(segmentation_rle(two, (6, 7))), both)


@pytest.mark.parametrize(
    "form",
    [
        None,
        [],
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, "6"]],
        7,
        {"size": [7, 6], "counts": "8"},
        {"size": [6, 7]},
        {"size": [6, 7], "counts": ""},
        {"size": [6, 7], "counts": "833"},
        {"size": [6, 7], "counts": "8 \x01"},
        {"size": [6, 7], "counts": "8P"},
        {"size": [6, 7], "counts": [8, 3]},
        {"size": [6, 7], "counts": [50, -8]},
        {"size": [6, 7], "counts": [4.5, 37.5]},
    ],
)
def test_what_is_no_mask_is_refused(form):
    with pytest.raises(ValueError, match=r"polygons|run lengths"):
        segmentation_rle(form, (6, 7))
