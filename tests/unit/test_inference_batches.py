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
from dkdetr.student.inference_copy import inference_copy
from tests.tiny_student import image_batch, text_embeddings, tiny_student

cpu = torch.device("cpu")
plain, compiled = tiny_student(), inference_copy(tiny_student())
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


NAMES_IN_64S = """
from collections import Counter

import torch
from dkdetr.evaluation.compiled import NAMES_MULTIPLE
from dkdetr.evaluation.detect import detect
from dkdetr.student.inference_copy import inference_copy
from tests.tiny_student import TEXT_DIM, image_batch, tiny_student, unit_rows

cpu = torch.device("cpu")
torch._dynamo.config.automatic_dynamic_shapes = False
for multiple, graphs in ((1, 3), (NAMES_MULTIPLE, 1)):
    torch._dynamo.reset()
    compiled = Counter()

    def backend(graph, _):
        compiled["graphs"] += 1
        return graph.forward

    student = inference_copy(tiny_student())
    plain = inference_copy(tiny_student())
    student.compile(backend=backend)
    for names in (3, 20, 64):
        text = unit_rows(names, TEXT_DIM)
        one, other = (
            [each for _, each in detect(each, [image_batch()], text, device=cpu,
                                        max_detections=300, names_multiple=multiple)]
            for each in (plain, student)
        )
        exact = detect(plain, [image_batch()], text, device=cpu, max_detections=300)
        for ours, theirs, (_, wanted) in zip(one, other, exact, strict=True):
            assert len(ours.scores) == min(300, 12 * names) == len(theirs.scores)
            assert ours.labels.max() < names and theirs.labels.max() < names
            for found in (ours, theirs):
                torch.testing.assert_close(found.scores, wanted.scores, atol=1e-6, rtol=0)
    assert compiled["graphs"] == graphs, (multiple, compiled)
"""


def test_vocabularies_of_nearby_sizes_share_a_graph() -> None:
    """Without it each number of names is compiled anew."""
    done = subprocess.run(
        [sys.executable, "-c", NAMES_IN_64S], cwd=ROOT, capture_output=True, text=True, check=False
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
