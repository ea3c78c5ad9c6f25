"""What a training keeps on a GPU at the paper's size, and that the pages' tables say so."""

import re
import weakref
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_autocast import fake_gpu, on_fake_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.student_setup import recompute_layers
from dkdetr.experiment_file import load_experiment
from dkdetr.losses.detection import focal_terms
from dkdetr.structures import ImageBatch, TeacherRegions
from dkdetr.student.build import build_student

ROOT = Path(__file__).parents[2]
IMAGES = 8
CLASSES, TEXT_DIM = 866, 512
"""LVIS's base names and CLIP ViT-B/32."""
FREE = 0.3
"""Share of a GPU that the first page's rows leave to what is not counted here."""
HALF = {"fp16", "bf16", "auto"}


class Standing(TorchDispatchMode):
    """Bytes of the tensors that were made within and are still there: now, and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return made

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


@cache
def bytes_an_image(
    *, half: bool, kernel: bool, recomputed: bool, name: str = "lvis_r50_70e"
) -> float:
    """The most that stands at once of a forward pass and its class loss, of 8 images together.

    Weights are not counted. Recomputed layers are, where backward is dearest: one encoder layer is
    there again beside the inputs of all, so one is not recomputed here.
    """
    config = load_experiment(name, ["student.backbone.weights=random"]).config
    side, kept = config.data.image_size, config.kd.regions_per_image
    assert (side, kept, config.student.num_queries) == (1024, 20, 300)
    with fake_gpu(kernel=kernel), ExitStack() as stack:
        student = build_student(config, text_dim=TEXT_DIM).train()
        if recomputed:
            recompute_layers((*student.trunk.encoder.layers, *student.decoder.layers))
            del student.trunk.encoder.layers[-1].forward
        standing = stack.enter_context(Standing())
        size = torch.full((IMAGES, 2), side)
        padding = torch.zeros(IMAGES, side, side, dtype=torch.bool)
        images = ImageBatch(
            torch.zeros(IMAGES, 3, side, side), padding, size, size, tuple(range(IMAGES))
        )
        regions = TeacherRegions(
            torch.zeros(IMAGES, kept, 4), torch.zeros(IMAGES, kept, TEXT_DIM),
            torch.ones(IMAGES, kept, dtype=torch.bool),
        )  # fmt: skip
        text = torch.zeros(CLASSES, TEXT_DIM)
        with on_fake_cuda(torch.float16) if half else ExitStack():
            output = student(images, text, regions)
        loss = focal_terms(output.logits, torch.zeros_like(output.logits), alpha=0.25, gamma=2.0)
        assert loss.requires_grad
        return standing.most / IMAGES


@cache
def bytes_of_weights() -> float:
    """Bytes of weights, gradients and AdamW's two moments."""
    config = load_experiment("lvis_r50_70e", ["student.backbone.weights=random"]).config
    with FakeTensorMode():
        student = build_student(config, text_dim=TEXT_DIM)
        groups = make_optimizer(student, config.optim).param_groups
    learning = sum(weight.numel() for group in groups for weight in group["params"])
    return 4 * sum(weight.numel() for weight in student.parameters()) + 4 * 3 * learning


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose head begins with `first`."""
    text = (ROOT / page).read_text("utf-8")
    _, found, rest = text.partition(f"\n| {first} ")
    assert found, f"{page} has no table '{first}'"
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_the_engine_s_page_says_what_an_image_takes(half: bool, recomputed: bool):
    table = rows("dkdetr/engine/README.md", "GB an image")
    told = {
        (not HALF.isdisjoint(re.findall(r"\w+", each[0])), "checkpointing" in each[0]): each[1:]
        for each in table
    }
    assert len(told) == len(table) == 4
    counted = [
        bytes_an_image(half=half, kernel=kernel, recomputed=recomputed) / 1e9
        for kernel in (True, False)
    ]
    assert told[half, recomputed] == [f"{each:.1f}" for each in counted]


def test_the_mask_head_takes_a_tenth_more():
    boxes, masks = (
        bytes_an_image(half=True, kernel=True, recomputed=False, name=f"lvis_r50_70e{kind}")
        for kind in ("", "_mask")
    )
    assert 1.05 < masks / boxes < 1.15


GPUS = rows("README.md", "GPU")


def test_the_first_page_knows_the_gpus_that_there_are():
    named = [cells[0] for cells in GPUS]
    assert all(any(gpu in each for each in named) for gpu in ("V100", "3090", "A100", "H100"))


@pytest.mark.parametrize(("gpu", "images", "added", "told", "micro_batches"), GPUS)
def test_what_the_first_page_recommends_fits(
    gpu: str, images: str, added: str, told: str, micro_batches: str
):
    settings = re.findall(r"--set ([^ `]+)", added)
    config = load_experiment("lvis_r50_70e", settings).config
    assert bool(settings) == bool(added)
    one = bytes_an_image(
        half=config.optim.precision in HALF,
        kernel=True,
        recomputed=config.compute.activation_checkpointing,
    )
    counted = (int(images) * one + bytes_of_weights()) / 1e9
    assert told == f"{counted:.0f}"
    (size,) = re.findall(r"(\d+) GB", gpu)
    assert counted <= (1 - FREE) * int(size)
    for ranks, parts in zip((16, 8, 1), micro_batches.split(", "), strict=True):
        share = config.data.batch_size / (ranks * int(images))
        assert parts == ("-" if share < 1 else f"{share:.0f}")
