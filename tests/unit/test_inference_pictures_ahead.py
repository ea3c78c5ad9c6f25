"""Files for `predict` are decoded ahead by threads: in order, a few, and never after the end."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dkdetr.errors import DataError, UsageError
from dkdetr.inference import picture_sources
from dkdetr.inference.picture_sources import open_pictures


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Twenty grey pictures, each one grey level lighter than the one before."""
    paths = [tmp_path / f"{number:02}.png" for number in range(20)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 3), (number,) * 3).save(path)
    return paths


def named(paths: list[Path]) -> dict[Path, str]:
    return {path: path.name for path in paths}


def test_later_files_are_decoded_while_an_earlier_one_is(files, monkeypatch: pytest.MonkeyPatch):
    """The first can end only when the second has been begun; order is kept all the same."""
    monkeypatch.setattr(picture_sources, "_DECODERS", 2)
    real, second_begun = picture_sources.rgb_pixels, threading.Event()

    def waiting(path: Path) -> np.ndarray:
        if path == files[0]:
            assert second_begun.wait(60)
        if path == files[1]:
            second_begun.set()
        return real(path)

    monkeypatch.setattr(picture_sources, "rgb_pixels", waiting)
    found = list(open_pictures(named(files)))
    assert [picture.name for picture in found] == [path.name for path in files]
    assert [int(picture.pixels[0, 0, 0]) for picture in found] == list(range(20))


def test_a_bad_file_is_told_at_its_place(files):
    files[3].write_bytes(b"no picture")
    opened = open_pictures(named(files))
    assert [next(opened).name for _ in range(3)] == ["00.png", "01.png", "02.png"]
    with pytest.raises(DataError, match=r"03\.png"):
        next(opened)


def test_bad_files_are_left_out_for_who_keeps_their_errors(files):
    files[3].write_bytes(b"no picture")
    files[7].write_bytes(files[7].read_bytes()[:-30])
    unreadable = list[DataError]()
    opened = list(open_pictures(named(files), unreadable=unreadable))
    assert [(each.name, each.files_done) for each in opened] == [
        (path.name, number + 1) for number, path in enumerate(files) if number not in (3, 7)
    ]
    assert ["03.png" in str(unreadable[0]), "07.png" in str(unreadable[1])] == [True, True]
    assert len(unreadable) == 2


def test_files_of_which_none_can_be_read_are_refused(files):
    for path in files[:2]:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"00\.png.*nor can any other of the 2 files"):
        list(open_pictures(named(files[:2]), unreadable=[]))
    with pytest.raises(DataError, match=r"none of JPEG, PNG, WEBP, BMP$"):
        list(open_pictures(named(files[:1]), unreadable=[]))


def test_a_video_is_left_out_from_its_fault_on(files, monkeypatch: pytest.MonkeyPatch):
    def frames(path: Path, name: str, every: int):
        yield picture_sources.NamedPicture("clip_000000.jpg", np.zeros((1, 1, 3), np.uint8))
        raise DataError("video clip.mp4, frame 1: cut")

    monkeypatch.setattr(picture_sources, "_frames", frames)
    unreadable = list[DataError]()
    found = open_pictures(named([files[0], Path("clip.mp4"), files[1]]), unreadable=unreadable)
    shown = [(picture.name, picture.files_done) for picture in found]
    assert shown == [("00.png", 1), ("clip_000000.jpg", 1), ("01.png", 3)]
    assert [str(error) for error in unreadable] == ["video clip.mp4, frame 1: cut"]


def test_a_video_that_nothing_reads_is_told_before_any_picture(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"'clip\.mp4' is a video: pip install"):
        next(open_pictures(named([*files, Path("clip.mp4")])))


def test_who_stops_early_leaves_no_thread_and_few_pictures(files, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(picture_sources, "_DECODERS", 2)
    monkeypatch.setattr(picture_sources, "_MOST_AHEAD", 4)
    real, decoded = picture_sources.rgb_pixels, list[str]()

    def counted(path: Path) -> np.ndarray:
        decoded.append(path.name)
        return real(path)

    monkeypatch.setattr(picture_sources, "rgb_pixels", counted)
    before = threading.active_count()
    opened = open_pictures(named(files))
    next(opened)
    next(opened)
    opened.close()
    assert threading.active_count() == before
    assert len(decoded) <= 5  # two given out, and of the four ahead of the second three more


def test_frames_of_a_video_keep_their_place_among_files(files, monkeypatch: pytest.MonkeyPatch):
    frames = iter([picture_sources.NamedPicture("clip_000000.jpg", np.zeros((1, 1, 3), np.uint8))])
    monkeypatch.setattr(picture_sources, "_frames", lambda path, name, every: frames)
    found = open_pictures(named([files[0], Path("clip.mp4"), files[1]]))
    assert [picture.name for picture in found] == ["00.png", "clip_000000.jpg", "01.png"]
