import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from dkdetr.encoders import RegionEncoder, TextEncoder
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError, UsageError
from pipeline import resampling, teacher_model
from pipeline import teacher as teacher_module
from pipeline.canary import canary_embeddings, check_canary, pack_canary, unpack_canary
from pipeline.crops import CropRule, parse_crop_rule
from pipeline.teacher import load_teacher
from pipeline.teacher_model import Teacher
from pipeline.teacher_source import parse_teacher_spec

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP of its own: configuration and weights."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(3)
    model = open_clip.create_model("tiny-clip")
    with torch.no_grad():  # untrained, its activations are too small for GELU's shape to matter
        for name, tensor in model.named_parameters():
            if "c_fc.weight" in name:
                tensor.mul_(2)
            if "c_proj.weight" in name:
                tensor.mul_(10)
    path = folder / "tiny-clip.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_teacher_is_both_encoders_and_gives_unit_rows(weights: Path) -> None:
    teacher = load_teacher(f"tiny-clip:{weights}")
    assert isinstance(teacher, TextEncoder)
    assert isinstance(teacher, RegionEncoder)
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    boxes = np.array([[3, 4, 30, 40], [0, 0, 70, 50]], dtype=np.float32)
    for rows in (teacher.encode_texts(["a cat", "a dog"]), teacher.encode_regions(picture, boxes)):
        assert rows.shape == (2, 16)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert teacher.encode_regions(picture, boxes[:0]).shape == (0, 16)
    assert teacher.encode_texts([]).shape == (0, 16)


def test_teacher_agrees_with_open_clip_itself(weights: Path) -> None:
    teacher = load_teacher(f"tiny-clip:{weights}")
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-clip", pretrained=str(weights)
    )
    picture = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)

    with torch.no_grad():
        expected = model.eval().encode_image(
            preprocess(Image.fromarray(picture))[None], normalize=True
        )
        words = model.encode_text(open_clip.get_tokenizer("tiny-clip")(["a cat"]), normalize=True)
    ours = teacher.encode_crops(torch.from_numpy(picture).permute(2, 0, 1)[None])
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(teacher.encode_texts(["a cat"]), words.numpy(), atol=1e-5)


def test_a_folder_names_its_weights_and_gives_the_same_identity(weights: Path) -> None:
    by_file = load_teacher(f"tiny-clip:{weights}")
    by_folder = load_teacher(f"tiny-clip:{weights.parent}")
    assert by_file.identity == by_folder.identity
    assert by_file.parts() == by_folder.parts()
    assert str(weights.parent) not in json.dumps(by_file.parts())


def test_a_folder_with_open_clip_config_brings_its_preprocessing(
    weights: Path, tmp_path: Path
) -> None:
    config = {"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights.read_bytes())
    teacher = load_teacher(f"any-name:{tmp_path}")
    assert teacher.preprocessing.mean == (0.5, 0.5, 0.5)
    assert teacher.preprocessing.size_hw == (32, 32)
    usual = load_teacher(f"tiny-clip:{weights}")
    assert usual.preprocessing.mean == open_clip.OPENAI_DATASET_MEAN
    assert teacher.parts()["weights_sha256"] == usual.parts()["weights_sha256"]
    assert teacher.parts() != usual.parts()


def test_random_is_seeded_marked_and_quiet(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first, second = load_teacher("tiny-clip:random"), load_teacher("tiny-clip:random")
    assert not caplog.records
    assert first.random
    assert "random" in first.identity
    assert first.parts() == second.parts()
    assert (
        first.parts()["weights_sha256"]
        != load_teacher(f"tiny-clip:{weights}").parts()["weights_sha256"]
    )


def test_one_changed_tensor_changes_the_fingerprint(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    state["ln_final.bias"][0] += 1e-3
    save_file(state, tmp_path / "tiny-clip.safetensors")
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY))
    changed = load_teacher(f"tiny-clip:{tmp_path}")
    assert changed.identity != load_teacher(f"tiny-clip:{weights}").identity


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("ViT-B-32", UsageError, "MODEL:PRETRAINED"),
        ("ViT-B-33:random", UsageError, "knows no model 'ViT-B-33'"),
        ("ViT-B-32:nonsense", UsageError, "no weights 'nonsense'"),
        ("ViT-B-32:openai", UsageError, "type --teacher ViT-B-32-quickgelu:openai"),
        ("ViT-B-32:/nowhere/at/all", DataError, "no file or folder"),
    ],
)
def test_wrong_specs_say_what_to_type(spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_teacher(spec)


def test_openai_weights_in_a_gelu_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit_b_32.openai.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=r"type --teacher ViT-B-32-quickgelu:.*openai"):
        load_teacher(f"ViT-B-32:{path}")


def test_a_config_beside_the_weights_that_contradicts_the_model_is_refused(tmp_path: Path) -> None:
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32-quickgelu")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="type --teacher ViT-B-32-quickgelu:"):
        load_teacher(f"ViT-B-32:{tmp_path}")


def test_a_file_of_other_weights_is_corrupt(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY))
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CorruptArtefactError, match=r"w\.safetensors"):
        load_teacher(f"tiny-clip:{path}")
    path.write_bytes(b"nonsense")
    with pytest.raises(CorruptArtefactError, match=r"w\.safetensors"):
        load_teacher(f"tiny-clip:{path}")


def test_unreachable_hub_weights_say_how_to_provide_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def unreachable(_: object) -> str:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(teacher_module.open_clip, "download_pretrained", unreachable)
    monkeypatch.setattr(
        teacher_module, "_build", lambda *_: (torch.nn.Identity(), None)
    )  # the 150 million weights are not the point
    with pytest.raises(DataError, match=r"ViT-B-32-quickgelu:/path/to/weights.*:random"):
        load_teacher("ViT-B-32-quickgelu:openai")


def test_canary_survives_packing_and_sees_the_wrong_activation(
    weights: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(f"tiny-clip:{weights}")
    embeddings = canary_embeddings(teacher)
    packed = pack_canary(embeddings)
    assert check_canary(packed, teacher, where="a cache") >= 0.99999
    np.testing.assert_allclose(unpack_canary(packed, embed_dim=16), embeddings, atol=1e-3)
    (tmp_path / "tiny-clip-2.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    (tmp_path / "w.safetensors").write_bytes(weights.read_bytes())
    other = load_teacher(f"tiny-clip-2:{tmp_path}")
    assert other.activation == "quick_gelu"
    with pytest.raises(MismatchError, match="canary cosine") as caught:
        check_canary(packed, other, where="a cache")
    assert caught.value.exit_code == 4


class _Swapped:
    """A teacher of which one thing is wrong."""

    def __init__(self, teacher: Teacher, **wrong: Any) -> None:
        self.encode_texts = teacher.encode_texts
        self._teacher, self._wrong = teacher, wrong

    def encode_regions(self, image: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
        if self._wrong.get("bgr"):
            image = image[..., ::-1].copy()
        patch = {key: value for key, value in self._wrong.items() if key != "bgr"}
        before = {key: getattr(self._teacher, key) for key in patch}
        try:
            vars(self._teacher).update(patch)
            return self._teacher.encode_regions(image, boxes_xyxy)
        finally:
            vars(self._teacher).update(before)


def test_canary_catches_every_swap_of_a_learned_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher("pictograms")
    packed = pack_canary(canary_embeddings(teacher))
    assert check_canary(packed, _Swapped(teacher), where="it") > 0.99999
    how, scale = teacher.preprocessing, teacher._scale
    swaps = {
        "channels": {"bgr": True},
        "bilinear": {"preprocessing": replace(how, interpolation="bilinear")},
        "no normalisation": {
            "_scale": torch.full_like(scale, 1 / 255), "_shift": torch.zeros_like(scale)
        },
        "SigLIP's normalisation": {
            "_scale": torch.full_like(scale, 2 / 255), "_shift": torch.ones_like(scale)
        },
    }  # fmt: skip
    for name, wrong in swaps.items():
        with pytest.raises(MismatchError, match="canary cosine"):
            check_canary(packed, _Swapped(teacher, **wrong), where=name)
    resize = resampling.kernels.resize_image
    monkeypatch.setattr(
        resampling.kernels, "resize_image",
        lambda *given, antialias: resize(*given, antialias=False),
    )  # fmt: skip
    with pytest.raises(MismatchError, match="canary cosine"):
        check_canary(packed, teacher, where="no antialiasing")
    monkeypatch.undo()
    # The accelerator's way of resampling is no swap.
    monkeypatch.setattr(
        teacher_model, "cut_windows",
        lambda *given: resampling.cut_by_matrices(*given, dtype=torch.float16),
    )  # fmt: skip
    assert check_canary(packed, teacher, where="it") > 0.9999


SIGLIP = {
    "embed_dim": 192,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224, "timm_model_name": "vit_tiny_patch16_224",
        "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 20, "vocab_size": 49408, "width": 192, "heads": 2, "layers": 1,
        "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": 1e-06},
    },
}  # fmt: skip
EVA = {
    "embed_dim": 48,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224, "timm_model_name": "eva02_tiny_patch14_224",
        "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": None,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 1,
    },
}  # fmt: skip
FAMILIES = {
    "siglip": (SIGLIP, {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash",
                        "interpolation": "bicubic"}, "squash"),
    "eva": (EVA, {"mean": list(open_clip.OPENAI_DATASET_MEAN),
                  "std": list(open_clip.OPENAI_DATASET_STD), "resize_mode": "shortest"},
            "clip_center"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_embed_as_open_clip_has_them(family: str, tmp_path: Path) -> None:
    config, preprocess, placement = FAMILIES[family]
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    (tmp_path / f"tiny-{family}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"tiny-{family}.json")
    torch.manual_seed(1)
    weights = open_clip.create_model(f"tiny-{family}").state_dict()
    (tmp_path / f"tiny-{family}.json").unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "open_clip_model.safetensors",
    )
    teacher = load_teacher(f"my-{family}:{tmp_path}")
    assert teacher.preprocessing.placement == placement
    assert teacher.activation == "gelu"
    assert teacher.parts()["image_size_hw"] == [224, 224]
    assert teacher.text_parts()["context_length"] == config["text_cfg"]["context_length"]

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    coarse = np.random.default_rng(1).integers(0, 255, (9, 14, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((300, 190), Image.Resampling.BICUBIC)
    with torch.no_grad():
        wanted = model.eval().encode_image(transform(picture)[None], normalize=True).numpy()
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["A Cat, asleep."])
        words = model.encode_text(tokens, normalize=True).numpy()
    whole = np.array([[0, 0, 300, 190]], dtype=np.float32)
    ours = teacher.encode_regions(np.array(picture), whole, CropRule("native", (1.0,)))
    assert (ours * wanted).sum() > 0.9999
    np.testing.assert_allclose(teacher.encode_texts(["A Cat, asleep."]), words, atol=1e-5)
    packed = pack_canary(canary_embeddings(teacher))
    assert check_canary(packed, teacher, where="it") > 0.99999


def test_a_family_without_quickgelu_is_never_taken_for_openais(tmp_path: Path) -> None:
    folder = tmp_path / "openai-and-others"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "siglip.safetensors")
    source = parse_teacher_spec(f"ViT-B-16-SigLIP:{folder / 'siglip.safetensors'}")
    teacher_module._check_activation(source, open_clip.get_model_config("ViT-B-16-SigLIP"))


def test_words_of_a_crop_rule() -> None:
    assert parse_crop_rule("squash") == CropRule()
    assert parse_crop_rule("vild") == CropRule("clip_center", (1.0, 1.5), "sum")
    assert parse_crop_rule("native", "1.0", "mean", "avg").views == "avg"
    wrong = [("round",), ("squash", "1,a"), ("squash", "0"), ("squash", "1,1"), ("squash", ""),
             ("squash", "nan"), ("squash", "1", "max"), ("squash", "1", None, "flip"),
             ("vild", "1", "mean")]  # fmt: skip
    for words in wrong:
        with pytest.raises(UsageError, match="--"):
            parse_crop_rule(*words)
