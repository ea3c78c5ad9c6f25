"""Where `fit` computes its encoder twice: by a count of what is kept, not by a GPU."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dkdetr.engine.student_setup import recompute_layers
from dkdetr.experiment_file import load_experiment
from dkdetr.structures import ImageBatch
from dkdetr.student import deformable_attention
from dkdetr.student.build import build_trunk
from pipeline.fit_memory import encoder_bytes, wants_recomputing

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SIDE = 256


def kept_bytes(*, recomputed: bool) -> int:
    """Counts what the paper's trunk keeps of an image for backward; nothing is computed."""
    config = load_experiment("lvis_r50_70e", ["student.backbone.norm=batch"]).config
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
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


def test_the_encoder_s_share_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_attention, "picks_triton", lambda *_: True)
    whole, without = kept_bytes(recomputed=False), kept_bytes(recomputed=True)
    config = load_experiment("lvis_r50_70e", [f"data.image_size={SIDE}"]).config
    assert encoder_bytes(config) == pytest.approx(whole - without, rel=0.1)
    # Of 1,024 pixels, so 16 times as many: the figures of pipeline/README.md.
    assert (16 * whole / 1e9, 16 * without / 1e9) == pytest.approx((4.1, 1.3), rel=0.03)


@pytest.mark.parametrize(
    ("num_images", "free_gb", "recomputes"), [(16, 48, True), (16, 80, False), (2, 24, False)]
)
def test_a_gpu_with_little_memory_computes_twice(
    monkeypatch: pytest.MonkeyPatch, num_images: int, free_gb: int, recomputes: bool
) -> None:
    free = free_gb * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    config = load_experiment("lvis_r50_70e").config
    assert wants_recomputing(config, num_images, GPU) == recomputes
    assert not wants_recomputing(config, num_images, CPU)
    asked = replace(config, compute=replace(config.compute, activation_checkpointing=True))
    assert wants_recomputing(asked, num_images, CPU)
