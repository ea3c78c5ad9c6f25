"""Steps of the tiny student under every option of distillation."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_student import (
    NUM_CLASSES,
    TEXT_DIM,
    boxes_inside,
    image_batch,
    targets,
    teacher_regions,
    text_embeddings,
    tiny_config,
    tiny_student,
    unit_rows,
)

from dkdetr.config import ExperimentConfig
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.pairing import TeacherSide
from dkdetr.engine.step import StepResult, TrainingStep
from dkdetr.experiment_file import config_from_dict, config_to_dict
from dkdetr.structures import OriginalImage, Targets, TeacherRegions, TrainingBatch
from dkdetr.student.detector import DKDETR

OPTIONS: dict[str, dict[str, Any]] = {
    "cached": {},
    "cached without auxiliary": {"auxiliary_queries": False},
    "iou": {"alignment": "iou"},
    "iou by matches": {"alignment": "iou", "exclude": "matched"},
    "iou without auxiliary": {"alignment": "iou", "auxiliary_queries": False},
    "hybrid": {"alignment": "hybrid"},
    "online": {"alignment": "online"},
    "online as printed": {"alignment": "online", "exclude": "matched", "content": "slots"},
    "slots": {"content": "slots"},
    "l1": {"skd": {"loss": "l1"}},
    "infonce": {"skd": {"loss": "infonce", "duplicate_similarity": 0.9}},
    "siglip_bias": {"skd": {"loss": "siglip_bias", "bias": -4.0}},
    "siglip_bias without auxiliary": {"skd": {"loss": "siglip_bias"}, "auxiliary_queries": False},
    "centred": {"skd": {"loss": "centred"}},
    "relations apart": {
        "rkd": {"include_self": False, "reverse": True, "cross_only": True, "gather": True}
    },
    "all layers": {"layers": "all", "rkd": {"gather": True}},
    "extra queries": {"hybrid_queries": 6},
    "extra queries alone": {"hybrid_queries": 6, "regions_per_image": 0},
    "fed": {"loss_class": "fed"},
    "denoising": {"denoising": 2},
    "everything extra": {"denoising": 1, "hybrid_queries": 6},
    "masks": {"mask_head": True},
}


class FakeTeacher:
    """A `RegionEncoder` that draws unit vectors, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[np.ndarray] = []

    identity = "fake"

    @property
    def num_calls(self) -> int:
        return len(self.asked)

    def encode_regions(self, image: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
        self.asked.append(boxes_xyxy)
        return unit_rows(len(boxes_xyxy), TEXT_DIM, seed=len(boxes_xyxy)).numpy()


@dataclass
class OptionStep:
    student: DKDETR
    step: TrainingStep
    config: ExperimentConfig
    teacher: FakeTeacher

    def __call__(self, batch: TrainingBatch, *, epoch: int = 40) -> StepResult:
        return self.step([batch], epoch=epoch, iteration=10_000)


def option_config(name: str, *, all_base: bool = False) -> ExperimentConfig:
    kd = {"regions_per_image": 4, "candidates_per_image": 6, "align_iou": 0.01, **OPTIONS[name]}
    loss_class = kd.pop("loss_class", "focal")
    student = {key: kd.pop(key) for key in ("denoising", "mask_head") if key in kd}
    # Own anchors of an untrained student overlap everything a little.
    kd["selection"] = {"max_base_iou": 0.0 if all_base else 0.9, "min_side": 1.0}
    table = config_to_dict(tiny_config(**student))
    table |= {"kd": kd, "detection": {"loss_class": loss_class, "fed_classes": 3}}
    table["optim"] = {"lr": 1e-3, "weight_decay": 0.01}
    return config_from_dict(table)


def teacher_side(config: ExperimentConfig, teacher: FakeTeacher) -> TeacherSide:
    weights = torch.arange(1.0, NUM_CLASSES + 1) if config.detection.loss_class == "fed" else None
    return TeacherSide(
        encoder=teacher if config.kd.alignment == "online" else None,
        mean=0.3 * unit_rows(1, TEXT_DIM, seed=11)[0],
        class_weights=weights,
    )


def step_of(name: str, *, all_base: bool = False) -> OptionStep:
    return step_under(option_config(name, all_base=all_base))


def step_under(config: ExperimentConfig) -> OptionStep:
    student, teacher = tiny_student(config).train(), FakeTeacher()
    step = TrainingStep(
        student,
        make_optimizer(student, config.optim),
        text_embeddings(),
        config,
        Ranks(rank=0, world_size=1, device=torch.device("cpu")),
        precision=torch.float32,
        dumps=Path("nonfinite"),
        teacher=teacher_side(config, teacher),
    )
    return OptionStep(student, step, config, teacher)


def training_batch(
    config: ExperimentConfig,
    *,
    counts: tuple[int, int] = (2, 1),
    filled: tuple[int, int] = (4, 3),
    seed: int = 3,
) -> TrainingBatch:
    kd = config.kd
    regions: TeacherRegions | None = None
    originals: tuple[OriginalImage, ...] = ()
    if kd.enabled:
        regions = teacher_regions(filled, places=kd.offered_regions, seed=seed)
        if kd.alignment != "cached":  # large, so that the student's anchors meet them
            boxes = boxes_inside(2, kd.offered_regions, seed=seed)
            boxes[..., 2:] += 0.3
            regions = replace(regions, boxes_cxcywh=boxes)
    if kd.enabled and kd.alignment == "online":
        pixels = np.zeros((64, 96, 3), np.uint8)
        originals = (OriginalImage(pixels, (96.0, 64.0), (0.0, 0.0)),) * 2
    images, wanted = image_batch(seed=seed), targets(counts)
    if config.student.mask_head:
        pairs = zip(wanted, images.image_sizes_hw.tolist(), strict=True)
        wanted = tuple(
            masked(target, (h, w), config.student.mask_stride) for target, (h, w) in pairs
        )
    return TrainingBatch(images, wanted, regions, originals)


def masked(target: Targets, image_hw: tuple[int, int], stride: float) -> Targets:
    """The same objects with masks that fill their boxes, in a padded view of 128 pixels."""
    pixels = (torch.arange(int(128 / stride)) + 0.5) * stride
    centre_x, centre_y, width, height = target.boxes_cxcywh.unbind(-1)
    rows = (pixels / image_hw[0] - centre_y[:, None]).abs() < height[:, None] / 2
    columns = (pixels / image_hw[1] - centre_x[:, None]).abs() < width[:, None] / 2
    return replace(target, masks=rows[:, :, None] & columns[:, None, :])
