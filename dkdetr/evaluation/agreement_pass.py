"""The pass over a cache's images that `teacher_agreement` measures: features and their groups."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cache.rows import ImageRows
from cache.store import CacheReader
from dkdetr.boxes import pairwise_iou
from dkdetr.config import ExperimentConfig
from dkdetr.data.datasets import EvaluationBatches
from dkdetr.data.region_selection import SelectedRegions, select_regions
from dkdetr.data.splits import Split
from dkdetr.data.transforms import evaluation_geometry
from dkdetr.errors import MismatchError
from dkdetr.evaluation.ground_truth import GroundTruth, ground_truth_of
from dkdetr.evaluation.protocols import group_of
from dkdetr.evaluation.teacher_agreement import NO_OBJECT, TeacherAgreement, agreement_by_group
from dkdetr.precision import computing
from dkdetr.progress import progress
from dkdetr.structures import ImageBatch, TeacherRegions
from dkdetr.student.detector import DKDETR

DETECTION = "detection queries at the regions"
DISTILLED = "KD queries"

_OBJECT_IOU = 0.5
_DEFAULT_REGIONS = 20


def measure_agreement(
    student: DKDETR,
    split: Split,
    reader: CacheReader,
    config: ExperimentConfig,
    *,
    device: torch.device,
    held_out: bool,
) -> list[TeacherAgreement]:
    """Returns the agreement through detection queries and, of a student that has them, KD queries.

    Every student answers through detection queries whose anchors are put at the regions, so that
    runs with and without distillation can be compared; KD queries are what training distilled.

    Regions are chosen as for distillation (NMS, least size, highest objectness, as many as the
    experiment distils), but those on base objects stay. A region's group is that of the annotated
    object it overlaps most, if by half or more; annotations have no other say, and novel ones are
    read for this report alone.

    Raises:
        MismatchError: the cache holds no image of the split, or none with regions.
    """
    truth = ground_truth_of(split)
    known = set(reader.image_ids.tolist()) - set(reader.quarantined)
    images = tuple(image for image in split.images if image.image_id in known)
    own_kd = _distils_at_cached_boxes(config)
    collected = _Collected([DETECTION, DISTILLED] if own_kd else [DETECTION])
    make_batch = EvaluationBatches(split.folder, images, image_size=config.data.image_size)
    size = config.eval.batch_size
    student.eval()
    with progress(f"agreement on {split.name}", len(images)) as advance:
        for start in range(0, len(images), size):
            chosen = images[start : start + size]
            rows = [reader.rows(image.image_id) for image in chosen]
            picked = [_select(each, config) for each in rows]
            regions = _collate(rows, picked)
            if bool(regions.valid.any()):
                batch = make_batch(range(start, start + len(chosen))).to(device)
                with torch.inference_mode(), computing(config.optim.precision, device):
                    features = [_at_regions(student, batch, regions.to(device))]
                    if own_kd:
                        features.append(_distilled(student, batch, regions.to(device)))
                collected.add(features, regions, rows, picked, truth)
            advance(start + len(chosen), "")
    if not collected.images:
        raise MismatchError(
            f"the cache {reader.path} holds no region of an image of {split.name}: nothing to "
            "compare"
        )
    return collected.measure(split.name, held_out=held_out, num_images=len(images))


class _Collected:
    """Valid regions of all batches, laid end to end."""

    def __init__(self, queries: list[str]) -> None:
        self._features: dict[str, list[np.ndarray]] = {name: [] for name in queries}
        self._teacher: list[np.ndarray] = []
        self._groups: list[str] = []
        self.images: list[int] = []

    def add(
        self,
        features: list[Tensor],
        regions: TeacherRegions,
        rows: list[ImageRows],
        picked: list[SelectedRegions],
        truth: GroundTruth,
    ) -> None:
        for stored, values in zip(self._features.values(), features, strict=True):
            stored.append(values.float().cpu()[regions.valid].numpy())
        self._teacher.append(regions.embeddings[regions.valid].numpy())
        for row, chosen in zip(rows, picked, strict=True):
            self._groups += _groups_of(truth, row, chosen.indices.numpy())
            self.images += [row.image_id] * len(chosen.indices)

    def measure(self, split: str, *, held_out: bool, num_images: int) -> list[TeacherAgreement]:
        teacher, image = np.concatenate(self._teacher), np.array(self.images)
        return [
            TeacherAgreement(
                queries=name,
                split=split,
                held_out=held_out,
                num_images=num_images,
                groups=agreement_by_group(np.concatenate(stored), teacher, image, self._groups),
            )
            for name, stored in self._features.items()
        ]


def _distils_at_cached_boxes(config: ExperimentConfig) -> bool:
    kd = config.kd
    return kd.enabled and kd.auxiliary_queries and kd.alignment == "cached"


def _select(rows: ImageRows, config: ExperimentConfig) -> SelectedRegions:
    geometry = evaluation_geometry(
        (int(rows.image_size_hw[0]), int(rows.image_size_hw[1])), image_size=config.data.image_size
    )
    return select_regions(
        torch.tensor(rows.boxes_xyxy),
        torch.tensor(rows.objectness),
        torch.zeros(rows.num_regions),
        base_boxes_xyxy=torch.zeros((0, 4)),
        geometry=geometry,
        num_regions=config.kd.regions_per_image or _DEFAULT_REGIONS,
        # Nothing is left out for lying on a base object: its group is to be measured too.
        settings=replace(config.kd.selection, max_base_iou=2.0),
    )


def _collate(rows: list[ImageRows], picked: list[SelectedRegions]) -> TeacherRegions:
    most = max(1, *(len(each.indices) for each in picked))
    dim = rows[0].region_embeddings.shape[1]
    boxes = torch.tensor((0.5, 0.5, 1.0, 1.0)).repeat(len(rows), most, 1)
    embeddings = torch.zeros(len(rows), most, dim)
    valid = torch.zeros(len(rows), most, dtype=torch.bool)
    for place, (row, chosen) in enumerate(zip(rows, picked, strict=True)):
        count = len(chosen.indices)
        boxes[place, :count] = chosen.boxes_cxcywh
        embeddings[place, :count] = torch.from_numpy(row.region_embeddings[chosen.indices.numpy()])
        valid[place, :count] = True
    return TeacherRegions(boxes, embeddings, valid)


def _at_regions(student: DKDETR, images: ImageBatch, regions: TeacherRegions) -> Tensor:
    """Returns the last layer's features of detection queries anchored at the regions alone."""
    memory, grid, _ = student.trunk(images)
    content, positions = student.encode_anchors(regions.boxes_cxcywh)
    # Empty places are heard by nobody but themselves.
    itself = torch.eye(regions.valid.shape[1], dtype=torch.bool, device=regions.valid.device)
    blocked = ~(regions.valid[:, None, :] | itself)
    queries, _ = student.decoder(
        content,
        positions,
        regions.boxes_cxcywh,
        memory,
        grid,
        blocked.repeat_interleave(student.num_heads, dim=0),
    )
    return student.classifiers[-1].project(queries[-1])  # pyright: ignore[reportCallIssue]


def _distilled(student: DKDETR, images: ImageBatch, regions: TeacherRegions) -> Tensor:
    """Returns the last layer's features of the KD queries, as training sees them."""
    nothing = regions.embeddings.new_zeros((1, regions.embeddings.shape[-1]))
    output = student(images, nothing, regions)
    return output.distillation.features[-1]


def _groups_of(truth: GroundTruth, rows: ImageRows, indices: np.ndarray) -> list[str]:
    objects = truth.of_image(rows.image_id)
    objects = objects[~truth.is_crowd[objects]]
    if not len(objects):
        return [NO_OBJECT] * len(indices)
    corners = truth.boxes_xywh[objects].copy()
    corners[:, 2:] += corners[:, :2]
    boxes = torch.from_numpy(rows.boxes_xyxy[indices].astype(np.float64))
    overlaps = pairwise_iou(boxes, torch.from_numpy(corners)).numpy()
    groups = {c.category_id: group_of(truth.protocol, c) or "object" for c in truth.categories}
    names = [groups[int(number)] for number in truth.category_ids[objects]]
    return [names[int(row.argmax())] if row.max() >= _OBJECT_IOU else NO_OBJECT for row in overlaps]
