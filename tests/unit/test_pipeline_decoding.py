"""The decoder of a device: JPEGs of its own, everything doubtful by Pillow, nothing read past."""

import contextlib
import io
import json
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from dkdetr.data.image_files import MAX_IMAGE_PIXELS, UnreadableImageError
from dkdetr.data.splits import load_split
from dkdetr.errors import UsageError
from pipeline import decoding
from pipeline.decoding import (
    EncodedImage,
    choose_decoder,
    decode_on_device,
    decoder_name,
    suits_a_device,
)
from pipeline.readable_images import readable_images

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
    rgb = encoded(keep_rgb=True)  # Adobe's marker says that colours were not transformed
    assert Image.open(io.BytesIO(rgb)).info["adobe_transform"] == 0
    assert not suits_a_device(rgb, (43, 67))


@pytest.mark.parametrize("taken_for", ["error", "ignore"])
def test_a_bomb_is_pillow_s_to_refuse(taken_for: str):
    side = 9500
    frame = encoded().index(b"\xff\xc0") + 5  # behind length and depth: height, width
    bomb = bytearray(encoded())
    bomb[frame : frame + 4] = struct.pack(">HH", side, side)
    assert side * side > MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter(taken_for)
        assert not suits_a_device(bytes(bomb), (side, side))
        assert not suits_a_device(bytes(bomb), (43, 67))


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


CUDA = torch.device("cuda", 0)


@pytest.fixture
def given_nvjpeg(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for a GPU whose decoder works; remembers the stream at work and who reads later."""
    said: list[str] = []

    class Queue:
        def synchronize(self) -> None:
            said.append("waited for")

    @contextlib.contextmanager
    def stream(queue: Queue):
        said.append("own stream")
        yield
        said.append("left")

    class Pixels(torch.Tensor):
        def record_stream(self, stream: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            said.append(f"read by {stream}")

    def decode(data: list[torch.Tensor], *, mode: ImageReadMode, device: torch.device):
        said.append(f"decoded on {device}")
        return [each.as_subclass(Pixels) for each in decode_jpeg(data, mode=mode, device="cpu")]

    monkeypatch.setattr(decoding, "decode_jpeg", decode)
    monkeypatch.setattr(decoding, "_own_queue", lambda _device: Queue())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _device: "the default stream")
    decoding._decodes.cache_clear()
    yield said
    decoding._decodes.cache_clear()


def test_auto_is_the_device_s_decoder_where_there_is_one(given_nvjpeg: list[str]):
    assert choose_decoder("auto", CPU) == "pillow"
    assert choose_decoder("torchvision", CPU) == "torchvision"
    assert "decoded on cuda:0" not in given_nvjpeg
    assert choose_decoder("pillow", CUDA) == "pillow"
    assert choose_decoder("auto", CUDA) == "torchvision"
    assert given_nvjpeg.count("decoded on cuda:0") == 1


def test_a_device_without_a_decoder_is_told(monkeypatch: pytest.MonkeyPatch, given_nvjpeg):
    def refuse(data: list[torch.Tensor], **_: object):
        raise RuntimeError("compiled without nvJPEG")

    monkeypatch.setattr(decoding, "decode_jpeg", refuse)
    assert choose_decoder("auto", CUDA) == "pillow"
    with pytest.raises(UsageError, match="decodes no JPEG on 'cuda:0'"):
        choose_decoder("torchvision", CUDA)


def test_nvjpeg_writes_to_memory_that_nobody_reads(given_nvjpeg: list[str]):
    """Of a stream of its own; the readers' stream is said to use it before it may come back."""
    pixels = list(decode_on_device([EncodedImage(encoded(), Path("a"), (43, 67))] * 2, CUDA))
    assert len(pixels) == 2
    reader = "read by the default stream"
    assert given_nvjpeg == ["own stream", "decoded on cuda:0", "waited for", "left", reader, reader]


def test_a_device_s_failure_is_no_bad_picture(monkeypatch: pytest.MonkeyPatch):
    def fail(data: list[torch.Tensor], **_: object):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(decoding, "decode_jpeg", fail)
    with pytest.raises(torch.OutOfMemoryError):
        list(decode_on_device([EncodedImage(encoded(), Path("a"), (43, 67))], CPU))


def test_the_next_chunk_is_decoded_while_one_is_used(tmp_path: Path):
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"no picture" if number == 3 else encoded())
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 43, "width": 67} for n in range(6)]
    annotations = tmp_path / "annotations.json"
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    annotations.write_text(json.dumps(content))
    split = load_split(f"coco:{tmp_path}:{annotations}", tmp_path)
    reached = threading.Event()

    class Watching(dict):
        """Told of a bad picture: here of the second chunk's, before anybody asked for it."""

        def __setitem__(self, key: int, value: str) -> None:
            super().__setitem__(key, value)
            reached.set()

    quarantined = Watching()
    chunks = readable_images(
        split, split.images, quarantined, chunk_size=3, decoder="torchvision", device=CPU
    )
    first = next(chunks)
    assert reached.wait(60)
    assert [image.file_name for image, _ in first] == ["0.jpg", "1.jpg", "2.jpg"]
    rest = [image.file_name for chunk in chunks for image, _ in chunk]
    assert rest == ["4.jpg", "5.jpg"]
    assert list(quarantined) == [3]
