"""What is wrong with pictures beside their annotations: by their headers, or by all their pixels.

What training refuses whatever the annotation says, too many pixels or bits, the header tells, too.
A picture of another size than its annotation says is used by nobody here. Most often an annotator
saw it turned, as EXIF orientation tells a viewer to, while all readers take it as it is stored.
Of a truncated one the header is whole, and only decoding it to its end tells.
"""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from dkdetr.cores import cores_at_hand
from dkdetr.data.annotations import ImageInfo
from dkdetr.data.image_files import (
    DECODER_ERRORS,
    FORMATS,
    MAX_IMAGE_PIXELS,
    UnreadableImageError,
    decode_image,
    header_refusal,
)
from dkdetr.data.problems import Problems
from dkdetr.data.splits import Split
from dkdetr.data.upright import orientation_of
from dkdetr.progress import progress
from dkdetr.read_ahead import done_ahead

_MOST = 1000
_MOST_THREADS = 16
_QUARTER_TURNS = (5, 6, 7, 8)
_FAULTS = {
    "turned": "annotated as a viewer turns it (EXIF orientation), but pictures are read as they "
    "are stored: turn the pixels for good, or annotate the stored pixels",
    "size": "of another size than its annotation says: give the annotated file, or annotate this "
    "one",
    "unread": "more pixels, or more bits a channel, than are read: convert it",
    "header": f"none of {', '.join(FORMATS)}, or damaged",
    "pixels": "cannot be decoded: fetch it again, or leave it out of the annotations",
    "file": "the system does not let it be read: mend its rights, its link or its disk",
}
_Fault = tuple[str, str]
"""The kind of fault, and what of it is this picture's own."""


def check_pictures(
    split: Split, images: Sequence[ImageInfo], problems: Problems, *, decode: bool
) -> str:
    """Notes pictures that nobody can use; returns what was looked at, in words.

    Args:
        split: knows where the files lie.
        images: whose files are there, inside the folder.
        problems: takes up what is found.
        decode: decodes every one, as training and scoring will, in threads; otherwise the headers
            of at most 1,000 are read, evenly spread.
    """
    chosen = images if decode else _spread(images)
    found: dict[str, list[str]] = {fault: [] for fault in _FAULTS}

    def fault_of(image: ImageInfo) -> _Fault | None:
        return _header_fault(split, image) or (_pixel_fault(split, image) if decode else None)

    threads = min(_MOST_THREADS, max(2, cores_at_hand()))
    with (
        # Of a bomb Pillow's raw warning would be told beside the fault. Filters are the process's
        # own: set once, around all threads.
        warnings.catch_warnings(),
        ThreadPoolExecutor(threads) as pool,
        progress("pictures", len(chosen), quiet=not decode) as advance,
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        looked = done_ahead(pool, fault_of, chosen, 4 * threads)
        for done, (image, fault) in enumerate(looked, start=1):
            if fault is not None:
                found[fault[0]].append(f"{image.file_name} (id {image.image_id}{fault[1]})")
            advance(done, "")
    some = len(chosen) < len(images)
    looked_at = f" ({len(chosen):,} of {len(images):,} looked at)" if some else ""
    for fault, names in found.items():
        problems.add("image files", f"{_FAULTS[fault]}{looked_at}", names)
    if decode:
        return f"{len(images):,} decoded"
    return f"headers of {len(chosen):,} of {len(images):,} read; --decode decodes every one"


def _spread(images: Sequence[ImageInfo]) -> list[ImageInfo]:
    count = min(len(images), _MOST)
    return [images[index * len(images) // count] for index in range(count)]


def _header_fault(split: Split, image: ImageInfo) -> _Fault | None:
    path, wanted = split.image_path(image), (image.width, image.height)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if (refused := header_refusal(picture)) is not None:
                return "unread", f": {refused}"
            stored = picture.size
            if stored == wanted:
                return None
            turned = stored[::-1] == wanted and orientation_of(picture) in _QUARTER_TURNS
    except Image.DecompressionBombError:  # twice as many: Pillow opens no such picture
        return "unread", f": more than {MAX_IMAGE_PIXELS:,} pixels"
    except DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.strerror:  # the system's word, not the decoder's
            return "file", f": {error.strerror}"
        return "header", ""
    sizes = f": {stored[0]} x {stored[1]}, annotated {wanted[0]} x {wanted[1]}"
    return ("turned" if turned else "size"), sizes


def _pixel_fault(split: Split, image: ImageInfo) -> _Fault | None:
    path = split.image_path(image)
    try:
        decode_image(path.read_bytes(), path, expected_hw=(image.height, image.width))
    except UnreadableImageError as error:
        return "pixels", str(error).removeprefix(f"image {path}")
    except OSError as error:
        return "file", f": {error.strerror or error}"
    return None
