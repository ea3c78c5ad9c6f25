"""Detections a second, in batches and one by one, beside transformers' in the same run.

    python -m tests.benchmarks.inference [--batches 8 1] [--size 1024] [--compile]

From pictures on the CPU, resized and normalised already, to boxes, scores and labels on the CPU:
300 of 300 queries and 1,203 classes. Weights are random. On a CPU the sizes are small, the time is
the process's own, and the ratio is what to read.
"""

import argparse

import torch
from torch import nn

from dkdetr.evaluation.compiled import compile_for_inference
from dkdetr.evaluation.detect import autocast, detect
from dkdetr.experiment_file import load_experiment
from dkdetr.structures import ImageBatch
from dkdetr.student.build import build_student
from tests.benchmarks.machine import describe
from tests.benchmarks.made_up import (
    TEXT_DIM,
    made_up_batch,
    made_up_text,
    peer_detector,
    seconds_a_call,
)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1] if on_gpu else [2, 1])
    parser.add_argument("--size", type=int, default=1024 if on_gpu else 192)
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--queries", type=int, default=300 if on_gpu else 100)
    parser.add_argument("--layers", type=int, default=6 if on_gpu else 3)
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="ours, once more, compiled")
    options = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(1)
    print(describe("torch", "triton", "transformers"))
    print(
        f"{options.size} px, {options.classes} classes, {options.queries} queries, "
        f"{options.layers} layers, {options.precision}, {device}"
    )
    print("| what | batch | ms | images/s | of transformers' |\n|---|---|---|---|---|")
    student = our_student(options).to(device)
    peer = peer_detector(options.classes, options.queries, options.layers).to(device).eval()
    for size in options.batches:
        images = made_up_batch(size, options.size, options.classes).images
        theirs = seconds_a_call(
            lambda images=images: peer_detections(peer, images, device, options),
            device, options.repeats,
        )  # fmt: skip
        report("transformers", size, theirs, theirs)
        report("ours", size, our_seconds(student, images, device, options), theirs)
    if not options.compile:
        return
    compile_for_inference(student, device)
    for size in options.batches:
        images = made_up_batch(size, options.size, options.classes).images
        seconds = our_seconds(student, images, device, options)
        print(f"| ours, compiled | {size} | {1000 * seconds:.1f} | {size / seconds:.2f} | |")


def report(name: str, size: int, seconds: float, theirs: float) -> None:
    rate = size / seconds
    print(f"| {name} | {size} | {1000 * seconds:.1f} | {rate:.2f} | {theirs / seconds:.2f} |")


def our_student(options: argparse.Namespace) -> nn.Module:
    overrides = [f"student.num_queries={options.queries}", "student.backbone.weights=random",
                 f"student.num_encoder_layers={options.layers}",
                 f"student.num_decoder_layers={options.layers}",
                 "student.backbone.norm=batch"]  # fmt: skip
    torch.manual_seed(0)
    config = load_experiment("lvis_r50_70e", overrides).config
    return build_student(config, text_dim=TEXT_DIM).eval()


def our_seconds(
    student: nn.Module, images: ImageBatch, device: torch.device, options: argparse.Namespace
) -> float:
    text = made_up_text(options.classes).to(device)

    def run() -> None:
        found = detect(
            student, [images], text, device=device, max_detections=300, precision=options.precision
        )
        assert len(list(found)) == len(images.image_ids)

    return seconds_a_call(run, device, options.repeats)


def peer_detections(
    model: nn.Module, images: ImageBatch, device: torch.device, options: argparse.Namespace
) -> list[tuple[torch.Tensor, ...]]:
    """Returns boxes, scores and labels as the original's postprocess chooses them."""
    pixels = images.pixels.to(device)
    mask = (~images.padding_mask).long().to(device)
    with torch.inference_mode(), autocast(options.precision, device):
        output = model(pixel_values=pixels, pixel_mask=mask)
    found = []
    for logits, boxes in zip(output.logits.float(), output.pred_boxes.float(), strict=True):
        best = logits.sigmoid().flatten().topk(min(300, logits.numel()))
        chosen = boxes[best.indices // logits.shape[1]]
        labels = best.indices % logits.shape[1]
        found.append((chosen.cpu(), best.values.cpu(), labels.cpu()))
    return found


if __name__ == "__main__":
    main()
