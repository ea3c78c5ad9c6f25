"""A shard's pictures, read ahead in threads while the teacher is busy with earlier ones."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch

from dkdetr.cores import cores_at_hand
from dkdetr.data.annotations import ImageInfo
from dkdetr.data.image_files import UnreadableImageError, decode_image
from dkdetr.data.splits import Split
from dkdetr.read_ahead import done_ahead
from pipeline.decoding import Decoder, EncodedImage, Pixels, decode_on_device, suits_a_device
from pipeline.proposals import SourceImage

READ_THREADS = max(2, min(8, cores_at_hand() // 2))
"""Decoders of a worker; Pillow lets the interpreter go while it works."""

_Read = Pixels | EncodedImage | str
Chunk = list[tuple[ImageInfo, SourceImage]]


def readable_images(
    split: Split,
    images: Sequence[ImageInfo],
    quarantined: dict[int, str],
    *,
    chunk_size: int,
    decoder: Decoder,
    device: torch.device,
) -> Iterator[Chunk]:
    """Yields the images that can be read, in order and by `chunk_size`; notes the others.

    Two chunks are read ahead, or two pictures a thread; where a device decodes, one chunk ahead as
    well, by a thread. Which images share a chunk depends on the files alone.

    Args:
        split: knows where they lie.
        images: in the plan's order.
        quarantined: is given image id -> why it cannot be used; no path of this machine in it.
            Whole when the last chunk was taken.
        chunk_size: images at once.
        decoder: see pipeline.decoding.
        device: decodes, if the decoder is torchvision's.
    """

    def read(image: ImageInfo) -> _Read:
        try:
            return read_or_leave(split, image, decoder)
        except UnreadableImageError as error:
            return _without_path(error, split, image)
        except OSError as error:
            return f"image {image.file_name}: {error.strerror or error}"

    def decode(good: Iterator[tuple[ImageInfo, Pixels | EncodedImage]]) -> Chunk | None:
        chunk = list(islice(good, chunk_size))
        if not chunk:
            return None
        decoded = decode_on_device([each for _, each in chunk], device)
        ready: Chunk = []
        for (image, _), pixels in zip(chunk, decoded, strict=True):
            if isinstance(pixels, UnreadableImageError):
                quarantined[image.image_id] = _without_path(pixels, split, image)
            else:
                ready.append((image, SourceImage(image.image_id, pixels)))
        return ready

    with ThreadPoolExecutor(READ_THREADS) as pool, ThreadPoolExecutor(1) as decoder_thread:
        good = _good(done_ahead(pool, read, images, 2 * max(chunk_size, READ_THREADS)), quarantined)
        following = decoder_thread.submit(decode, good)
        while (ready := following.result()) is not None:
            following = decoder_thread.submit(decode, good)
            if ready:
                yield ready


def read_or_leave(split: Split, image: ImageInfo, decoder: Decoder) -> Pixels | EncodedImage:
    """Returns an image's pixels, or the bytes that are left for a device to decode.

    Raises:
        UnreadableImageError: see `decode_image`.
        OSError: the file cannot be read.
    """
    path, size = split.image_path(image), (image.height, image.width)
    data = path.read_bytes()
    if decoder == "torchvision" and suits_a_device(data, size):
        return EncodedImage(data, path, size)
    return decode_image(data, path, expected_hw=size)


def _good(
    results: Iterator[tuple[ImageInfo, _Read]], quarantined: dict[int, str]
) -> Iterator[tuple[ImageInfo, Pixels | EncodedImage]]:
    for image, result in results:
        if isinstance(result, str):
            quarantined[image.image_id] = result
        else:
            yield image, result


def _without_path(error: UnreadableImageError, split: Split, image: ImageInfo) -> str:
    """Returns why, without where this machine keeps its pictures: the cache must not depend on."""
    return str(error).replace(str(split.image_path(image)), image.file_name)
