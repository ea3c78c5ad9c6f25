"""The inference loop: pictures in, detections out; it knows nothing of scoring."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dkdetr.config import Precision
from dkdetr.evaluation.mask_postprocess import mask_rles
from dkdetr.evaluation.postprocess import Detections, postprocess
from dkdetr.precision import computing
from dkdetr.structures import ImageBatch, StudentOutput


def detect(
    student: nn.Module,
    batches: Iterable[ImageBatch],
    text_embeddings: Float[Tensor, "num_classes embed_dim"],
    *,
    device: torch.device,
    max_detections: int,
    precision: Precision = "fp32",
    with_masks: bool = False,
    keep: Callable[[Detections], Detections] | None = None,
) -> Iterator[tuple[int, Detections]]:
    """Yields (image id, detections) of every image of `batches`, in their order, on the CPU.

    `batches` are on the CPU; of each one copy goes to the device and one comes back.

    The student is in evaluation mode while this runs and is then put back as it was. Labels of
    detections index the rows of `text_embeddings`. Masks are drawn only where they are asked for,
    and of what `keep` leaves of an image's detections, if it is given.
    """
    was_training = student.training
    student.eval()
    text_embeddings = text_embeddings.to(device)
    try:
        for batch in batches:
            images = batch.to(device)
            # Only here: a context held across `yield` would leak into whoever takes the images.
            with torch.inference_mode(), computing(precision, device):
                output: StudentOutput = student(images, text_embeddings)
            with torch.inference_mode():
                found = postprocess(
                    output.logits[-1],
                    output.detection.boxes_cxcywh[-1],
                    images.original_sizes_hw,
                    max_detections=max_detections,
                )
            for place, image_id in enumerate(batch.image_ids):
                detections = found[place]
                if keep is not None:
                    detections = keep(detections)
                if with_masks:
                    with torch.inference_mode():
                        detections = _with_masks(detections, output, batch, place)
                yield image_id, detections
    finally:
        student.train(was_training)


def _with_masks(
    detections: Detections, output: StudentOutput, images: ImageBatch, place: int
) -> Detections:
    assert output.masks is not None, "a student without a mask head draws no masks"
    height, width = images.image_sizes_hw[place].tolist()
    original_height, original_width = images.original_sizes_hw[place].tolist()
    drawn = mask_rles(
        output.masks,
        place,
        detections.queries.to(output.logits.device),
        image_hw=(height, width),
        original_hw=(original_height, original_width),
    )
    return replace(detections, masks=drawn)
