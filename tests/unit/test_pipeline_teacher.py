import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dkdetr.errors import CorruptArtefactError, DataError, MismatchError, UsageError
from dkdetr.structures import RegionEncoder, TextEncoder
from pipeline import teacher as teacher_module
from pipeline.canary import canary_embeddings, check_canary, pack_canary, unpack_canary
from pipeline.teacher import load_teacher

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


def test_unreachable_hub_weights_say_how_to_provide_them(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_canary_sees_swapped_channels(weights: Path) -> None:
    teacher = load_teacher(f"tiny-clip:{weights}")
    packed = pack_canary(canary_embeddings(teacher))

    class Swapped:
        encode_texts = staticmethod(teacher.encode_texts)

        @staticmethod
        def encode_regions(image: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
            return teacher.encode_regions(image[..., ::-1].copy(), boxes_xyxy)

    with pytest.raises(MismatchError):
        check_canary(packed, Swapped(), where="a cache")
