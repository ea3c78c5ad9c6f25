import io
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from dkdetr.data import image_files
from dkdetr.data.image_files import (
    MAX_IMAGE_PIXELS,
    ImageFolder,
    UnreadableImageError,
    decode_image,
    links_allowed,
    read_image,
    safe_join,
    say_links_are_followed,
)
from dkdetr.data.splits import load_split
from dkdetr.errors import DataError
from tests.unit.data_world import coco_document, png_header, write_world

HERE = Path("x.jpg")


def encoded(kind="JPEG", size_hw=(40, 60), mode="RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    to = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(to, kind, **options)
    return to.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_allowed_formats_give_rgb_whatever_the_file_is_called(kind, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(kind))
    pixels = read_image(path, expected_hw=(40, 60))
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_kinds_of_pixels_become_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    kind = "JPEG" if mode == "CMYK" else kind
    assert decode_image(encoded(kind, mode=mode), HERE, expected_hw=(40, 60)).shape == (40, 60, 3)


def test_a_jpeg_cut_off_anywhere_is_refused_and_named():
    whole = encoded()
    # The last two bytes are the end marker; decoders do without them.
    for length in np.linspace(0, len(whole) - 3, 50, dtype=int):
        with pytest.raises(UnreadableImageError, match=r"image x\.jpg") as caught:
            decode_image(whole[:length], HERE, expected_hw=(40, 60))
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_other_formats_cut_off_are_refused(kind):
    whole = encoded(kind)
    for length in np.linspace(0, int(len(whole) * 0.98), 20, dtype=int):
        with pytest.raises(UnreadableImageError):
            decode_image(whole[:length], HERE, expected_hw=(40, 60))


def test_noise_in_a_file_never_raises_anything_else():
    random = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = np.frombuffer(encoded(kind), dtype=np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[random.integers(0, min(len(broken), 400), 3)] = random.integers(0, 256, 3)
            try:
                decode_image(broken.tobytes(), HERE, expected_hw=(40, 60))
            except UnreadableImageError:
                continue


def test_a_format_outside_the_list_and_deep_pixels_are_refused():
    with pytest.raises(UnreadableImageError, match="none of JPEG"):
        decode_image(encoded("GIF"), HERE, expected_hw=(40, 60))
    to = io.BytesIO()
    Image.fromarray(np.full((40, 60), 40000, dtype=np.uint16)).save(to, "PNG")
    with pytest.raises(UnreadableImageError, match="8 bits"):
        decode_image(to.getvalue(), HERE, expected_hw=(40, 60))


def test_the_size_must_be_the_annotated_one():
    with pytest.raises(UnreadableImageError, match="60 x 40 pixels, its annotation says 40 x 60"):
        decode_image(encoded(), HERE, expected_hw=(60, 40))


def test_orientation_tags_do_not_turn_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by a quarter
    pixels = decode_image(encoded("PNG", exif=exif), HERE, expected_hw=(40, 60))
    np.testing.assert_array_equal(pixels, decode_image(encoded("PNG"), HERE, expected_hw=(40, 60)))


@pytest.mark.parametrize("taken_for", ["error", "ignore"])
@pytest.mark.parametrize("side", [9500, 30000])
def test_a_bomb_is_refused_before_it_unpacks(side, taken_for):
    """Whatever the process does with Pillow's warning of the smaller one."""
    assert side * side > MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter(taken_for)
        with pytest.raises(UnreadableImageError, match="pixels"):
            decode_image(png_header(side), HERE, expected_hw=(side, side))


def test_threads_that_decode_leave_the_process_s_warning_filters_alone(monkeypatch):
    """Two pictures: the second is begun within the first and ended after it.

    Saving and restoring the filters would then leave the first one's behind for good, and take
    away a filter that somebody else set meanwhile.
    """
    check, begun, may_end = image_files._check_header, {}, {}
    for height in (40, 41):
        begun[height], may_end[height] = threading.Event(), threading.Event()

    def check_and_wait(image, path, expected_hw):
        begun[image.height].set()
        assert may_end[image.height].wait(60)
        check(image, path, expected_hw)

    def decode(height):
        return decode_image(encoded(size_hw=(height, 60)), HERE, expected_hw=(height, 60))

    monkeypatch.setattr(image_files, "_check_header", check_and_wait)
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        before = list(warnings.filters)
        first = pool.submit(decode, 40)
        assert begun[40].wait(60)
        second = pool.submit(decode, 41)
        assert begun[41].wait(60)
        during = list(warnings.filters)
        warnings.filterwarnings("ignore", message="set by somebody else")
        for height, decoded in ((40, first), (41, second)):
            may_end[height].set()
            assert decoded.result(60).shape == (height, 60, 3)
        assert during == before
        assert list(warnings.filters)[1:] == before
        assert warnings.filters[0][0] == "ignore"


def test_tolerance_of_truncated_files_set_by_another_library_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES"):
        decode_image(encoded(), HERE, expected_hw=(40, 60))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"gone\.jpg"):
        read_image(tmp_path / "gone.jpg", expected_hw=(1, 1))
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path, expected_hw=(1, 1))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "..", "a\\b.jpg", "..\\x.jpg",
        "a\0.jpg", "", "http://host/x.jpg", "file:///etc/passwd", "C:/x.jpg", "C:x.jpg", "//h/x",
        "a" * 300 + "/" + "b" * 5000,
    ],
)  # fmt: skip
def test_names_that_leave_the_root_are_refused(name, tmp_path):
    with pytest.raises(DataError) as caught:
        safe_join(tmp_path / "root", name).stat()
    assert caught.value.exit_code == 3


def test_links_that_leave_the_root_are_refused_and_those_inside_are_not(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (root / "in.jpg").write_bytes(b"y")
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "link.jpg").symlink_to(root / "in.jpg")
    for name in ("out.jpg", "up/secret.jpg"):
        with pytest.raises(DataError, match="leads out"):
            safe_join(root, name)
    with pytest.raises((DataError, OSError)):
        safe_join(root, "loop.jpg").stat()
    assert safe_join(root, "link.jpg").read_bytes() == b"y"
    assert safe_join(root, "sub folder/é ü.jpg") == root / "sub folder/é ü.jpg"
    linked_root = tmp_path / "linked"
    linked_root.symlink_to(root)
    assert safe_join(linked_root, "in.jpg").read_bytes() == b"y"


@pytest.mark.parametrize("name", ["loop", "loop/a.jpg"])
def test_a_loop_of_links_is_refused_by_a_resolve_that_does_not_mind_it(tmp_path, monkeypatch, name):
    """As Python's from 3.13 on."""
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: Path(os.path.realpath(self)))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="a loop of links"):
        safe_join(tmp_path, name)
    assert safe_join(tmp_path, "absent/a.jpg") == tmp_path / "absent/a.jpg"


def test_links_may_leave_where_the_user_says_so_and_names_still_may_not(
    tmp_path, monkeypatch, capsys
):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "object").write_bytes(b"x")
    (root / "a.jpg").symlink_to(tmp_path / "object")
    with pytest.raises(DataError, match="DKDETR_ALLOW_SYMLINKS=1"):
        ImageFolder(root).path("a.jpg")
    for said in ("", "0", "false"):
        monkeypatch.setenv("DKDETR_ALLOW_SYMLINKS", said)
        assert not links_allowed()
    monkeypatch.setenv("DKDETR_ALLOW_SYMLINKS", "1")
    assert ImageFolder(root).path("a.jpg").read_bytes() == b"x"
    assert ImageFolder(root).leads_out("a.jpg")
    for name in ("../object", "/etc/passwd"):
        with pytest.raises(DataError, match="no path inside"):
            ImageFolder(root).path(name)
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    assert ImageFolder(root).leads_out("loop.jpg")
    with pytest.raises(UnreadableImageError):
        read_image(ImageFolder(root).path("loop.jpg"), expected_hw=(1, 1))

    split = write_world(tmp_path, coco_document(2))
    for rank, notes in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        say_links_are_followed.cache_clear()
        for _ in range(2):
            load_split(split, tmp_path)
        assert capsys.readouterr().err.count("note: DKDETR_ALLOW_SYMLINKS is set") == notes


def test_coco_folders_are_tried_in_turn(tmp_path):
    for name in ("train2017/a.jpg", "val2017/b.jpg", "c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder = ImageFolder(tmp_path, layout="coco")
    assert folder.path("val2017/a.jpg") == tmp_path / "train2017/a.jpg"
    assert folder.path("train2017/b.jpg") == tmp_path / "val2017/b.jpg"
    assert folder.path("val2017/c.jpg") == tmp_path / "c.jpg"
    assert folder.path("val2017/gone.jpg") == tmp_path / "val2017/gone.jpg"
    assert folder.path("c.jpg") == tmp_path / "c.jpg"
    with pytest.raises(DataError):
        folder.path("val2017/../../x.jpg")
