"""A student of a few thousand parameters and inputs for it, the same for the same seed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dkdetr.config import ExperimentConfig
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.experiment_file import config_from_dict
from dkdetr.losses.criterion import Criterion, LossReport, Normalisers, count_boxes, count_regions
from dkdetr.structures import ImageBatch, StudentOutput, Targets, TeacherRegions
from dkdetr.student.build import build_student
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import StudentFile, save_student_file

TEXT_DIM = 16
NUM_CLASSES = 5


def tiny_config(**student: Any) -> ExperimentConfig:
    backbone: Mapping[str, Any] = {
        "arch": "slim_resnet",
        "weights": "random",
        "norm": "batch",
        "frozen_stages": 0,
        "width": 8,
        **student.pop("backbone", {}),
    }
    sizes = {
        "embed_dim": 32,
        "num_heads": 4,
        "num_points": 2,
        "ffn_dim": 48,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_queries": 12,
        "dropout": 0.0,
    }
    return config_from_dict({"name": "tiny", "student": {**sizes, **student, "backbone": backbone}})


def tiny_student(
    config: ExperimentConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> DKDETR:
    """A student in evaluation mode whose zero-initialised parts have been shaken awake."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = build_student(config or tiny_config(), text_dim=TEXT_DIM)
        shake(student)
    return student.to(dtype).eval()


def save_speaking_student(path: Path, vocabulary: Vocabulary) -> None:
    """Writes a student that learned from the shipped teacher, for pictures of 128 pixels."""
    config = tiny_config()
    config = replace(config, data=replace(config.data, image_size=128))
    student = build_student(config, text_dim=vocabulary.embed_dim)
    shake(student)
    provenance = {"teacher_spec": "pictograms"}
    save_student_file(path, StudentFile(student.state_dict(), config, vocabulary, provenance))


def shake(module: nn.Module, amount: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


def image_batch(
    sizes_hw: Sequence[tuple[int, int]] = ((64, 96), (96, 64)),
    *,
    padded_hw: tuple[int, int] = (128, 128),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> ImageBatch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(len(sizes_hw), 3, *padded_hw, dtype=dtype)
    padding_mask = torch.ones(len(sizes_hw), *padded_hw, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes_hw):
        drawn = torch.randn(3, height, width, generator=generator, dtype=dtype)
        pixels[image, :, :height, :width] = drawn
        padding_mask[image, :height, :width] = False
    sizes = torch.tensor(sizes_hw)
    return ImageBatch(pixels, padding_mask, sizes, sizes, tuple(range(len(sizes_hw))))


def unit_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=generator, dtype=dtype)
    return functional.normalize(rows, dim=-1)


def text_embeddings(dtype: torch.dtype = torch.float32) -> Tensor:
    return unit_rows(NUM_CLASSES, TEXT_DIM, seed=7, dtype=dtype)


def boxes_inside(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes (cx, cy, w, h) that lie in the picture, sides 0.1 to 0.4."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.2 + 0.6 * torch.rand(*shape, 2, generator=generator, dtype=dtype)
    sides = 0.1 + 0.3 * torch.rand(*shape, 2, generator=generator, dtype=dtype)
    return torch.cat((centres, sides), dim=-1)


def teacher_regions(
    filled: Sequence[int] = (3, 2),
    *,
    places: int = 4,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
) -> TeacherRegions:
    valid = torch.arange(places)[None] < torch.tensor(filled)[:, None]
    return TeacherRegions(
        boxes_cxcywh=boxes_inside(len(filled), places, seed=seed, dtype=dtype),
        embeddings=unit_rows(len(filled), places, TEXT_DIM, seed=seed, dtype=dtype),
        valid=valid,
    )


def targets(
    counts: Sequence[int] = (2, 1), *, seed: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Targets, ...]:
    return tuple(
        Targets(
            labels=torch.arange(count) % NUM_CLASSES,
            boxes_cxcywh=boxes_inside(count, seed=seed + image, dtype=dtype),
        )
        for image, count in enumerate(counts)
    )


def loss_of(
    output: StudentOutput,
    wanted: Sequence[Targets],
    regions: TeacherRegions | None,
    config: ExperimentConfig | None = None,
) -> LossReport:
    """The criterion's report on one rank, normalised as the engine does."""
    config = config or tiny_config()
    device = output.logits.device
    normalisers = Normalisers(
        num_boxes=count_boxes(wanted, device).clamp(min=1),
        num_regions=count_regions(regions, device).clamp(min=1),
    )
    return Criterion(config.detection, config.kd)(output, wanted, regions, normalisers)
