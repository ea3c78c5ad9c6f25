"""What pictures' headers say beside their annotations; no pixel is decoded.

A picture of another size than its annotation says is used by nobody here. Most often an annotator
saw it turned, as EXIF orientation tells a viewer to, while all readers take it as it is stored.
"""

from collections.abc import Sequence

from PIL import Image

from dkdetr.data.annotations import ImageInfo
from dkdetr.data.image_files import DECODER_ERRORS, FORMATS
from dkdetr.data.problems import Problems
from dkdetr.data.splits import Split
from dkdetr.data.upright import orientation_of

_MOST = 1000
_QUARTER_TURNS = (5, 6, 7, 8)
_FAULTS = {
    "turned": "annotated as a viewer turns it (EXIF orientation), but pictures are read as they "
    "are stored: turn the pixels for good, or annotate the stored pixels",
    "size": "of another size than its annotation says: give the annotated file, or annotate this "
    "one",
    "header": f"none of {', '.join(FORMATS)}, or damaged",
}


def check_headers(split: Split, images: Sequence[ImageInfo], problems: Problems) -> None:
    """Notes pictures whose header contradicts their annotation, or cannot be read.

    Args:
        split: knows where the files lie.
        images: whose files are there, inside the folder; at most 1,000 are looked at, evenly
            spread.
        problems: takes up what is found, and says of how many.
    """
    count = min(len(images), _MOST)
    found: dict[str, list[str]] = {fault: [] for fault in _FAULTS}
    for index in range(count):
        image = images[index * len(images) // count]
        fault = _fault(split, image)
        if fault is not None:
            found[fault[0]].append(f"{image.file_name} (id {image.image_id}{fault[1]})")
    looked_at = f" ({count:,} of {len(images):,} looked at)" if count < len(images) else ""
    for fault, names in found.items():
        problems.add("image files", f"{_FAULTS[fault]}{looked_at}", names)


def _fault(split: Split, image: ImageInfo) -> tuple[str, str] | None:
    """Returns the kind of fault, and what of it is this picture's own; None: there is none."""
    path, wanted = split.image_path(image), (image.width, image.height)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            stored = picture.size
            if stored == wanted:
                return None
            turned = stored[::-1] == wanted and orientation_of(picture) in _QUARTER_TURNS
    except DECODER_ERRORS:
        return "header", ""
    sizes = f": {stored[0]} x {stored[1]}, annotated {wanted[0]} x {wanted[1]}"
    return ("turned" if turned else "size"), sizes
