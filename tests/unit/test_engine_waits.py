"""How often forward pass and loss make the CPU wait for a GPU: once, for the matching.

There is no GPU here. The student is built of fake tensors on a fake CUDA device, which have shapes
and no numbers: whatever asks the device for a number, or for a shape that depends on one, raises.
Copies between the devices are counted. The loop around them runs on a pretended GPU, with numbers.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from device_copies import Copies
from norm_kernels import stand_in_kernels
from step_options import option_config, training_batch
from tiny_student import NUM_CLASSES, TEXT_DIM
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from training_world import make_world, settings

from dkdetr.engine import distributed as engine_distributed
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.pairing import pair_with_teacher
from dkdetr.engine.train import train
from dkdetr.losses.alignment import Alignment
from dkdetr.losses.criterion import Criterion, Normalisers
from dkdetr.losses.distillation import distillation_statistics
from dkdetr.structures import DenoisingQueries, TrainingBatch
from dkdetr.student.attention_backend import use_backend
from dkdetr.student.backbone import slim_resnet
from dkdetr.student.build import build_student
from dkdetr.student.sync_norm import SyncBatchNorm2d
from tests.pretended_gpu import pretended_gpu


class OnTheCPU(TorchDispatchMode):
    """Remembers what is made in the CPU's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and each.device.type == "cpu":
                self.made.append(str(func))
        return result


class Work(TorchDispatchMode):
    """Remembers, as a stream and its event, what is launched between a copy and the wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self.while_copied: list[list[str]] = []

    def record_event(self) -> "Work":
        self.launched.clear()
        return self

    def synchronize(self) -> None:
        self.while_copied.append(self.launched[:])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.launched.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def without_numbers(self: Tensor) -> np.ndarray:
    """What `Tensor.numpy` gives here of a fake tensor: numbers of queries, neighbours different."""
    fewest_queries = 6
    return np.arange(self.numel(), dtype=np.float32).reshape(self.shape) % fewest_queries


def waits_of(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Copies, Work]:
    config = option_config(name)
    batch: TrainingBatch = training_batch(config)
    monkeypatch.setattr(FakeTensor, "numpy", without_numbers, raising=False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    copies, work = Copies(), Work()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: work)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            student = build_student(config, text_dim=TEXT_DIM).train()
            text = torch.zeros(NUM_CLASSES, TEXT_DIM)
            normalisers = Normalisers(torch.ones(()), torch.ones(()))
        use_backend(student, "torch", torch.device("cpu"))
        batch = batch.to("cuda")
        denoising = fake_denoising(config.student.denoising) if config.student.denoising else None
        criterion = Criterion(config.detection, config.kd, teacher_mean=text[0])
        with copies, work:
            regions = batch.regions if config.kd.auxiliary_queries else None
            output = student(
                batch.images, text, regions,
                hybrid=config.kd.hybrid_queries > 0, denoising=denoising,
            )  # fmt: skip
            pairs = pair_with_teacher(output, batch, Alignment(config.kd), criterion, None)
            paired, regions = (output, None) if pairs is None else (pairs.output, pairs.regions)
            report = criterion(paired, batch.targets, regions, normalisers, denoising=denoising)
            if pairs is not None:
                distillation_statistics(pairs)
        assert report.total.is_cuda
    return copies, work


def fake_denoising(groups: int) -> DenoisingQueries:
    places = 2 * groups
    with torch.device("cuda"):
        boxes, labels = torch.zeros(2, places, 4), torch.zeros(2, places, dtype=torch.long)
        valid = torch.zeros(2, places, dtype=torch.bool)
    return DenoisingQueries(boxes, labels, valid, boxes, labels, groups)


def test_the_watch_sees_what_waits():
    with FakeTensorMode(allow_non_fake_inputs=True):
        numbers = torch.zeros(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            numbers[0].item()
        with pytest.raises(DynamicOutputShapeException):
            numbers[numbers > 0]
        with pytest.raises(AssertionError), Copies():
            numbers.new_tensor([1.0, 2.0])
        with Copies() as copies:
            numbers.cpu()
        assert len(copies.down) == 1


@pytest.mark.parametrize("name", ["cached", "siglip_bias", "everything extra", "masks", "iou"])
def test_the_matching_alone_waits(name: str, monkeypatch: pytest.MonkeyPatch):
    copies, _ = waits_of(name, monkeypatch)
    assert len(copies.down) == 1, copies.down
    assert len(copies.up) == 1, copies.up


@pytest.mark.parametrize(
    ("name", "operation", "times"),
    [
        ("cached", "aten::_log_softmax", 2),  # RKD, of images and batch: the teacher's relations
        ("denoising", "aten::binary_cross_entropy_with_logits", 1),
    ],
)
def test_a_gpu_has_work_while_pairs_are_assigned(
    name: str, operation: str, times: int, monkeypatch: pytest.MonkeyPatch
):
    _, work = waits_of(name, monkeypatch)
    (launched,) = work.while_copied
    assert launched.count(operation) >= times, launched


def test_pairs_that_depend_on_matches_wait_once_more(monkeypatch: pytest.MonkeyPatch):
    copies, _ = waits_of("cached without auxiliary", monkeypatch)
    assert (len(copies.down), len(copies.up)) == (2, 2), (copies.down, copies.up)


@pytest.mark.parametrize("name", ["cached", "siglip_bias", "masks"])
@pytest.mark.parametrize("distil", [False, True])
def test_the_forward_pass_keeps_to_the_gpu(name: str, distil: bool):
    """A graph that touches the CPU is not recorded as a CUDA graph (compute.cuda_graphs)."""
    config = option_config(name)
    batch = training_batch(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            student = build_student(config, text_dim=TEXT_DIM).train()
            text = torch.zeros(NUM_CLASSES, TEXT_DIM)
        use_backend(student, "torch", torch.device("cpu"))
        batch = batch.to("cuda")
        with OnTheCPU() as cpu:
            student(batch.images, text, batch.regions if distil else None)
        assert not cpu.made
        with OnTheCPU() as cpu:
            text.cpu()
        assert cpu.made


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process as the first of two, of which the other never speaks."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_batch_norm_over_ranks_does_not_wait(monkeypatch: pytest.MonkeyPatch):
    """Forward and backward. With torch's own norm the same raises: it looks at the counts."""
    stand_in_kernels(monkeypatch.setattr)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            trunk = slim_resnet(
                weights="random", norm="sync_batch", frozen_stages=1, used_stages=(3, 4, 5), width=8
            ).train()
            norms = [nn.SyncBatchNorm(8).train(), SyncBatchNorm2d(8).train()]
            pixels, maps = torch.zeros(2, 3, 64, 64), torch.zeros(2, 8, 16, 16, requires_grad=True)
        with Copies() as copies, OnTheCPU() as cpu:
            assert all(each.is_cuda for each in trunk(pixels))
            result = norms[1](maps)
            # autograd's engine has no fake device: the norm's own step of it.
            backward = result.grad_fn.apply(torch.ones_like(result))
        assert backward[0].shape == maps.shape
        assert not copies.down + copies.up + cpu.made
        with pytest.raises(DynamicOutputShapeException):
            norms[0](maps)


@pytest.mark.usefixtures("two_ranks")
def test_a_vote_stands_in_a_queue_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Nothing is copied up, and what is waited for is not what the step has queued."""
    queues: list[torch.device] = []
    monkeypatch.setattr(engine_distributed, "_own_queue", lambda device: queues.append(device))
    ranks = Ranks(rank=0, world_size=2, device=torch.device("cuda"))
    with FakeTensorMode(), Copies() as copies:
        with pytest.raises(DataDependentOutputException):
            ranks.vote(True, False)
        assert queues == [ranks.device]
        assert not copies.up


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
@pytest.mark.parametrize("augment", ["loader", "device"])
@pytest.mark.parametrize("steps", [6, 13], ids=["burn-in", "distillation"])
def test_the_loop_waits_twice_a_step(steps: int, augment: str, tmp_path: Path):
    """For the costs that pairs are assigned by, and for the last step's gradient norm."""
    world = make_world(tmp_path, num_images=25)
    config = settings(data={"augment": augment}, optim={"precision": "fp32"})
    counts = []
    for more in (0, 4):
        request = replace(world.request(f"run{more}", config), device="cuda")
        with pretended_gpu() as waits:
            train(replace(request, until_iteration=steps + more))
            counts.append(Counter(waits))
    assert counts[1] - counts[0] == {"an event": 8}
