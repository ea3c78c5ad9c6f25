"""Detections a second, in batches and one by one, beside transformers' in the same run.

    python -m tests.benchmarks.inference [--batches 8 1] [--size 1024] [--compile]

`network`: from pictures on the CPU (resized and normalised already, in page-locked memory, as
loaders give them) to boxes, scores and labels on the CPU, for both; 300 of 300 queries and 1,203
classes. `predict`: what users run, `DKDETR.predict` of decoded pictures of 480 x 640, four batches
a call and one picture a call, with resizing, upload, thresholds and names; `of files`: of JPEGs,
with decoding on one core. Ours are by the copy that `predict` and `eval` ask. Weights are random.
On a CPU the sizes are small, the time is the process's own, and the ratio is what to read.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from dkdetr import DKDETR
from dkdetr.config import ExperimentConfig
from dkdetr.data.picture_input import Picture
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.evaluation.compiled import NAMES_MULTIPLE, ready_for_inference
from dkdetr.evaluation.detect import detect
from dkdetr.precision import computing, computing_type
from dkdetr.structures import ImageBatch
from dkdetr.student.detector import DKDETR as Student
from tests.benchmarks.detectors import (
    PEER,
    PEER_WANTS,
    as_loaded,
    begin,
    our_student,
    peer_detector,
    peer_inputs,
    reset_peak,
    size_choices,
    size_options,
    take_attention,
)
from tests.benchmarks.made_up import made_up_batch, made_up_text, seconds_a_call
from tests.benchmarks.peers import Peers

_PICTURE_HW = (480, 640)
_BATCHES_A_CALL = 4
_IDLE = {"compute": "--compile, of predict and eval"}


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    size_options(parser)
    parser.set_defaults(classes=1203)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1] if on_gpu else [2, 1])
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 3)
    parser.add_argument("--compile", action="store_true", help="ours, once more, compiled")
    options = size_choices(parser, _IDLE)
    device = begin(options)
    student, config = our_student(options, [f"data.image_size={options.size}"])
    student = student.to(device).eval()
    take_attention(student, config, device, computing_type(options.precision, device))
    peers = Peers()
    measured = peers.measured(PEER, PEER_WANTS, lambda: peer_seconds(options, device))
    reset_peak(device)
    theirs = measured or {}
    print("| what | batch | ms a batch | images/s | of transformers' |\n|---|---|---|---|---|")
    for size, seconds in theirs.items():
        report(f"{PEER}, network", size, seconds, seconds)
    for compiled in (False, True) if options.compile else (False,):
        time_ours(student, config, theirs, device, options, compiled=compiled)
    return peers.exit_code()


def peer_seconds(options: argparse.Namespace, device: torch.device) -> dict[int, float]:
    """Returns the peer's seconds a batch, by the batch's size."""
    peer = peer_detector(options).to(device).eval()
    images = {size: loaded_images(size, options, device) for size in options.batches}
    return {
        size: seconds_a_call(
            lambda given=given: peer_detections(peer, given, device, options),
            device, options.repeats,
        )
        for size, given in images.items()
    }  # fmt: skip


def time_ours(
    student: Student,
    config: ExperimentConfig,
    theirs: dict[int, float],
    device: torch.device,
    options: argparse.Namespace,
    *,
    compiled: bool,
) -> None:
    name = "ours, compiled" if compiled else "ours"
    ready = ready_for_inference(student, device, options.precision, compiled=compiled)
    vocabulary = made_up_vocabulary(options.classes)
    model = DKDETR(
        student, config, vocabulary, device=device, precision=options.precision, compiled=compiled
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in options.batches:
            images = loaded_images(size, options, device)
            multiple = NAMES_MULTIPLE if compiled else 1
            seconds = network_seconds(ready, images, device, options, multiple)
            report(f"{name}, network", size, seconds, theirs.get(size))
            calls = _BATCHES_A_CALL if size > 1 else 1
            pictures = made_up_pictures(size * calls)
            files = write_jpegs(pictures, Path(folder))
            for what, several in (("predict", pictures), ("predict of files", files)):
                seconds = predict_seconds(model, several, size, device, options) / calls
                report(f"{name}, {what}", size, seconds, theirs.get(size))


def loaded_images(size: int, options: argparse.Namespace, device: torch.device) -> ImageBatch:
    return as_loaded(made_up_batch(size, options.size, options.classes), device).images


def made_up_vocabulary(num_names: int) -> Vocabulary:
    numbers = range(num_names)
    return Vocabulary(
        names=tuple(f"name {number}" for number in numbers),
        category_ids=tuple(numbers),
        is_base=(True,) * num_names,
        frequencies=("",) * num_names,
        prompts=("a {}.",),
        teacher="nobody",
        embeddings=made_up_text(num_names).numpy(),
    )


def made_up_pictures(count: int) -> list[np.ndarray]:
    """Returns pictures that a JPEG of ordinary size can hold: coarse noise, smoothed."""
    generator = np.random.default_rng(0)
    height, width = _PICTURE_HW
    coarse = generator.integers(0, 256, (count, height // 16, width // 16, 3), dtype=np.uint8)
    return [np.array(Image.fromarray(each).resize((width, height))) for each in coarse]


def write_jpegs(pictures: Sequence[np.ndarray], folder: Path) -> list[Path]:
    paths = [folder / f"{number}.jpg" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path, quality=90)
    return paths


def report(name: str, size: int, seconds: float, theirs: float | None) -> None:
    rate, share = size / seconds, "-" if theirs is None else f"{theirs / seconds:.2f}"
    print(f"| {name} | {size} | {1000 * seconds:.1f} | {rate:.2f} | {share} |", flush=True)


def network_seconds(
    student: nn.Module,
    images: ImageBatch,
    device: torch.device,
    options: argparse.Namespace,
    names_multiple: int,
) -> float:
    text = made_up_text(options.classes).to(device)

    def run() -> None:
        found = detect(
            student, [images], text, device=device, max_detections=300,
            precision=options.precision, names_multiple=names_multiple,
        )  # fmt: skip
        assert len(list(found)) == len(images.image_ids)

    return seconds_a_call(run, device, options.repeats)


def predict_seconds(
    model: DKDETR,
    pictures: Sequence[Picture],
    batch_size: int,
    device: torch.device,
    options: argparse.Namespace,
) -> float:
    def run() -> None:
        assert len(model.predict(pictures, batch_size=batch_size)) == len(pictures)

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
    sys.exit(main())
