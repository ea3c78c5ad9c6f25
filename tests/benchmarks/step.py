"""A whole training step by part, beside transformers' Deformable DETR in the same run.

    python -m tests.benchmarks.step [--batch 8] [--size 1024] [--set compute.compile=inductor]

Ours: all losses, distillation from a cache's embeddings, 300 + 20 queries; theirs: its own losses,
300 queries. Both: ResNet-50, two stages, box refinement, as many classes, AdamW, clipping, the same
precision (bfloat16 on a GPU that has it). A second table has large-scale jitter. Random weights.
`--alone` leaves out transformers and the jitter; a compiled student is one part.
On a CPU the sizes are small, the time is the process's own (but in the table of parts, which a
busy machine stretches), and the ratio is what to read.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dkdetr.data.device_views import decoded_images, render_images
from dkdetr.data.transforms import draw_geometry, render_view
from dkdetr.engine.allocator import keep_freed_memory
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.profiling import step_profiler
from dkdetr.engine.step import TrainingStep
from dkdetr.engine.step_parts import step_times
from dkdetr.engine.student_setup import prepare_student
from dkdetr.precision import float32_products, training_type
from dkdetr.structures import DecodedImages, TrainingBatch
from tests.benchmarks.detectors import (
    PEER,
    PEER_WANTS,
    as_loaded,
    begin,
    our_student,
    peak_gib,
    peer_detector,
    peer_inputs,
    reset_peak,
    size_choices,
    size_options,
    take_attention,
)
from tests.benchmarks.made_up import finish, made_up_batch, made_up_text, seconds_a_call
from tests.benchmarks.peers import Peers

_IDLE = {
    "compute.micro_batches": "a step is of one batch",
    "data": "the batch is made up; --size, --batch",
}


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    size_options(parser)
    parser.add_argument("--batch", type=int, default=8 if on_gpu else 1)
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 3)
    parser.add_argument("--alone", action="store_true", help="our step and nothing else")
    options = size_choices(parser, _IDLE)
    keep_freed_memory()
    device = begin(options)
    print(f"batch {options.batch}, {options.steps} steps")
    batch = as_loaded(made_up_batch(options.batch, options.size, options.classes), device)
    with float32_products(options.precision, device):
        ours = our_step(options, batch, device)
    print("\n| what | ms a step | images/s | peak GiB |\n|---|---|---|---|")
    report("ours, all losses", ours, options, device)
    if options.alone:
        return 0
    peers = Peers()
    with float32_products(options.precision, device):
        theirs = peers.measured(PEER, PEER_WANTS, lambda: peer_step(options, batch, device))
    if theirs is not None:
        report(PEER, theirs, options, device)
        print(f"ours is {theirs / ours:.2f} times as fast")
    reset_peak(device)
    loader, there = jitter_rates(options, device)
    print("\n| large-scale jitter to the step's size | images/s |\n|---|---|")
    print(f"| in one loader process | {loader:.1f} |")
    print(f"| on {device}, a batch at once | {there:.1f} |")
    return peers.exit_code()


def report(name: str, seconds: float, options: argparse.Namespace, device: torch.device) -> None:
    rate = options.batch / seconds
    print(f"| {name} | {1000 * seconds:.1f} | {rate:.2f} | {peak_gib(device)} |")


def our_step(options: argparse.Namespace, batch: TrainingBatch, device: torch.device) -> float:
    """Returns the seconds of a step; prints its parts."""
    student, config = our_student(options, ["kd.start_epoch=0"])
    student = student.to(device).train()
    precision = training_type(options.precision, device)
    take_attention(student, config, device, precision)
    prepare_student(student, config.compute)
    with tempfile.TemporaryDirectory() as folder:
        step = TrainingStep(
            student,
            make_optimizer(student, config.optim),
            made_up_text(options.classes).to(device),
            config,
            Ranks(rank=0, world_size=1, device=device),
            precision=precision,
            dumps=Path(folder),
        )
        reset_peak(device)
        done = iter(range(10**6))
        seconds = seconds_a_call(
            lambda: step([batch], epoch=0, iteration=next(done)), device, options.steps
        )
        profiled = 1 + options.steps // 3
        with step_profiler(student, profiled, warmup=1) as profiler:
            for _ in range(profiled + 1):
                step([batch], epoch=0, iteration=next(done))
                finish(device)
                profiler.step()
    print(step_times(profiler.events() or []).table())
    return seconds


def peer_step(options: argparse.Namespace, batch: TrainingBatch, device: torch.device) -> float:
    """Returns the seconds of a step of transformers' model."""
    model = peer_detector(options).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=1e-4)
    dtype = training_type(options.precision, device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        moved = batch.to(device)
        labels = [{"class_labels": each.labels, "boxes": each.boxes_cxcywh}
                  for each in moved.targets]  # fmt: skip
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = model(**peer_inputs(moved.images, device), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    reset_peak(device)
    return seconds_a_call(step, device, options.steps)


def jitter_rates(options: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Returns views a second: made by the loader's code, and on the device."""
    random = np.random.default_rng(0)
    count = max(2, options.batch)
    images = [random.integers(0, 256, (480, 640, 3), dtype=np.uint8) for _ in range(count)]
    views = [
        draw_geometry(
            (480, 640), torch.zeros(0, 4), image_size=options.size, scale_range=(0.1, 2.0),
            flip_probability=0.5, generator=torch.Generator().manual_seed(number),
        )
        for number in range(count)
    ]  # fmt: skip

    def by_loader() -> None:
        for image, view in zip(images, views, strict=True):
            render_view(image, view, image_size=options.size)

    decoded: DecodedImages = decoded_images(images, views, range(count), image_size=options.size)
    if device.type == "cuda":
        decoded = decoded.pin_memory()
    cpu = torch.device("cpu")
    loader = seconds_a_call(by_loader, cpu, options.steps)
    there = seconds_a_call(lambda: render_images(decoded.to(device)), device, options.steps)
    return count / loader, count / there


if __name__ == "__main__":
    sys.exit(main())
