"""Detections a second, in batches and one by one, beside transformers' in the same run.

    python -m tests.benchmarks.inference [--batches 8 1] [--size 1024] [--compile]

From pictures on the CPU (resized and normalised already, in page-locked memory, as loaders give
them) to boxes, scores and labels on the CPU: 300 of 300 queries and 1,203 classes. Weights are
random. On a CPU the sizes are small, the time is the process's own, and the ratio is what to read.
"""

import argparse

import torch
from torch import nn

from dkdetr.evaluation.compiled import compile_for_inference
from dkdetr.evaluation.detect import detect
from dkdetr.precision import computing, computing_type
from dkdetr.structures import ImageBatch
from tests.benchmarks.detectors import (
    as_loaded,
    begin,
    our_student,
    peer_detector,
    peer_inputs,
    size_options,
    take_attention,
)
from tests.benchmarks.made_up import made_up_batch, made_up_text, seconds_a_call


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    size_options(parser)
    parser.set_defaults(classes=1203)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1] if on_gpu else [2, 1])
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 3)
    parser.add_argument("--compile", action="store_true", help="ours, once more, compiled")
    options = parser.parse_args()
    device = begin(options)
    student, config = our_student(options)
    student = student.to(device).eval()
    take_attention(student, config, device, computing_type(options.precision, device))
    print("| what | batch | ms | images/s | of transformers' |\n|---|---|---|---|---|")
    peer = peer_detector(options).to(device).eval()
    theirs: dict[int, float] = {}
    for size in options.batches:
        images = pictures(size, options, device)
        theirs[size] = seconds_a_call(
            lambda images=images: peer_detections(peer, images, device, options),
            device, options.repeats,
        )  # fmt: skip
        report("transformers", size, theirs[size], theirs[size])
        report("ours", size, our_seconds(student, images, device, options), theirs[size])
    if not options.compile:
        return
    compile_for_inference(student, device)
    for size in options.batches:
        images = pictures(size, options, device)
        seconds = our_seconds(student, images, device, options)
        report("ours, compiled", size, seconds, theirs[size])


def pictures(size: int, options: argparse.Namespace, device: torch.device) -> ImageBatch:
    return as_loaded(made_up_batch(size, options.size, options.classes), device).images


def report(name: str, size: int, seconds: float, theirs: float) -> None:
    rate = size / seconds
    print(f"| {name} | {size} | {1000 * seconds:.1f} | {rate:.2f} | {theirs / seconds:.2f} |")


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
    with torch.inference_mode(), computing(options.precision, device):
        output = model(**peer_inputs(images, device))
    found = []
    for logits, boxes in zip(output.logits.float(), output.pred_boxes.float(), strict=True):
        best = logits.sigmoid().flatten().topk(min(300, logits.numel()))
        chosen = boxes[best.indices // logits.shape[1]]
        labels = best.indices % logits.shape[1]
        found.append((chosen.cpu(), best.values.cpu(), labels.cpu()))
    return found


if __name__ == "__main__":
    main()
