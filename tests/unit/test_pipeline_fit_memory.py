"""Where `fit` computes its encoder twice: by a count of what is kept, not by a GPU."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cuda_autocast import fake_gpu

from dkdetr.engine.student_setup import recompute_layers
from dkdetr.experiment_file import load_experiment
from dkdetr.structures import ImageBatch
from dkdetr.student.build import build_trunk
from pipeline import fit_memory
from pipeline.fit_memory import encoder_bytes, wants_recomputing

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SIDE = 1024
ROOT = Path(__file__).parents[2]
PAGE, FIRST_PAGE = ROOT / "pipeline" / "README.md", ROOT / "README.md"
MOST = 0.7
"""Share of a GPU that counted figures may fill: true peaks are higher."""


@cache
def kept_bytes(*, recomputed: bool, kernel: bool, norm: str = "batch") -> int:
    """Counts what the paper's trunk keeps of an image for backward; nothing is computed."""
    config = load_experiment("lvis_r50_70e", [f"student.backbone.norm={norm}"]).config
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with fake_gpu(kernel=kernel):
        trunk = build_trunk(config.student, load_weights=False).train()
        if recomputed:
            recompute_layers(trunk.encoder.layers)
        weights = {each.untyped_storage()._cdata for each in trunk.parameters()}
        sizes = torch.tensor([[SIDE, SIDE]])
        padding = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
        images = ImageBatch(torch.rand(1, 3, SIDE, SIDE), padding, sizes, sizes, (1,))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trunk(images)
    storages = {key: each.untyped_storage() for key, each in kept.items() if key not in weights}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kernel", [True, False])
def test_the_encoder_s_share_is_counted(kernel: bool) -> None:
    whole = kept_bytes(recomputed=False, kernel=kernel)
    without = kept_bytes(recomputed=True, kernel=kernel)
    config = load_experiment("lvis_r50_70e").config
    assert config.data.image_size == SIDE
    assert encoder_bytes(config, kernel=kernel) == pytest.approx(whole - without, rel=0.02)


def test_the_page_says_what_was_counted() -> None:
    counted = [
        kept_bytes(recomputed=False, kernel=True),
        kept_bytes(recomputed=False, kernel=False),
        kept_bytes(recomputed=True, kernel=True),
    ]
    still = kept_bytes(recomputed=True, kernel=True, norm="frozen")
    told = re.search(
        r"keeps ([\d.]+) GB an image for backward, ([\d.]+) where .* ([\d.]+) with the\s+"
        r"encoder's layers computed twice, ([\d.]+) less where batch norm stands still",
        PAGE.read_text("utf-8"),
    )
    assert told is not None
    figures = [*counted, counted[2] - still]
    assert told.groups() == tuple(f"{each / 1e9:.1f}" for each in figures)


def gb_of_layers_computed_twice(norm: str) -> float:
    """Returns what 16 images take at the most: while a layer is there again in backward."""
    whole, kept = (kept_bytes(recomputed=each, kernel=True, norm=norm) for each in (False, True))
    return 16 * (kept + (whole - kept) / 6) / 1e9


def test_the_first_page_s_micro_batches_fit_and_are_needed() -> None:
    first = " ".join(FIRST_PAGE.read_text("utf-8").split())
    told = re.search(
        r"on one GPU of (\d+) or (\d+) GB `cache-teacher` wants "
        r"`--set compute.micro_batches=(\d+)`, too "
        r"\(counted: (\d+) GB; all at once, with layers computed twice, (\d+)\)",
        first,
    )
    assert told is not None
    little, more, parts, in_parts, at_once = map(int, told.groups())
    counted = 16 / parts * kept_bytes(recomputed=False, kernel=True) / 1e9
    assert (in_parts, at_once) == (round(counted), round(gb_of_layers_computed_twice("batch")))
    assert counted <= MOST * little
    assert gb_of_layers_computed_twice("batch") > MOST * more
    # `own_r50`, whose batch norm stands still.
    (own,) = re.findall(r"on a GPU of (\d+) GB or less `cache-teacher` wants", first)
    assert MOST * int(own) < gb_of_layers_computed_twice("frozen") < MOST * more


@pytest.mark.parametrize(
    ("num_images", "free_gb", "kernel", "recomputes"),
    [
        (16, 48, True, True),
        (16, 80, True, False),
        (16, 80, False, True),  # plain PyTorch's attention keeps nearly as much again
        (4, 24, True, False),
        (4, 24, False, True),
    ],
)
def test_a_gpu_with_little_memory_computes_twice(
    monkeypatch: pytest.MonkeyPatch, num_images: int, free_gb: int, kernel: bool, recomputes: bool
) -> None:
    asked_of: list[object] = []

    def picked(*asked: object) -> bool:
        asked_of.append(asked)
        return kernel

    free = free_gb * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    monkeypatch.setattr(fit_memory, "picks_triton", picked)
    config = load_experiment("lvis_r50_70e").config
    assert wants_recomputing(config, num_images, GPU) == recomputes
    assert asked_of == [("auto", GPU, torch.float32, (8, 32, 4, 4))]
    assert not wants_recomputing(config, num_images, CPU)
    asked = replace(config, compute=replace(config.compute, activation_checkpointing=True))
    assert wants_recomputing(asked, num_images, CPU)
