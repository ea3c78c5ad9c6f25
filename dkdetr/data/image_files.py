"""The one way in which an image file becomes pixels, and the one way to find it.

EXIF orientation is ignored wherever a picture has annotations: the boxes of COCO and LVIS are drawn
on the pixels as they are stored, and rotating only some readers' pictures is how boxes and pixels
part. `decode_upright` is for pictures that a person brings, which have none.
"""

import errno
import functools
import io
import os
import struct
import sys
import zlib
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path, PureWindowsPath
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile

from dkdetr.data.upright import AS_STORED, orientation_of, turned_upright
from dkdetr.errors import DataError
from dkdetr.switches import is_switched_on

MAX_IMAGE_PIXELS = 89_478_485
"""Larger pictures are refused: a few kilobytes of PNG can unpack to gigabytes."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
"""Kinds of pixels, as Pillow calls them, with 8 bits a channel or fewer."""
ALLOW_LINKS = "DKDETR_ALLOW_SYMLINKS"
"""The variable that lets links leave an image folder: DVC and git-annex link every picture."""
_LONGEST_NAME = 255
_COCO_FOLDERS = ("train2017", "val2017")
FolderLayout = Literal["plain", "coco", "patches"]
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where the process takes warnings for errors
)
"""What Pillow raises of bytes that are no sound picture."""


class UnreadableImageError(DataError):
    """One image cannot be used: missing, truncated, of another size, too large, of a wrong kind."""


def check_file_name(file_name: str) -> None:
    """Raises DataError for a name that no file under an image root can have.

    That is: empty, absolute, a URL, with `..`, a backslash, a drive or a NUL, or too long a part.
    """
    parts = file_name.split("/")
    suspicious = (
        not file_name
        or file_name.startswith("/")
        or "\0" in file_name
        or "\\" in file_name
        or "://" in file_name
        or ".." in parts
        or max(len(part.encode("utf-8", "surrogatepass")) for part in parts) > _LONGEST_NAME
        or PureWindowsPath(file_name).drive != ""
    )
    if suspicious:
        shown = repr(file_name if len(file_name) < 200 else file_name[:200] + "...")
        raise DataError(f"file_name {shown} is no path inside an image folder: refused")


def links_allowed() -> bool:
    """Returns whether links out of image folders are followed: the user's word, by `ALLOW_LINKS`.

    A variable and no option, so that loader processes, ranks and workers elsewhere have it alike.

    Raises:
        UsageError: the variable says neither yes nor no.
    """
    return is_switched_on(ALLOW_LINKS)


@functools.cache
def say_links_are_followed() -> None:
    """Says so once a command: no child process does, nor any rank but the first."""
    if parent_process() is None and os.environ.get("RANK", "0") == "0":
        print(
            f"note: {ALLOW_LINKS} is set: links that leave an image folder are followed, wherever "
            "they lead; dkdetr data check SPLIT lists them",
            file=sys.stderr,
        )


def safe_join(root: Path, file_name: str) -> Path:
    """Returns `root / file_name` if that lies inside `root`, links followed, or links may leave it.

    Raises:
        DataError: see `check_file_name`, or the path goes through a link that leaves the root.
    """
    check_file_name(file_name)
    if not links_allowed() and _leads_out(root, file_name):
        raise DataError(
            f"file_name {file_name!r} leads out of the image root {root}: refused, for it may show "
            "any file of this machine; where such links are meant (DVC, git-annex), set "
            f"{ALLOW_LINKS}=1 for every process"
        )
    return root / file_name


def _leads_out(root: Path, file_name: str) -> bool:
    try:
        place, trusted = (root / file_name).resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise DataError(f"file_name {file_name!r} under {root}: {error}") from None
    if _goes_round(place):  # from Python 3.13 on that is no error of `resolve`
        raise DataError(f"file_name {file_name!r} under {root}: a loop of links")
    return not place.is_relative_to(trusted)


def _goes_round(place: Path) -> bool:
    """Returns True for a loop of links, at the end of a path or on its way."""
    try:
        place.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


@dataclass(frozen=True)
class ImageFolder:
    """Where a split's images lie.

    `coco` (LVIS): `train2017/x.jpg` and `val2017/x.jpg` are looked for in either of the two folders
    and then as `x.jpg` itself: most of LVIS's val images lie in train2017. The two folders may be
    links. `patches` (Objects365): `images/v1/patch3/x.jpg` is looked for as that, as
    `patch3/x.jpg`, which is how its archives unpack, and as `x.jpg`.
    """

    root: Path
    layout: FolderLayout = "plain"

    def path(self, file_name: str) -> Path:
        """Returns the file's path; of several places the first that has it, else the first.

        Raises:
            DataError: the name leaves the root (see `safe_join`).
        """
        return safe_join(*self._place(file_name))

    def leads_out(self, file_name: str) -> bool:
        """Returns whether the file is reached through a link that leaves the root, or a loop."""
        try:
            return _leads_out(*self._place(file_name))
        except DataError:
            return True

    def _place(self, file_name: str) -> tuple[Path, str]:
        check_file_name(file_name)
        places = self.places(file_name)
        if len(places) > 1:
            places = [each for each in places if (each[0] / each[1]).is_file()] or places
        return places[0]

    def places(self, file_name: str) -> list[tuple[Path, str]]:
        """Returns where the file may lie, best first, as (trusted folder, name below it)."""
        folder, _, name = file_name.rpartition("/")
        if self.layout == "patches" and folder:
            patch = folder.rpartition("/")[2]
            below = dict.fromkeys((file_name, f"{patch}/{name}", name))
            return [(self.root, each) for each in below]
        if self.layout != "coco" or folder not in _COCO_FOLDERS:
            return [(self.root, file_name)]
        other = next(each for each in _COCO_FOLDERS if each != folder)
        return [(self.root / folder, name), (self.root / other, name), (self.root, name)]


def read_image(path: Path, *, expected_hw: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the RGB pixels of a data set's file.

    Raises:
        UnreadableImageError: see `decode_image`; or there is no such file. It says how to find all
            such pictures, for training and scoring end at the first.
    """
    try:
        return decode_image(path.read_bytes(), path, expected_hw=expected_hw)
    except UnreadableImageError as error:
        why = str(error)
    except OSError as error:
        why = f"image {path}: {error.strerror or error}"
    raise UnreadableImageError(f"{why}; dkdetr data check SPLIT --decode names all such pictures")


def decode_upright(data: bytes, path: Path) -> tuple[UInt8[np.ndarray, "height width 3"], int]:
    """Returns an unannotated image's pixels as a viewer shows them, and its EXIF orientation.

    Of any size; else as `decode_image`. The orientation, 1 to 8, says how the file holds them.
    """
    stored, orientation = _decode(data, path, expected_hw=None)
    return turned_upright(stored, orientation), orientation


def decode_image(
    data: bytes, path: Path, *, expected_hw: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the RGB pixels of an encoded image, whose name is only for messages.

    Raises:
        UnreadableImageError: no JPEG, PNG, WebP or BMP, truncated, larger than MAX_IMAGE_PIXELS,
            more than 8 bits a channel, or not of the size that its annotation says.
    """
    return _decode(data, path, expected_hw=expected_hw)[0]


def _decode(
    data: bytes, path: Path, *, expected_hw: tuple[int, int] | None
) -> tuple[np.ndarray, int]:
    """Returns the stored pixels, and the orientation, read only where no size is expected."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            "a library set PIL.ImageFile.LOAD_TRUNCATED_IMAGES: truncated images would pass as "
            "whole ones; set it back to False"
        )
    try:
        # Pillow only warns of a bomb, and the header's check refuses it. The warning gets no filter
        # of ours: filters are the process's own, and pictures are read in threads.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, path, expected_hw)
            image.load()
            orientation = orientation_of(image) if expected_hw is None else AS_STORED
            pixels = np.array(_to_rgb(image))
    except UnreadableImageError:
        raise
    except Image.UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise UnreadableImageError(f"image {path}: empty, damaged or none of {kinds}") from None
    except DECODER_ERRORS as error:
        raise UnreadableImageError(f"image {path}: {error}") from None
    return pixels, orientation


def header_refusal(image: Image.Image) -> str | None:
    """Returns why a whole picture is not read, of whatever size it should be; None: it is."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        return f"{width} x {height} pixels, more than {MAX_IMAGE_PIXELS:,}"
    if image.mode not in MODES:
        return f"pixels of kind '{image.mode}', more than 8 bits a channel"
    return None


def _check_header(image: Image.Image, path: Path, expected_hw: tuple[int, int] | None) -> None:
    if (refused := header_refusal(image)) is not None:
        raise UnreadableImageError(f"image {path}: {refused}")
    width, height = image.size
    if expected_hw is not None and (height, width) != expected_hw:
        raise UnreadableImageError(
            f"image {path} is {width} x {height} pixels, its annotation says "
            f"{expected_hw[1]} x {expected_hw[0]}: boxes would lie elsewhere"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"P", "PA"}:  # a palette may hold transparency, which RGB alone would lose
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
