"""Which pictures a report shows, and which boxes on them: by rules that never look at a score's
size alone, and that the report prints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dkdetr.boxes import nms_keep, pairwise_iou
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.results import Results

DRAWING_RULE = (
    "Of each run as many boxes are drawn as the picture has annotated objects, highest scores "
    "first; of boxes that overlap by more than half only the highest-scored is drawn. A solid "
    "frame agrees with the annotation (same name, IoU at least 0.5), a dashed one does not. "
    "Scoring used all detections."
)


@dataclass(frozen=True)
class ChosenImages:
    """Image ids in the order of choice, and the rule in words."""

    image_ids: tuple[int, ...]
    rule: str


@dataclass(frozen=True)
class DrawnBox:
    """A box on a picture, in pixels; ground truth has no `score` and is right by definition."""

    box_xyxy: tuple[float, float, float, float]
    name: str
    is_novel: bool
    score: float | None
    is_right: bool


def choose_images(truth: GroundTruth, *, count: int, most_objects: int = 12) -> ChosenImages:
    """Returns up to `count` images, chosen from the annotations alone, never from detections.

    Each next image shows the most novel names that no earlier one shows; then the most novel
    objects; then it has the lowest id. Without novel categories the same with all names. Images
    with more than `most_objects` boxes, which nobody can read, are left out.
    """
    novel = {c.category_id for c in truth.categories if not c.is_base}
    kind = "novel" if novel else "different"
    wanted = novel or {c.category_id for c in truth.categories}
    image_ids, counts = np.unique(truth.image_ids, return_counts=True)
    legible = set(image_ids[counts <= most_objects].tolist())
    names_of: dict[int, list[int]] = {}
    pairs = zip(
        truth.image_ids.tolist(), truth.category_ids.tolist(), truth.is_crowd.tolist(), strict=True
    )
    for image_id, category_id, is_crowd in pairs:
        if image_id in legible and category_id in wanted and not is_crowd:
            names_of.setdefault(image_id, []).append(category_id)
    chosen: list[int] = []
    shown: set[int] = set()
    while names_of and len(chosen) < count:
        best = min(
            names_of,
            key=lambda image_id: (
                -len(set(names_of[image_id]) - shown),
                -len(names_of[image_id]),
                image_id,
            ),
        )
        shown |= set(names_of.pop(best))
        chosen.append(best)
    rule = (
        "Pictures are chosen from the annotations alone, without a look at any detection: of those "
        f"with at most {most_objects} objects, each next one has the most {kind} names not shown "
        f"before, then the most objects of {kind} names, then the lowest image id."
    )
    return ChosenImages(tuple(chosen), rule)


def annotated_boxes(truth: GroundTruth, image_id: int) -> list[DrawnBox]:
    """Returns an image's ground truth, crowds left out."""
    categories = {c.category_id: c for c in truth.categories}
    own = [index for index in truth.of_image(image_id) if not truth.is_crowd[index]]
    return [
        DrawnBox(
            box_xyxy=_corners(truth.boxes_xywh[index]),
            name=categories[int(truth.category_ids[index])].name,
            is_novel=not categories[int(truth.category_ids[index])].is_base,
            score=None,
            is_right=True,
        )
        for index in own
    ]


def detected_boxes(truth: GroundTruth, results: Results, image_id: int) -> list[DrawnBox]:
    """Returns the detections to draw on an image, by `DRAWING_RULE`, best first."""
    objects = annotated_boxes(truth, image_id)
    categories = {c.category_id: c for c in truth.categories}
    found = results.take(results.image_ids == image_id)
    found = found.take(np.isin(found.category_ids, list(categories)))
    found = found.take(np.argsort(-found.scores, kind="stable"))
    corners = torch.tensor([_corners(box) for box in found.boxes_xywh]).reshape(-1, 4)
    keep = nms_keep(corners, torch.from_numpy(found.scores), iou_threshold=0.5).numpy()
    found = found.take(np.flatnonzero(keep)[: len(objects)])
    boxes = [_corners(box) for box in found.boxes_xywh]
    names = [categories[category_id].name for category_id in found.category_ids.tolist()]
    right = _agreeing(boxes, names, objects)
    return [
        DrawnBox(
            box_xyxy=box,
            name=categories[category_id].name,
            is_novel=not categories[category_id].is_base,
            score=score,
            is_right=agrees,
        )
        for box, category_id, score, agrees in zip(
            boxes, found.category_ids.tolist(), found.scores.tolist(), right, strict=True
        )
    ]


def _agreeing(
    boxes: Sequence[tuple[float, ...]], names: Sequence[str], objects: Sequence[DrawnBox]
) -> list[bool]:
    """Returns which boxes, best first, find an object that no better one has found."""
    if not boxes or not objects:
        return [False] * len(boxes)
    overlaps = pairwise_iou(
        torch.tensor(boxes), torch.tensor([each.box_xyxy for each in objects])
    ).numpy()
    same = np.array([[name == each.name for each in objects] for name in names])
    overlaps = np.where(same, overlaps, 0.0)
    right = []
    for row in range(len(boxes)):
        best = int(np.argmax(overlaps[row]))
        right.append(bool(overlaps[row, best] >= 0.5))
        if right[-1]:
            overlaps[:, best] = 0.0
    return right


def _corners(box_xywh: np.ndarray) -> tuple[float, float, float, float]:
    x, y, width, height = box_xywh.tolist()
    return (x, y, x + width, y + height)
