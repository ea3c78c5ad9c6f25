"""The detection branch against an independent implementation with the same random weights.

transformers' Deformable DETR (two-stage, box refinement, ResNet-50) is carried over by our own
importer. Its class logits are linear: loaded into our projections, they must equal our features,
from which the cosine classifier (tested by itself) makes ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peer_detector import two_stage_deformable_detr
from safetensors.torch import save_file
from tiny_student import image_batch, unit_rows
from torch import Tensor, nn

from dkdetr.config import ExperimentConfig
from dkdetr.experiment_file import config_from_dict
from dkdetr.inference.convert import ConversionReport, convert
from dkdetr.structures import EncoderOutput, ImageBatch
from dkdetr.student import detector
from dkdetr.student.attention_reference import reference_attention
from dkdetr.student.build import build_student
from dkdetr.student.detector import DKDETR
from dkdetr.student.query_selection import SelectedAnchors, select_anchors

NUM_CLASSES = 7
SMALL = {
    "embed_dim": 64,
    "num_heads": 4,
    "ffn_dim": 96,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_queries": 40,
}
PAPER = {
    "embed_dim": 256,
    "num_heads": 8,
    "ffn_dim": 1024,
    "num_encoder_layers": 6,
    "num_decoder_layers": 6,
    "num_queries": 300,
}
SHAPES = [
    (((128, 160), (96, 128)), (128, 192)),
    (((64, 250), (190, 100)), (192, 256)),
    (((160, 160),), (160, 160)),
]


def experiment(student: dict[str, int]) -> ExperimentConfig:
    backbone = {"arch": "resnet50", "weights": "random", "norm": "frozen", "frozen_stages": 0}
    return config_from_dict(
        {"name": "parity", "student": {**student, "neck_bias": True, "backbone": backbone}}
    )


def reference_model(student: dict[str, int], dtype: torch.dtype) -> nn.Module:
    model = two_stage_deformable_detr(
        d_model=student["embed_dim"],
        encoder_layers=student["num_encoder_layers"],
        decoder_layers=student["num_decoder_layers"],
        encoder_attention_heads=student["num_heads"],
        decoder_attention_heads=student["num_heads"],
        encoder_ffn_dim=student["ffn_dim"],
        decoder_ffn_dim=student["ffn_dim"],
        two_stage_num_proposals=student["num_queries"],
        num_labels=NUM_CLASSES,
    ).eval()
    _randomise(model)
    return model.to(dtype)


def _randomise(model: nn.Module) -> None:
    """Moves every weight, statistics of frozen norms too, so that no swap goes unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.abs())
            elif name.endswith("bias") or "level_embed" in name or tensor.dim() == 1:
                tensor.add_(0.1 * noise)
            elif "bbox_embed" in name or "sampling_offsets" in name:
                tensor.add_(0.05 * noise)
        # The original lets tokens without a box into the best ones, where they turn to NaN; ours
        # puts them last. They all have the logit of a zero token: push it below the others.
        first_stage = model.class_embed[-1].weight
        norm_bias = model.get_parameter("model.enc_output_norm.bias")
        zero_token = torch.nn.functional.layer_norm(
            model.get_parameter("model.enc_output.bias"),
            norm_bias.shape,
            model.get_parameter("model.enc_output_norm.weight"),
            norm_bias,
        )
        first_stage[0] -= 0.5 * zero_token / zero_token.norm()
    # transformers 5.23 holds untied heads twice, 5.17 once; a trained model's copies are equal.
    model.model.decoder.class_embed.load_state_dict(model.class_embed.state_dict())
    model.model.decoder.bbox_embed.load_state_dict(model.bbox_embed.state_dict())


def carry_over(
    model: nn.Module, config: ExperimentConfig, folder: Path, dtype: torch.dtype
) -> tuple[DKDETR, ConversionReport]:
    # Shared tensors under two names are refused by safetensors: copies, as in a .bin.
    save_file(
        {k: v.clone().contiguous() for k, v in model.state_dict().items()},
        folder / "hf.safetensors",
    )
    student = build_student(config, text_dim=NUM_CLASSES).to(dtype).eval()
    report = convert(folder / "hf.safetensors", student, protocol="coco")
    with torch.no_grad():
        for ours, theirs in zip(student.classifiers, model.class_embed, strict=False):
            ours.projection.load_state_dict(theirs.state_dict())  # pyright: ignore
    return student, report


@contextmanager
def chosen_tokens() -> Iterator[list[Tensor]]:
    """Yields a list that takes the tokens the original chooses in its first stage, best first."""
    chosen: list[Tensor] = []
    topk = torch.topk

    def recorded(*args, **kwargs):
        best = topk(*args, **kwargs)
        chosen.append(best.indices)
        return best

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "topk", recorded)
        yield chosen


@contextmanager
def same_choice(chosen: Tensor) -> Iterator[None]:
    """Lets our decoder begin with these tokens, once they are shown to be our best ones too.

    Among thousands of logits the difference of two neighbours is below float32's rounding, which
    differs from one processor to the next: their order is nobody's to promise.
    """

    def select(encoder: EncoderOutput, num_queries: int) -> SelectedAnchors:
        ours = select_anchors(encoder, num_queries)
        scores = encoder.objectness_logits.gather(1, chosen)
        torch.testing.assert_close(scores, ours.objectness, rtol=0, atol=1e-5)
        boxes = encoder.boxes_cxcywh.gather(1, chosen[..., None].expand(-1, -1, 4))
        return SelectedAnchors(boxes_cxcywh=boxes, objectness=scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "select_anchors", select)
        yield


@contextmanager
def decoder_states(student: DKDETR) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    hook = student.decoder.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    yield seen
    hook.remove()


def differences(model: nn.Module, student: DKDETR, images: ImageBatch) -> dict[str, float]:
    """The largest difference of every output, boxes normalised."""
    text = unit_rows(3, NUM_CLASSES, dtype=images.pixels.dtype)
    with torch.no_grad(), chosen_tokens() as chosen:
        theirs = model(pixel_values=images.pixels, pixel_mask=(~images.padding_mask).long())
    with torch.no_grad(), decoder_states(student) as states, same_choice(chosen[0]):
        ours = student(images, text)
        memory, _, _ = student.trunk(images)
    valid = ours.encoder.valid
    hidden = theirs.intermediate_hidden_states.transpose(0, 1)
    pairs = {
        "memory": (memory[valid], theirs.encoder_last_hidden_state[valid]),
        "objectness": (
            ours.encoder.objectness_logits[valid],
            theirs.enc_outputs_class[valid][:, 0],
        ),
        "token boxes": (
            ours.encoder.boxes_cxcywh[valid],
            theirs.enc_outputs_coord_logits[valid].sigmoid(),
        ),
        "anchors": (ours.anchors_cxcywh, theirs.init_reference_points),
        "queries": (states[0], hidden),
        "boxes of all layers": (
            ours.detection.boxes_cxcywh,
            theirs.intermediate_reference_points.transpose(0, 1),
        ),
        "boxes": (ours.detection.boxes_cxcywh[-1], theirs.pred_boxes),
        "logits": (ours.detection.features[-1], theirs.logits),
    }
    for name, (one, other) in pairs.items():
        assert one.shape == other.shape, name
        assert one.isfinite().all(), name
    return {name: (one - other).abs().max().item() for name, (one, other) in pairs.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    model = reference_model(SMALL, torch.float32)
    folder = tmp_path_factory.mktemp("parity")
    return model, *carry_over(model, experiment(SMALL), folder, torch.float32)


@pytest.mark.parametrize(("sizes_hw", "padded_hw"), SHAPES)
def test_small_student(small, sizes_hw, padded_hw):
    model, student, _ = small
    found = differences(model, student, image_batch(sizes_hw, padded_hw=padded_hw))
    assert max(found.values()) < 1e-4, found


def test_the_papers_size(tmp_path: Path):
    model = reference_model(PAPER, torch.float32)
    student, _ = carry_over(model, experiment(PAPER), tmp_path, torch.float32)
    images = image_batch([(224, 288), (256, 200)], padded_hw=(256, 320))
    found = differences(model, student, images)
    print(found)  # the figures of student/README.md: pytest -rP
    assert max(found.values()) < 1e-4, found


def test_every_tensor_is_accounted_for(small):
    model, student, report = small
    own = {"kd_content", *(n for n in student.state_dict() if n.startswith("classifiers."))}
    assert set(report.missing) == own
    origins = {part for names in report.used.values() for part in names.split(" + ")}
    assert origins | set(report.ignored) == set(model.state_dict())
    assert all("copy of" in why or "fixed classes" in why for why in report.ignored.values())


def test_deformable_attention_alone_in_float64():
    from transformers.models.deformable_detr import modeling_deformable_detr as theirs

    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 13), (5, 7), (3, 4), (2, 2)]
    tokens = sum(height * width for height, width in shapes)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    value = draw(2, tokens, 4, 8)
    locations = 1.4 * draw(2, 50, 4, 4, 4, 2) - 0.2
    weights = draw(2, 50, 4, 4, 4)
    expected = theirs.MultiScaleDeformableAttention()(
        value, torch.tensor(shapes), shapes, None, locations, weights, 64
    )
    found = reference_attention(value, shapes, locations, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
