"""How many objects the cached boxes find: a report, read by nobody who trains or selects."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from cache.store import CacheReader
from dkdetr.boxes import pairwise_iou
from dkdetr.data.splits import Split

BUDGETS = (20, 100, 300)
_IOU = 0.5


@dataclass(frozen=True)
class Recall:
    """The share of a group's objects that one of the first `budget` boxes overlaps by half.

    `shares` maps a budget to a share in 0..1; it is empty where the annotations have no object
    of the group.
    """

    group: str
    num_objects: int
    shares: dict[int, float]

    def line(self) -> str:
        """Returns the recall as a person reads it."""
        shares = ", ".join(f"{share:.1%} at {n}" for n, share in self.shares.items())
        return f"{self.group} objects ({self.num_objects:,}): {shares}"

    def as_json(self) -> dict[str, float]:
        """Returns the number of objects, and each share by its budget, as plain data."""
        shares = {str(budget): share for budget, share in self.shares.items()}
        return {"num_objects": self.num_objects, **shares}


def proposal_recall(
    split: Split,
    image_ids: Iterable[int],
    boxes_of: Callable[[int], Float[np.ndarray, "num_boxes 4"]],
    *,
    budgets: tuple[int, ...] = BUDGETS,
) -> tuple[Recall, Recall]:
    """Returns the recall of base and of novel objects at IoU 0.5.

    Crowds do not count. Novel boxes are looked at here and nowhere else in stage 1; training
    splits of LVIS and OV-COCO keep theirs in the annotation file, generated ones may have none.

    Args:
        split: whose annotations.
        image_ids: which images.
        boxes_of: an image's boxes, best first, pixels of the file.
        budgets: numbers of boxes an image.
    """
    objects = {"base": 0, "novel": 0}
    found = {group: dict.fromkeys(budgets, 0) for group in objects}
    base_ids = sorted(split.base_category_ids)
    for image_id in image_ids:
        truth = split.all_boxes(image_id)
        kept = ~truth.is_crowd
        if not kept.any():
            continue
        is_base = np.isin(truth.category_ids[kept], base_ids)
        first_hit = _first_hit(truth.boxes_xyxy[kept], boxes_of(image_id))
        for group, members in (("base", is_base), ("novel", ~is_base)):
            objects[group] += int(members.sum())
            for budget in budgets:
                found[group][budget] += int((first_hit[members] < budget).sum())
    base, novel = (
        Recall(
            group,
            objects[group],
            {budget: found[group][budget] / objects[group] for budget in budgets}
            if objects[group]
            else {},
        )
        for group in objects
    )
    return base, novel


def cache_recall(
    reader: CacheReader, split: Split, *, max_images: int | None = None
) -> tuple[Recall, Recall]:
    """Returns the recall of a cache's boxes; of `max_images` images spread over it, if given."""
    ids = [int(number) for number in reader.image_ids if int(number) not in reader.quarantined]
    if max_images is not None and len(ids) > max_images:
        ids = [ids[place] for place in np.linspace(0, len(ids) - 1, max_images).astype(int)]
    budgets = tuple(budget for budget in BUDGETS if budget < reader.info.max_regions)
    return proposal_recall(
        split,
        ids,
        lambda image_id: reader.rows(image_id).boxes_xyxy,
        budgets=(*budgets, reader.info.max_regions),
    )


def _first_hit(
    objects_xyxy: Float[np.ndarray, "num_objects 4"], boxes_xyxy: Float[np.ndarray, "num_boxes 4"]
) -> np.ndarray:
    """Returns the rank of the first box that overlaps each object by half; a huge one if none."""
    never = np.iinfo(np.int64).max
    if not len(boxes_xyxy):
        return np.full(len(objects_xyxy), never)
    overlaps = pairwise_iou(
        torch.from_numpy(np.asarray(objects_xyxy, dtype=np.float32)),
        torch.from_numpy(np.asarray(boxes_xyxy, dtype=np.float32)),
    )
    hits = (overlaps >= _IOU).numpy()
    return np.where(hits.any(axis=1), hits.argmax(axis=1), never)
