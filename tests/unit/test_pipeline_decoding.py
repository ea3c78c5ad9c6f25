"""The decoder of a device: JPEGs of its own, everything doubtful by Pillow, nothing read past."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dkdetr.data.image_files import UnreadableImageError
from pipeline.decoding import EncodedImage, decode_on_device, decoder_name, suits_a_device

CPU = torch.device("cpu")


def encoded(mode: str = "RGB", kind: str = "JPEG", size=(67, 43), **options) -> bytes:
    random = np.random.default_rng(4)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
    file = io.BytesIO()
    coarse.convert(mode).save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, expected_hw=(43, 67)) -> np.ndarray | UnreadableImageError:
    image = EncodedImage(data, Path("a.jpg"), expected_hw)
    (pixels,) = decode_on_device([image], CPU)
    return pixels if isinstance(pixels, UnreadableImageError) else np.asarray(pixels)


def pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_those_of_pillow_to_a_few_grey_levels(mode, options):
    data = encoded(mode, quality=90, **options)
    assert suits_a_device(data, (43, 67))
    found, wanted = decoded(data), pillow(data)
    assert found.shape == wanted.shape == (43, 67, 3)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - wanted).max() <= 8


def test_what_is_no_plain_whole_jpeg_of_its_size_is_not_for_a_device():
    assert not suits_a_device(encoded("CMYK"), (43, 67))
    assert not suits_a_device(encoded(kind="PNG"), (43, 67))
    assert not suits_a_device(encoded(), (67, 43))
    assert not suits_a_device(encoded()[:-200], (43, 67))
    assert not suits_a_device(b"", (43, 67))
    assert suits_a_device(encoded() + b"\0\0\0", (43, 67))  # padded files are common


def test_one_refused_picture_changes_no_other():
    good, other = encoded(), encoded("L")
    broken = b"\xff\xd8\xff\xd9"  # begins and ends as a JPEG
    images = [EncodedImage(d, Path(f"{i}.jpg"), (43, 67))
              for i, d in enumerate((good, broken, other))]  # fmt: skip
    first, second, third = decode_on_device(images, CPU)
    assert isinstance(second, UnreadableImageError)
    assert "1.jpg" in str(second)
    np.testing.assert_array_equal(np.asarray(first), decoded(good))
    np.testing.assert_array_equal(np.asarray(third), decoded(other))


def test_the_fingerprint_tells_the_decoders_apart():
    names = {
        decoder_name("pillow", CPU),
        decoder_name("torchvision", CPU),
        decoder_name("torchvision", torch.device("cuda")),
    }
    assert len(names) == 3
    assert decoder_name("pillow", torch.device("cuda")) in names
