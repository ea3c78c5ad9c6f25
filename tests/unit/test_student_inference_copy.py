"""The copy that only detects: the student's detections bitwise, and what it no longer does."""

import contextlib
import itertools

import pytest
import torch
from cuda_autocast import as_on_cuda
from launches import Launches
from tiny_student import TEXT_DIM, image_batch, text_embeddings, tiny_config, tiny_student
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dkdetr.evaluation.detect import detect
from dkdetr.experiment_file import load_experiment
from dkdetr.inference.ready_student import ReadyStudent
from dkdetr.student.build import build_student
from dkdetr.student.detector import DKDETR
from dkdetr.student.inference_copy import inference_copy

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESNET = {"arch": "resnet50", "width": 64}


def awake(norm: str = "batch", masks: bool = True, **backbone) -> DKDETR:
    """A student whose norms do something and whose last classifier is not like the others."""
    config = tiny_config(mask_head=masks, backbone={"norm": norm, **backbone})
    student = tiny_student(config)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in student.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("running_mean"):
            buffer.normal_(0.0, 0.2, generator=generator)
    return student


def under(dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=dtype)


def launches(student: nn.Module, dtype: torch.dtype) -> Launches:
    with torch.no_grad(), under(dtype), Launches() as counted:
        student(image_batch(), text_embeddings())
    return counted


@pytest.mark.parametrize(
    ("norm", "backbone", "dtype"),
    [
        *itertools.product(("batch", "frozen", "sync_batch"), ({},), DTYPES),
        *(("batch", RESNET, dtype) for dtype in DTYPES[:2]),  # random, it overflows in float16
    ],
)
def test_the_copy_says_bitwise_the_same(norm: str, backbone: dict, dtype: torch.dtype):
    """What is rounded once is what autocast rounds in each call."""
    student = awake(norm, **backbone)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    copied = inference_copy(student, dtype)
    images, text = image_batch(), text_embeddings()
    with torch.inference_mode(), under(dtype):
        wanted, found = student(images, text), copied(images, text)
    assert wanted.logits.shape[0] == 2
    assert found.logits.shape[0] == found.detection.boxes_cxcywh.shape[0] == 1
    assert wanted.logits.isfinite().all()
    assert torch.equal(found.logits[-1], wanted.logits[-1])
    assert torch.equal(found.detection.features[-1], wanted.detection.features[-1])
    assert torch.equal(found.detection.boxes_cxcywh[-1], wanted.detection.boxes_cxcywh[-1])
    assert torch.equal(found.encoder.objectness_logits, wanted.encoder.objectness_logits)
    which = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 11])
    with torch.inference_mode():
        assert torch.equal(found.masks.logits(-1, *which), wanted.masks.logits(-1, *which))
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_detections_are_the_same(precision):
    student = awake()
    copied = inference_copy(student, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    one, other = (
        [each for _, each in detect(
            each, [image_batch()], text_embeddings(), device=CPU, max_detections=9,
            precision=precision, with_masks=True,
        )]
        for each in (student, copied)
    )  # fmt: skip
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.boxes_xyxy, theirs.boxes_xyxy)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.masks == theirs.masks


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_neither_folds_nor_rounds_weights(dtype: torch.dtype):
    student = awake(masks=False, **RESNET)
    copied = inference_copy(student, dtype)
    convolutions = sum(isinstance(part, nn.Conv2d) for part in student.trunk.backbone.modules())
    before, after = launches(student, dtype), launches(copied, dtype)
    assert before.by_name["rsqrt"] == convolutions == 53
    assert after.by_name["rsqrt"] == 0
    weights = {id(weight) for weight in student.parameters()}
    own = {id(weight) for weight in copied.parameters()}
    assert bool(before.cast & weights) == (dtype != torch.float32)
    assert not after.cast & own
    # Six launches a norm; of 2 layers one is not scored (4) nor projected (1).
    spared = 6 * convolutions + 5
    if dtype != torch.float32:
        spared += before.by_name["_to_copy"] - after.by_name["_to_copy"]
        assert spared > 6 * convolutions + 5 + 2 * convolutions
    assert before.total - after.total >= spared
    assert after.total <= 800  # 2 + 2 layers, attention in plain PyTorch


def test_launches_of_a_student_of_the_papers_size():
    """A picture of any size takes as many; attention in plain PyTorch, autocast as on a GPU."""
    config = load_experiment("lvis_r50_70e", ["student.backbone.weights=random"]).config
    student = build_student(config, text_dim=512, load_weights=False).eval()
    images, text = image_batch([(192, 192)], padded_hw=(192, 192)), torch.zeros(1203, 512)
    for dtype, most in ((torch.float32, 1032), (torch.bfloat16, 1149)):
        counts = []
        for each in (student, inference_copy(student, dtype)):
            half = contextlib.nullcontext() if dtype == torch.float32 else as_on_cuda(dtype)
            with torch.no_grad(), half, Launches() as counted:
                each(images, text)
            counts.append(counted.total)
        print(f"{dtype}: {counts[0]} launches a call, {counts[1]} of the copy")
        assert counts[1] <= most < counts[0] - 340


def test_the_copy_holds_nothing_twice_that_it_does_not_change():
    student = awake(masks=False)
    copied = inference_copy(student)
    theirs = {id(weight) for weight in student.parameters()}
    own = [name for name, weight in copied.named_parameters() if id(weight) not in theirs]
    assert own
    assert all(name.startswith("trunk.backbone.") for name in own)


def test_changed_weights_are_noticed():
    student, other = awake(masks=False), tiny_student(seed=5)
    ready = ReadyStudent(CPU, "fp32", compiled=False)
    first = ready.of(student)
    assert ready.of(student) is first
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    second = ready.of(student)
    assert second is not first
    student.load_state_dict(other.state_dict())
    third = ready.of(student)
    with torch.inference_mode():
        wanted, found = (each(image_batch(), text_embeddings()) for each in (other, third))
    assert torch.equal(wanted.logits[-1], found.logits[-1])
    assert ready.of(other) is not third
    assert ready.of(nn.Identity()).__class__ is nn.Identity


def test_on_a_gpu_weights_of_convolutions_lie_as_maps_do():
    with FakeTensorMode(), torch.device("cuda"):
        student = build_student(tiny_config(), text_dim=TEXT_DIM).eval()
        copied = inference_copy(student, torch.bfloat16)
    kernels = [part.weight for part in copied.modules() if isinstance(part, nn.Conv2d)]
    assert len(kernels) > 10
    for weight in kernels:
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last)
