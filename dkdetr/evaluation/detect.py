"""The inference loop: pictures in, detections out; it knows nothing of scoring."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from dkdetr.config import Precision
from dkdetr.data.device_views import render_images
from dkdetr.evaluation.mask_postprocess import mask_rles
from dkdetr.evaluation.postprocess import Detections, choose_best, unpack
from dkdetr.precision import computing
from dkdetr.structures import DecodedImages, ImageBatch, InstanceMasks, StudentOutput

Item = TypeVar("Item")


def detect(
    student: nn.Module,
    batches: Iterable[ImageBatch | DecodedImages],
    text_embeddings: Float[Tensor, "num_classes embed_dim"],
    *,
    device: torch.device,
    max_detections: int,
    precision: Precision = "fp32",
    with_masks: bool = False,
    keep: Callable[[Detections], Detections] | None = None,
    names_multiple: int = 1,
) -> Iterator[tuple[int, Detections]]:
    """Yields (image id, detections) of every image of `batches`, in their order, on the CPU.

    `batches` are on the CPU; of each one copy goes to the device, where views that are still to be
    made are made, and one comes back. A GPU is given the next batch before the last one's results
    are taken from it: then two batches are held, and the CPU decodes and unpacks while the GPU
    computes. What goes wrong with a batch is raised after the results of those before it.

    The student is in evaluation mode while this runs and is then put back as it was. Labels of
    detections index the rows of `text_embeddings`. Masks are drawn only where they are asked for,
    and of what `keep` leaves of an image's detections, if it is given; then batches go one by one.

    `names_multiple` is for a compiled student, which is compiled for each number of rows: rows of
    zeros fill up to a multiple of it, and their logits are cut off.
    """
    was_training = student.training
    student.eval()
    num_names = len(text_embeddings)
    text = text_embeddings.to(device, non_blocking=True)
    text = functional.pad(text, (0, 0, 0, -num_names % names_multiple))

    def begin(batch: ImageBatch | DecodedImages) -> _Begun:
        images = batch.to(device)
        if isinstance(images, DecodedImages):
            images = render_images(images)
        # Only here: a context held across `yield` would leak into whoever takes the images.
        with torch.inference_mode(), computing(precision, device):
            output: StudentOutput = student(images, text)
        with torch.inference_mode():
            best = choose_best(
                output.logits[-1, :, :, :num_names],
                output.detection.boxes_cxcywh[-1],
                images.original_sizes_hw,
                max_detections=max_detections,
            )
            # Into page-locked memory; elsewhere nobody could say when it is there.
            best = best.to("cpu", non_blocking=works_beside(device))
        return _Begun(
            batch.image_ids,
            batch.image_sizes_hw,
            batch.original_sizes_hw,
            best,
            arrived=_passed(device),
            masks=output.masks if with_masks else None,
        )

    try:
        begun = map(begin, batches)
        # Masks are drawn on the device, of what the next replay of a CUDA graph overwrites.
        if works_beside(device) and not with_masks:
            begun = one_ahead(begun)
        for each in begun:
            if each.arrived is not None:
                each.arrived.synchronize()
            found = unpack(each.best, num_names)
            for place, image_id in enumerate(each.image_ids):
                detections = found[place] if keep is None else keep(found[place])
                if with_masks:
                    with torch.inference_mode():
                        detections = _with_masks(detections, each, place)
                yield image_id, detections
    finally:
        student.train(was_training)


@dataclass(frozen=True)
class _Begun:
    """What was found in a batch, and when it is on the CPU; the pictures are not held.

    Sizes are those of `ImageBatch`, on the CPU; `best` is of `choose_best`.
    """

    image_ids: tuple[int, ...]
    image_sizes_hw: Int[Tensor, "batch 2"]
    original_sizes_hw: Int[Tensor, "batch 2"]
    best: Float[Tensor, "batch numbers"]
    arrived: torch.cuda.Event | None
    masks: InstanceMasks | None


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the items, each when the one after it has been made; an error keeps its place."""
    item = next(items, None)
    while item is not None:
        failure: Exception | None = None
        following = None
        try:
            following = next(items, None)
        except Exception as error:  # noqa: BLE001  raised below, after what came before it
            failure = error
        yield item
        if failure is not None:
            raise failure
        item = following


def works_beside(device: torch.device) -> bool:
    """Returns whether the device computes while the CPU does something else."""
    return device.type == "cuda"


def _passed(device: torch.device) -> torch.cuda.Event | None:
    """Returns what passes when the device has done all that it was told so far."""
    if not works_beside(device):
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _with_masks(detections: Detections, begun: _Begun, place: int) -> Detections:
    assert begun.masks is not None, "a student without a mask head draws no masks"
    height, width = begun.image_sizes_hw[place].tolist()
    original_height, original_width = begun.original_sizes_hw[place].tolist()
    drawn = mask_rles(
        begun.masks,
        place,
        detections.queries.to(begun.masks.padding_mask.device),
        image_hw=(height, width),
        original_hw=(original_height, original_width),
    )
    return replace(detections, masks=drawn)
