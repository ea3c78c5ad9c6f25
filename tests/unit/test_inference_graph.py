"""Exported graphs: the same boxes and scores in another runtime, whatever the sizes."""

import io
import json
import warnings
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_student import TEXT_DIM, image_batch, text_embeddings, tiny_config, tiny_student

from dkdetr.data.transforms import PIXEL_MEAN, PIXEL_STD
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import MismatchError, UsageError
from dkdetr.inference import export_graph as module
from dkdetr.inference.export_graph import ExportedGraph, export_graph
from dkdetr.inference.graph import (
    INPUTS,
    OUTPUTS,
    Example,
    StudentGraph,
    differences,
    least_side,
)


@pytest.fixture(autouse=True, scope="module")
def unchecked():
    """While a graph is traced, whole numbers are tensors: not what annotations say."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def vocabulary(teacher: str = "t") -> Vocabulary:
    rows = np.eye(3, TEXT_DIM, dtype=np.float32)
    groups = ((True,) * 3, ("",) * 3)
    return Vocabulary(("cat", "dog", "cone"), (4, 5, 9), *groups, ("a {}.",), teacher, rows)


def export(folder: Path, form, **options) -> ExportedGraph:
    path = folder / f"student.{form}"
    student = tiny_student(options.pop("config", None))
    return export_graph(path, form, student, tiny_config(), vocabulary(), **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> ExportedGraph:
    return export(tmp_path_factory.mktemp("onnx"), "onnx")


@pytest.fixture(scope="module")
def session(written) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])


def run(session, example: Example):
    fed = zip(INPUTS, example.arguments(baked=False), strict=True)
    return session.run(list(OUTPUTS), {name: each.numpy() for name, each in fed})


def check(compared) -> None:
    assert compared is not None
    assert compared.boxes < 1e-5
    assert compared.scores < 1e-4


def test_onnxruntime_finds_what_pytorch_finds(written):
    check(written.compared)
    assert written.names is None
    assert f"onnxruntime {onnxruntime.__version__}" in written.lines()[1]


@pytest.mark.parametrize(
    ("batch", "size_hw", "num_classes"),
    [(1, (128, 128), 1), (4, (96, 168), 3), (2, (200, 72), 700), (1, (135, 141), 80)],
)
def test_batch_size_and_classes_are_free(session, batch, size_hw, num_classes):
    example = Example.drawn(batch, size_hw, num_classes, TEXT_DIM, seed=batch)
    graph = StudentGraph(tiny_student())
    with torch.inference_mode():
        scores, boxes = graph(*example.arguments(baked=False))
    assert scores.shape == (batch, 12, num_classes)
    found = run(session, example)
    np.testing.assert_allclose(found[0], scores, atol=1e-4)
    np.testing.assert_allclose(found[1], boxes, atol=1e-5)


def test_a_picture_with_fewer_proposals_than_queries_is_the_same_in_both(session):
    example = Example.drawn(2, (96, 128), 4, TEXT_DIM, seed=6)
    example.padding_mask[:, 16:] = True
    example.padding_mask[:, :, 16:] = True
    with torch.inference_mode():
        scores, boxes = StudentGraph(tiny_student())(*example.arguments(baked=False))
    found = run(session, example)
    np.testing.assert_allclose(found[0], scores, atol=1e-4)
    np.testing.assert_allclose(found[1], boxes, atol=1e-5)


def test_what_lies_in_padding_has_no_say(session):
    example = Example.drawn(2, (128, 160), 4, TEXT_DIM, seed=5)
    noise = torch.where(example.padding_mask[:, None], 255.0 - example.pixels, example.pixels)
    first = run(session, example)
    second = run(session, Example(noise, example.padding_mask, example.text_embeddings))
    for mine, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    unmasked = Example(noise, torch.zeros_like(example.padding_mask), example.text_embeddings)
    third = run(session, unmasked)
    np.testing.assert_allclose(third[1][0], first[1][0], atol=1e-5)  # it has no padding
    assert np.abs(third[1][1] - first[1][1]).max() > 0.01


def test_the_graph_is_the_evaluations_student(session):
    images = image_batch()
    student = tiny_student()
    with torch.inference_mode():
        output = student(images, text_embeddings())
    mean, std = (torch.tensor(each)[:, None, None] for each in (PIXEL_MEAN, PIXEL_STD))
    example = Example(images.pixels * std + mean, images.padding_mask, text_embeddings())
    scores, boxes = run(session, example)
    np.testing.assert_allclose(scores, output.logits[-1].sigmoid(), atol=1e-4)
    centres = output.detection.boxes_cxcywh[-1][..., :2]
    np.testing.assert_allclose((boxes[..., :2] + boxes[..., 2:]) / 2, centres, atol=1e-5)


def test_an_onnx_file_says_what_it_is(written, tmp_path):
    model = onnx.load(written.path)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["teacher"] == "t"
    assert "names" not in told
    assert {i.name for i in model.graph.input} == set(INPUTS)
    assert json.loads(told["prompts"]) == ["a {}."]
    assert "thresholds" not in told
    names = replace(vocabulary(), prompts=("the {}!",), thresholds={"dog": 0.5})
    baked = export(tmp_path, "onnx", baked=names)
    assert any("1 least score(s) of names are in its metadata" in note for note in baked.notes)
    check(baked.compared)
    assert baked.names == 3
    model = onnx.load(baked.path)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["names"]) == ["cat", "dog", "cone"]
    assert json.loads(told["category_ids"]) == [4, 5, 9]
    assert json.loads(told["prompts"]) == ["the {}!"]
    assert json.loads(told["thresholds"]) == {"dog": 0.5}
    assert {i.name for i in model.graph.input} == {"pixels", "padding_mask"}


@pytest.mark.parametrize("bake", [False, True])
def test_torchscript(tmp_path, bake):
    made = export(tmp_path, "torchscript", baked=vocabulary() if bake else None)
    check(made.compared)
    extra = {"dkdetr.json": ""}
    with warnings.catch_warnings():
        # torch.jit is deprecated; torch 2.11 says so by another category than 2.14.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = torch.jit.load(io.BytesIO(made.path.read_bytes()), _extra_files=extra)
    assert ("names" in json.loads(extra["dkdetr.json"])) == bake
    assert "thresholds" not in json.loads(extra["dkdetr.json"])
    example = Example.drawn(3, (136, 104), 3, TEXT_DIM, seed=1)
    scores, _ = loaded(*example.arguments(baked=bake))
    assert scores.shape == (3, 12, 3)


def test_a_graph_that_is_wrong_is_noticed_and_one_in_another_order_is_not():
    graph = StudentGraph(tiny_student())

    def altered(change):
        def there(arguments):
            with torch.inference_mode():
                return tuple(change(each.numpy()) for each in graph(*arguments))

        return differences(graph, there, TEXT_DIM, runtime="test")

    assert altered(lambda rows: rows[:, ::-1]).boxes < 1e-6
    assert altered(lambda rows: rows + 0.2).scores == pytest.approx(0.2)
    assert altered(lambda rows: rows * 0.9).boxes > 0.01


def test_masks_stay_behind_and_the_student_is_left_alone(tmp_path):
    config = tiny_config(mask_head=True)
    student = tiny_student(config).train()
    made = export_graph(tmp_path / "m.pt", "torchscript", student, config, vocabulary())
    check(made.compared)
    assert "boxes only" in made.notes[0]
    assert student.mask_head is not None
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_imported", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'dkdetr\[export\]'"):
        export(tmp_path, "onnx")
    monkeypatch.setattr(module, "_imported", lambda name: onnx if name == "onnx" else None)
    made = export(tmp_path, "onnx")
    assert made.compared is None
    assert "nobody compared" in made.lines()[1]


def test_names_of_another_teacher_are_refused(tmp_path):
    with pytest.raises(MismatchError, match="embedded by other"):
        export(tmp_path, "onnx", baked=vocabulary("other"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_queries", [1, 300, 900])
def test_the_least_picture_has_a_token_for_each_query(num_queries):
    side = least_side(num_queries)
    assert sum((side // stride) ** 2 for stride in (8, 16, 32, 64)) >= num_queries
    assert side % 64 == 0
