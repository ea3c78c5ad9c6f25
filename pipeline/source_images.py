"""One look at every image file before anything is made: what the cache's inputs are, byte by byte.

A flipped bit in a JPEG mostly decodes to other pixels without an error, so only the bytes' hash
can say that a resumed cache sees the same pictures.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import xxhash

from dkdetr.data.annotations import ImageInfo
from dkdetr.data.image_files import UnreadableImageError, decode_image
from dkdetr.data.splits import Split
from dkdetr.errors import DataError
from dkdetr.progress import progress

_THREADS = 8


@dataclass(frozen=True)
class ImageCheck:
    """The files of a split: one hash of all their hashes, and those that cannot be decoded.

    `unreadable` is empty unless decoding was asked for.
    """

    content_xxh3: str
    total_bytes: int
    unreadable: Mapping[int, str]

    def parts(self) -> dict[str, object]:
        """Returns what the cache's fingerprint records of the files."""
        return {
            "content_xxh3_128": self.content_xxh3,
            "total_bytes": self.total_bytes,
            "exif": "ignored",
        }


def check_images(split: Split, *, decode: bool) -> ImageCheck:
    """Returns the hash of all files, in the order of the split; `decode` tries each one too.

    Raises:
        DataError: image files are missing.
    """
    split.require_images()

    def check(image: ImageInfo) -> tuple[bytes, int, str]:
        path = split.image_path(image)
        try:
            data = path.read_bytes()
        except OSError as error:
            return b"", 0, f"image {image.file_name}: {error.strerror or error}"
        problem = ""
        if decode:
            try:
                decode_image(data, path, expected_hw=(image.height, image.width))
            except UnreadableImageError as error:
                problem = str(error).replace(str(path), image.file_name)
        return xxhash.xxh3_128_digest(data), len(data), problem

    digest = xxhash.xxh3_128()
    total = 0
    unreadable: dict[int, str] = {}
    title = "checking images" if decode else "hashing images"
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        progress(title, len(split.images), quiet=len(split.images) < 500) as advance,
    ):
        checked = pool.map(check, split.images, chunksize=16)
        for done, (image, (hashed, size, problem)) in enumerate(
            zip(split.images, checked, strict=True), start=1
        ):
            digest.update(image.image_id.to_bytes(8, "little") + hashed)
            total += size
            if problem:
                unreadable[image.image_id] = problem
            advance(done, "")
    return ImageCheck(digest.hexdigest(), total, unreadable)


def require_few(
    bad: Mapping[int, str], num_images: int, max_bad: float, *, fetched_again: str
) -> None:
    """Returns if no more images are set aside than a share allows, one in any case.

    Args:
        bad: image id -> why it cannot be read.
        num_images: of the split.
        max_bad: `CacheRequest.max_bad`; with 0 not one may be bad.
        fetched_again: what to do with sound files in their place, for the message.

    Raises:
        DataError: more are; the first 20 are named.
    """
    limit = max(1, ceil(max_bad * num_images)) if max_bad else 0
    if len(bad) > limit:
        raise DataError(
            f"{len(bad)} of {num_images:,} images cannot be read, more than --max-bad "
            f"{max_bad:g} allows ({limit}): {'; '.join(list(bad.values())[:20])}; next: a "
            f"higher --max-bad goes on without them, or fetch them again and {fetched_again}"
        )


def without_images(split: Split, image_ids: Mapping[int, str]) -> Split:
    """Returns the split without some images."""
    if not image_ids:
        return split
    keep = np.array([image.image_id not in image_ids for image in split.images])
    return replace(
        split,
        images=tuple(image for image, kept in zip(split.images, keep, strict=True) if kept),
        box_table=split.box_table.keep_images(keep),
    )
