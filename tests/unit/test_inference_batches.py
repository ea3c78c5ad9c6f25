"""Half precision, batches and compilation change no detection by more than their rounding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dkdetr.evaluation.detect import detect
from dkdetr.evaluation.postprocess import Detections, postprocess
from dkdetr.structures import ImageBatch
from tests.tiny_student import image_batch, text_embeddings, tiny_student

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def split_batch(batch: ImageBatch) -> list[ImageBatch]:
    return [
        ImageBatch(
            batch.pixels[i : i + 1],
            batch.padding_mask[i : i + 1],
            batch.image_sizes_hw[i : i + 1],
            batch.original_sizes_hw[i : i + 1],
            batch.image_ids[i : i + 1],
        )
        for i in range(len(batch.image_ids))
    ]


def run(student, batches, text, **more) -> list[Detections]:
    found = detect(student, batches, text, device=CPU, max_detections=20, **more)
    return [detections for _, detections in found]


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    return tiny_student().eval(), image_batch(), text_embeddings()


def test_a_batch_of_one_finds_what_a_batch_of_several_does(world):
    student, batch, text = world
    together = run(student, [batch], text)
    apart = run(student, split_batch(batch), text)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, atol=1e-3, rtol=1e-4)
        assert (one.labels == other.labels).float().mean() > 0.9  # near ties may change places


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_finds_the_same(world, precision):
    student, batch, text = world
    exact, half = run(student, [batch], text), run(student, [batch], text, precision=precision)
    for one, other in zip(exact, half, strict=True):
        torch.testing.assert_close(one.scores, other.scores, atol=0.02, rtol=0)
        best = {(q, c): box for q, c, box in zip(one.queries.tolist(), one.labels.tolist(),
                                                 one.boxes_xyxy, strict=True)}  # fmt: skip
        pairs = zip(other.queries.tolist(), other.labels.tolist(), strict=True)
        same = [(best[pair], box) for pair, box in zip(pairs, other.boxes_xyxy, strict=True)
                if pair in best]  # fmt: skip
        assert len(same) >= len(best) // 2
        moved = torch.stack([(ours - theirs).abs().max() for ours, theirs in same])
        assert moved.median() < 1.0  # pixels


COMPILED = """
import torch
from dkdetr.evaluation.compiled import compile_for_inference
from dkdetr.evaluation.detect import detect
from tests.tiny_student import image_batch, text_embeddings, tiny_student

cpu = torch.device("cpu")
plain, compiled = tiny_student(), tiny_student()
compile_for_inference(compiled, cpu, backend="eager")
found = [
    [each for _, each in detect(student, [image_batch()], text_embeddings(), device=cpu,
                                max_detections=20)]
    for student in (plain, compiled)
]
for one, other in zip(*found, strict=True):
    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, atol=1e-3, rtol=1e-4)
"""


def test_compiled_it_finds_the_same() -> None:
    """In a process of its own: torch.compile cannot look through the shape checks of tests."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_zeros_of_both_signs_are_equal_and_a_thousand_classes_keep_their_order():
    logits = torch.tensor([[[-0.0, 0.0], [0.0, -0.0]]])
    boxes = torch.full((1, 2, 4), 0.5)
    (found,) = postprocess(logits, boxes, torch.tensor([[10, 10]]), max_detections=4)
    assert found.queries.tolist() == [0, 0, 1, 1]
    assert found.labels.tolist() == [0, 1, 0, 1]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 300, 1203, generator=generator).round(decimals=1)
    boxes = torch.rand(2, 300, 4, generator=generator)
    both = postprocess(logits, boxes, torch.tensor([[480, 640], [333, 500]]), max_detections=300)
    for image, found in zip(logits, both, strict=True):
        order = torch.sort(image.flatten(), descending=True, stable=True).indices[:300]
        assert torch.equal(found.queries * 1203 + found.labels, order)
        assert torch.equal(found.scores, image.flatten()[order].sigmoid())


def test_one_copy_comes_back(world, monkeypatch):
    student, batch, text = world
    copies = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(1) or to_cpu(self))
    run(student, [batch, batch], text)
    assert len(copies) == 2
