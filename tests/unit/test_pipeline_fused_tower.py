"""The fused image tower says what open_clip's says, and is recorded where it was used."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from dkdetr.errors import UsageError
from pipeline.canary import canary_embeddings, check_canary, pack_canary
from pipeline.encode_stream import embed_stream
from pipeline.fused_tower import FusedTower, can_be_fused
from pipeline.teacher import load_teacher
from pipeline.teacher_model import usual_batch

VISION = {"image_size": 64, "layers": 4, "width": 96, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def teacher_spec(folder: Path, name: str, **changes) -> str:
    """Writes a small CLIP whose activations are large enough for GELU's shape to matter."""
    vision = VISION | changes.pop("vision", {})
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": TEXT, **changes}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(5)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "c_fc.weight" in key:
                tensor.mul_(3)
            if "in_proj" in key or "c_proj.weight" in key:
                tensor.mul_(6)
            if key.endswith(("bias", "ln_1.weight", "ln_2.weight")):
                tensor.add_(0.2 * torch.randn_like(tensor))
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")
    return f"{name}:{folder / name}.safetensors"


def crops_of(side: int, count: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, 256, (count, 3, 9, 9), generator=generator).float()
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return fine.round().byte()


@pytest.mark.parametrize("quick", [True, False], ids=["QuickGELU", "GELU"])
@pytest.mark.parametrize("no_norm_before", [False, True])
def test_it_equals_open_clip_s(quick: bool, no_norm_before: bool, tmp_path: Path) -> None:
    spec = teacher_spec(
        tmp_path, f"tower-{quick}-{no_norm_before}", quick_gelu=quick,
        vision={"no_ln_pre": no_norm_before},
    )  # fmt: skip
    usual, fused = load_teacher(spec), load_teacher(spec, encoder="fused")
    crops = crops_of(64)
    wanted = usual.crop_features(crops)
    assert np.unique(wanted.round(3), axis=0).shape == wanted.shape  # crops tell apart
    np.testing.assert_allclose(fused.crop_features(crops), wanted, atol=2e-4, rtol=1e-4)
    cosine = (fused.encode_crops(crops) * usual.encode_crops(crops)).sum(1)
    assert cosine.min() > 0.999999
    other = load_teacher(teacher_spec(tmp_path, f"other-{quick}-{no_norm_before}",
                                      quick_gelu=not quick), encoder="fused")  # fmt: skip
    assert (other.encode_crops(crops) * usual.encode_crops(crops)).sum(1).min() < 0.9999


@pytest.fixture(scope="module")
def whole_tower() -> torch.nn.Module:
    """The sizes and the depth of ViT-B/32, plainly initialised."""
    torch.manual_seed(0)
    visual = open_clip.create_model("ViT-B-32", load_weights=False).visual.eval()
    assert len(visual.transformer.resblocks) == 12
    return visual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32_through_all_layers(
    whole_tower: torch.nn.Module, dtype: torch.dtype
) -> None:
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = whole_tower(pixels).double()
        tower = FusedTower(whole_tower, dtype)
        half = tower(pixels).double()
        with torch.autocast("cpu", dtype=dtype):
            autocast = whole_tower(pixels).double()
        if dtype == torch.bfloat16:  # what `compiled` computes in on a GPU
            torch._dynamo.reset()
            compiled = torch.compile(tower, backend="aot_eager", dynamic=False)(pixels).double()
            torch._dynamo.reset()
            assert torch.cosine_similarity(compiled, half).min() > 0.99999
    found, usual = (torch.cosine_similarity(each, wanted).min() for each in (half, autocast))
    assert found > 0.9999
    assert 1 - found < 4 * (1 - usual) + 1e-6


def test_compiled_it_still_equals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, **how: compile_(module, backend="aot_eager", **how)
    )
    spec = teacher_spec(tmp_path, "compiled-tower")
    usual, compiled = load_teacher(spec), load_teacher(spec, encoder="compiled")
    crops = crops_of(64)
    wanted, found = usual.crop_features(crops), compiled.crop_features(crops)
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_the_fingerprint_names_it_and_the_canary_lets_it_pass(tmp_path: Path) -> None:
    spec = teacher_spec(tmp_path, "named-tower")
    usual, fused = load_teacher(spec), load_teacher(spec, encoder="fused")
    assert usual.identity == fused.identity
    assert fused.parts() == usual.parts() | {"encoder": "fused ViT"}
    assert load_teacher(spec, encoder="auto").parts() == usual.parts()  # on a CPU
    packed = pack_canary(canary_embeddings(usual))
    assert check_canary(packed, fused, where="it") > 0.9999


@pytest.mark.parametrize(
    "changes",
    [
        {"vision": {"pool_type": "avg"}},
        {"vision": {"ls_init_value": 0.1}},
        {"vision": {"attentional_pool": True, "attn_pooler_heads": 4}},
        {"vision": {"qk_norm": True}},
        {"vision": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8}},
    ],
    ids=["mean of tokens", "layer scale", "attentional pool", "normed keys", "ResNet"],
)
def test_other_towers_are_left_to_open_clip(changes: dict, tmp_path: Path) -> None:
    name = f"other-tower-{abs(hash(str(changes)))}"
    spec = teacher_spec(tmp_path, name, **changes)
    teacher = load_teacher(spec, encoder="auto")
    assert not can_be_fused(teacher._model.visual)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="no plain ViT"):
        load_teacher(spec, encoder="fused")


def test_compiled_it_is_one_program_of_fixed_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary's few crops, a shard's last ones and regions of any number share the batch."""
    shapes: list[tuple[object, ...]] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        pixels = [given for given in inputs if getattr(given, "ndim", 0) == 4]
        shapes.append(tuple(pixels[0].shape) if pixels else ("no pixels",))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, **how: compile_(module, backend=count, **how)
    )
    torch._dynamo.reset()
    spec = teacher_spec(tmp_path, "counted-tower")
    usual, compiled = load_teacher(spec), load_teacher(spec, encoder="compiled")
    batch = usual_batch(compiled.device)
    packed = pack_canary(canary_embeddings(usual))
    assert check_canary(packed, compiled, where="it") > 0.9999
    crops = crops_of(64, 40)
    stacks = [crops, crops[:30], crops[:1]]
    rows = list(embed_stream(stacks, compiled.features_on_device, batch_size=batch))
    np.testing.assert_allclose(rows[1], usual.crop_features(crops[:30]), atol=2e-4, rtol=1e-4)
    picture = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    boxes = np.tile(np.array([[5, 5, 60, 80]], dtype=np.float32), (45, 1))
    found = compiled.encode_regions(picture, boxes)
    np.testing.assert_allclose(found, usual.encode_regions(picture, boxes), atol=1e-4)
    assert shapes == [(batch, 3, 64, 64)]
    torch._dynamo.reset()
