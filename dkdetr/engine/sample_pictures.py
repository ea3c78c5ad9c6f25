"""What training sees, every so often: augmented views with objects, detections and KD regions."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from dkdetr.boxes import clip_xyxy, cxcywh_to_xyxy, nms_keep
from dkdetr.data.device_views import on_device
from dkdetr.data.transforms import PIXEL_MEAN, PIXEL_STD
from dkdetr.evaluation.postprocess import postprocess
from dkdetr.structures import LoadedBatch
from dkdetr.student.detector import DKDETR

_OBJECT, _DETECTION, _REGION = "#00c040", "#ff3030", "#3080ff"
_SHOWN_IMAGES = 4
_LEAST_DETECTIONS = 3


def draw_samples(
    student: DKDETR,
    loaded: LoadedBatch,
    text_embeddings: Float[Tensor, "num_classes text_dim"],
    names: tuple[str, ...],
    folder: Path,
    iteration: int,
) -> list[Path]:
    """Returns the pictures written of a batch's first images.

    Green: the objects to learn. Red: the best detections of the student as it is, as many as
    there are objects and at least three, overlaps of more than half left out. Blue: the regions
    chosen for distillation. The student is left as it was; no random number is drawn.
    """
    was_training = student.training
    batch = on_device(loaded, torch.device("cpu"))  # where they are drawn on
    images = batch.images.to(text_embeddings.device)
    with torch.no_grad():
        output = student.eval()(images, text_embeddings)
    student.train(was_training)
    found = postprocess(
        output.logits[-1],
        output.detection.boxes_cxcywh[-1],
        images.image_sizes_hw,
        max_detections=100,
    )
    paths = []
    for index, image_id in enumerate(batch.images.image_ids[:_SHOWN_IMAGES]):
        height, width = batch.images.image_sizes_hw[index].tolist()
        picture = Image.fromarray(_pixels(batch.images.pixels[index, :, :height, :width]))
        draw = ImageDraw.Draw(picture)
        if batch.regions is not None:
            valid = batch.regions.valid[index]
            for box in _corners(batch.regions.boxes_cxcywh[index][valid], height, width):
                draw.rectangle(box, outline=_REGION)
        target = batch.targets[index]
        for box, label in zip(
            _corners(target.boxes_cxcywh, height, width), target.labels.tolist(), strict=True
        ):
            draw.rectangle(box, outline=_OBJECT, width=2)
            draw.text((box[0] + 3, box[1] + 1), names[label], fill=_OBJECT)
        detections = found[index]
        boxes = detections.boxes_xyxy.cpu()
        keep = nms_keep(boxes, detections.scores.cpu(), iou_threshold=0.5).nonzero().flatten()
        for place in keep[: max(_LEAST_DETECTIONS, len(target.labels))].tolist():
            box = boxes[place].tolist()
            name = names[int(detections.labels[place])]
            draw.rectangle(box, outline=_DETECTION)
            draw.text(
                (box[0] + 3, max(box[3] - 12, 0)),
                f"{name} {detections.scores[place]:.2f}",
                fill=_DETECTION,
            )
        path = folder / f"step_{iteration:08d}_image_{image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        paths.append(path)
    return paths


def _pixels(view: Float[Tensor, "3 height width"]) -> UInt8[np.ndarray, "height width 3"]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (view.cpu() * std + mean).clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _corners(
    boxes_cxcywh: Float[Tensor, "num_boxes 4"], height: int, width: int
) -> list[list[float]]:
    corners = cxcywh_to_xyxy(boxes_cxcywh) * torch.tensor([width, height, width, height])
    return clip_xyxy(corners, height=height, width=width).tolist()
