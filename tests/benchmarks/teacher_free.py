"""What the teacher costs a training step: not there, in the cache, or in the loop.

    python -m tests.benchmarks.teacher_free                          # small, for a CPU
    python -m tests.benchmarks.teacher_free --experiment lvis_r50_70e --batch 8 --image-size 1024 \
        --teacher ViT-B-32-quickgelu:openai --device cuda --steps 20 --set optim.precision=auto

Times whole optimisation steps on the same images:

a    no distillation
b    distillation, embeddings from a sealed cache: read before the step, as loader processes do
b+   the same, read inside the step by this process alone: more than any training pays
c    distillation, 20 crops an image embedded by the teacher inside the step, as in the paper
     and with 300

Weights are random but the teacher's; the numbers are seconds, not losses.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cache.plan import make_plan
from cache.rows import ImageRows
from cache.spec import PART_NAMES
from cache.store import CacheReader, open_cache
from cache.writer import create_or_resume
from dkdetr.config import ExperimentConfig
from dkdetr.encoders import RegionEncoder
from dkdetr.engine.allocator import keep_freed_memory
from dkdetr.engine.distributed import Ranks, pick_device
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.step import TrainingStep
from dkdetr.engine.student_setup import prepare_student
from dkdetr.experiment_file import load_experiment
from dkdetr.precision import float32_products, training_type
from dkdetr.structures import (
    ImageBatch,
    Targets,
    TeacherRegions,
    TrainingBatch,
)
from dkdetr.student.attention_backend import use_backend
from dkdetr.student.build import build_student
from pipeline.teacher import load_teacher
from tests.benchmarks.detectors import as_loaded, refuse_idle
from tests.benchmarks.made_up import finish

NUM_CLASSES = 866
KEPT = 300
SELECTED = 20
WARMUP = 2
_IDLE = {
    "data": "the batch is made up; --image-size, --batch",
    "compute.micro_batches": "a step is of one batch",
    "kd.start_epoch": "rows say what is distilled",
    "kd.regions_per_image": "rows say what is distilled",
}
Rows = Callable[[int], np.ndarray]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    keep_freed_memory()
    device = pick_device(options.device)
    teacher = load_teacher(options.teacher, device, encoder="auto")
    overrides = ["student.backbone.weights=random", "student.backbone.norm=batch", *options.set]
    config = load_experiment(options.experiment, overrides).config
    config = replace(config, kd=replace(config.kd, start_epoch=0, regions_per_image=SELECTED))
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (options.batch, options.image_size, options.image_size, 3))
    images = images.astype(np.uint8)
    boxes = _boxes(random, options.batch, KEPT) * options.image_size
    batch = as_loaded(_batch(images, random), device)
    text = torch.nn.functional.normalize(torch.randn(NUM_CLASSES, teacher.embed_dim), dim=-1)
    with tempfile.TemporaryDirectory() as folder:
        reader = _write_cache(Path(folder) / "cache", boxes, options.image_size, teacher.embed_dim)

        def from_cache(image: int) -> np.ndarray:
            return reader.regions(image + 1).embeddings(slice(SELECTED))

        read_ahead = [from_cache(image) for image in range(options.batch)]

        def from_teacher(crops: int) -> Rows:
            return lambda image: _embed(teacher, images[image], boxes[image, :crops])[:SELECTED]

        ways: dict[str, Rows | None] = {
            "a    no distillation": None,
            "b    from the cache": read_ahead.__getitem__,
            "b+   from the cache, read inside the step": from_cache,
        }
        for crops in options.crops:
            ways[f"c    CLIP in the loop, {crops} crops"] = from_teacher(crops)
        print(f"{options.experiment}, batch {options.batch} of {options.image_size} px, "
              f"{options.teacher}, {device}, {options.steps} steps")  # fmt: skip
        base = 0.0
        for name, rows in ways.items():
            with float32_products(config.optim.precision, device):
                seconds = _seconds(
                    config, batch, boxes, rows, text.to(device), device, options.steps
                )
            base = base or seconds
            print(f"{name:42s} {seconds:8.4f} s a step   {100 * (seconds / base - 1):+7.1f}%")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="pictograms_small")
    parser.add_argument("--teacher", default="pictograms")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=144)
    parser.add_argument("--crops", type=int, nargs="+", default=[SELECTED, KEPT])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    if min(options.crops) < SELECTED or max(options.crops) > KEPT:
        parser.error(f"--crops: from {SELECTED}, which a step distils, to {KEPT}, which are there")
    refuse_idle(parser, options.set, _IDLE)
    return options


def _seconds(
    config: ExperimentConfig,
    batch: TrainingBatch,
    boxes: np.ndarray,
    rows: Rows | None,
    text: torch.Tensor,
    device: torch.device,
    steps: int,
) -> float:
    """Returns the median time of a step whose regions come from `rows`, after two to warm up."""
    if rows is None:
        config = replace(config, kd=replace(config.kd, regions_per_image=0))
    torch.manual_seed(0)
    student = build_student(config, text_dim=text.shape[1]).to(device).train()
    use_backend(student, config.ops.backend, device)
    prepare_student(student, config.compute)
    step = TrainingStep(
        student,
        make_optimizer(student, config.optim),
        text,
        config,
        Ranks(rank=0, world_size=1, device=device),
        precision=training_type(config.optim.precision, device),
        dumps=Path("nonfinite"),
    )
    times = []
    for iteration in range(WARMUP + steps):
        finish(device)
        begun = time.perf_counter()
        regions = None if rows is None else _regions(batch, boxes, rows)
        step([replace(batch, regions=regions)], epoch=0, iteration=iteration)
        finish(device)
        times.append(time.perf_counter() - begun)
    return float(np.median(times[WARMUP:]))


def _regions(batch: TrainingBatch, boxes: np.ndarray, rows: Rows) -> TeacherRegions:
    size = batch.images.pixels.shape[-1]
    chosen = torch.from_numpy(boxes[:, :SELECTED]) / size
    low, high = chosen[..., :2], chosen[..., 2:]
    embeddings = np.stack([rows(image) for image in range(len(boxes))])
    return TeacherRegions(
        boxes_cxcywh=torch.cat(((low + high) / 2, high - low), dim=-1),
        embeddings=torch.from_numpy(embeddings).float(),
        valid=torch.ones(len(boxes), SELECTED, dtype=torch.bool),
    )


def _embed(teacher: RegionEncoder, image: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    return teacher.encode_regions(image, boxes_xyxy)


def _boxes(random: np.random.Generator, batch: int, count: int) -> np.ndarray:
    """Returns corners as shares of the picture."""
    low = random.uniform(0, 0.6, (batch, count, 2))
    return np.concatenate((low, low + random.uniform(0.1, 0.4, low.shape)), -1).astype(np.float32)


def _batch(images: np.ndarray, random: np.random.Generator) -> TrainingBatch:
    number, height, width = images.shape[:3]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 64 - 2
    sizes = torch.tensor([[height, width]] * number)
    mask = torch.zeros(number, height, width, dtype=torch.bool)
    targets = []
    for _ in range(number):
        centres = torch.from_numpy(random.uniform(0.3, 0.7, (7, 2)))
        sides = torch.from_numpy(random.uniform(0.1, 0.5, (7, 2)))
        targets.append(Targets(torch.arange(7), torch.cat((centres, sides), -1).float()))
    ids = tuple(range(1, number + 1))
    return TrainingBatch(ImageBatch(pixels, mask, sizes, sizes, ids), tuple(targets), None)


def _write_cache(path: Path, boxes: np.ndarray, size: int, embed_dim: int) -> CacheReader:
    plan = make_plan(
        range(1, len(boxes) + 1),
        max_regions=KEPT, embed_dim=embed_dim, max_gt=1, storage="fp16", batch_layout={},
    )  # fmt: skip
    random = np.random.default_rng(1)

    def unit(*shape: int) -> np.ndarray:
        vectors = random.normal(size=shape)
        return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)

    def rows_of(image_id: int) -> ImageRows:
        return ImageRows(
            image_id=image_id,
            image_size_hw=(size, size),
            boxes_xyxy=boxes[image_id - 1],
            objectness=np.linspace(1, 0, KEPT, dtype=np.float32),
            max_base_iou=np.zeros(KEPT, np.float32),
            region_embeddings=unit(KEPT, embed_dim),
            image_embedding=unit(embed_dim),
            gt_boxes_xyxy=np.zeros((0, 4), np.float32),
            gt_category_ids=np.zeros(0, np.int64),
            gt_embeddings=np.zeros((0, embed_dim), np.float32),
        )

    parts = {name: {} for name in PART_NAMES}
    with create_or_resume(path, parts=parts, plan=plan, provenance={}) as writer:
        for shard in writer.missing_shards():
            ids: Sequence[int] = plan.shard_image_ids(shard)
            writer.commit_shard(shard, [rows_of(i) for i in ids], quarantined={})
        writer.write_text({"names": ["thing"]}, unit(1, embed_dim))
        writer.seal()
    return open_cache(path)


if __name__ == "__main__":
    main()
