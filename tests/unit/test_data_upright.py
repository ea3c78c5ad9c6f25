"""Pictures that people bring are turned upright; nothing that has annotations is."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dkdetr.data.image_files import decode_image, decode_upright
from dkdetr.data.picture_input import rgb_pixels

ROOT = Path(__file__).parents[2]
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def stored(orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, exif=exif, lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_pillow_turns_it(orientation: int, tmp_path: Path):
    data = stored(orientation)
    (tmp_path / "p.png").write_bytes(data)
    with Image.open(tmp_path / "p.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(rgb_pixels(image), expected)
    np.testing.assert_array_equal(rgb_pixels(tmp_path / "p.png"), expected)
    pixels, told = decode_upright(data, tmp_path)
    np.testing.assert_array_equal(pixels, expected)
    assert told == orientation
    assert pixels.flags.c_contiguous
    # The same bytes with annotations, as training, scoring and caches read them.
    np.testing.assert_array_equal(decode_image(data, tmp_path, expected_hw=(4, 6)), PIXELS)


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: int):
    pixels, told = decode_upright(stored(orientation, "WEBP"), Path("p"))
    np.testing.assert_array_equal(pixels, PIXELS)
    assert told == 1


@pytest.mark.parametrize("header", [b"XXXX", b"MM\x00*", b"II*\x00"])
def test_broken_exif_data_leave_the_picture_readable(header: bytes):
    data = bytearray(stored(6, "WEBP"))
    at = data.index(b"MM\x00*") if b"MM\x00*" in data else data.index(b"II*\x00")
    data[at : at + 8] = header + b"\xff\xff\xff\xf0"  # where its table is said to begin
    pixels, told = decode_upright(bytes(data), Path("p"))
    np.testing.assert_array_equal(pixels, PIXELS)
    assert told == 1


def test_only_inference_turns_pictures():
    """Who reads a data set's pictures must not even know the turned way."""
    turned = re.compile(r"\b(rgb_pixels|decode_upright|turned_upright|orientation_of)\b")
    knowing = {
        str(path.relative_to(ROOT))
        for folder in ("dkdetr", "pipeline", "cache")
        for path in (ROOT / folder).rglob("*.py")
        if turned.search(path.read_text(encoding="utf-8"))
    }
    assert knowing == {
        "dkdetr/data/upright.py",
        "dkdetr/data/image_files.py",
        "dkdetr/data/picture_faults.py",  # which names those that annotators saw turned
        "dkdetr/data/picture_input.py",
        "dkdetr/inference/picture_sources.py",
        "dkdetr/inference/predict.py",
        "dkdetr/inference/serve_finder.py",
    }
