"""Takes over other projects' weights: DK-DETR's, Deformable DETR's, transformers', ResNet-50s.

Nothing is taken by guess: a tensor is used, or named with the reason why not, and a student's
tensor that nothing filled is reported too.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from dkdetr.errors import CorruptArtefactError, DataError, MismatchError
from dkdetr.inference.foreign_names import Layout, join_attention, pivot_name, recognise
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import TRAINING_ONLY

Protocol = Literal["lvis", "coco", "ovcoco"]

_BOXES_SEEN: Mapping[Layout, str] = {
    "opera": "LVIS base boxes, which name every novel class of OV-COCO",
    "deformable-detr": "COCO boxes of all 80 classes",
    "transformers": "COCO boxes of all 80 classes",
}
# What a student may keep of its own start: no other project has it.
_OURS_ALONE = "|".join(
    (*(rf"{re.escape(start)}.+" for start in (*TRAINING_ONLY, "classifiers.")),
     r".+\.num_batches_tracked")
)  # fmt: skip
_MASKS = "mask_head."
_SELECTION = "trunk.query_selection.projection."
"""What only two stages have: it makes proposals of the encoder's tokens."""
_RELEASED_IN_BOTH_STAGES: frozenset[Layout] = frozenset({"deformable-detr", "transformers"})
UNKNOWN = "unknown"
"""Why a tensor was left that no release of its layout is known to hold."""


@dataclass(frozen=True)
class ConversionReport:
    """What became of every tensor, ours and theirs."""

    layout: Layout
    used: Mapping[str, str]
    """Our tensor: theirs (several, if they were joined; a part, if only rows were taken)."""
    ignored: Mapping[str, str]
    """Their tensor: why it was left."""
    missing: tuple[str, ...]
    """Our tensors that keep their start."""
    warnings: tuple[str, ...]
    saw_boxes_of: str | None
    """What a detector was trained on; None for a mere backbone."""

    def as_json(self) -> dict[str, Any]:
        """Returns the report as a plain table."""
        return asdict(self)


def convert(path: Path, student: DKDETR, *, protocol: Protocol) -> ConversionReport:
    """Fills the student with another project's weights; returns what became of every tensor.

    Args:
        path: .pth, .pt, .bin or .safetensors.
        student: of the sizes of the file's model; changed only if all went well.
        protocol: what the student will be scored by; decides whether the boxes that a detector
            was trained on make it a leak.

    Raises:
        CorruptArtefactError: the file is no checkpoint, or lacks tensors of its own layout.
        DataError: the detector has seen boxes of the protocol's novel classes.
        MismatchError: a Deformable DETR of one stage, or a tensor of another shape than the
            student's.
    """
    return take_over(path, read_tensors(path), student, protocol=protocol)


def take_over(
    path: Path, foreign: Mapping[str, Tensor], student: DKDETR, *, protocol: Protocol
) -> ConversionReport:
    """Does what `convert` does with tensors that were read already; `path` is for messages."""
    layout = recognise(list(foreign))
    if layout is None:
        raise CorruptArtefactError(
            f"'{path}' holds none of the layouts known here (opera's DK-DETR, Deformable DETR, "
            f"transformers, ResNet-50); its first tensors: {sorted(foreign)[:3]}"
        )
    warnings = _judge_leak(path, layout, protocol)
    foreign, parts = join_attention(foreign)
    state, used, ignored = _rename(foreign, layout, student)
    used = {ours: _origin(key, parts) for ours, key in used.items()}
    missing = _fill_gaps(path, layout, state, student)
    _check_shapes(path, state, student)
    student.load_state_dict(state, strict=False)
    seen = _BOXES_SEEN.get(layout)
    return ConversionReport(layout, used, ignored, missing, warnings, seen)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint of any of the layouts, by their names in it.

    A .pth is read with weights_only: beside plain types only argparse.Namespace is let in, which
    the original Deformable DETR puts beside its weights.

    Raises:
        DataError: there is no such file.
        CorruptArtefactError: it cannot be read, or holds no tensors.
    """
    if not path.is_file():
        raise DataError(f"no checkpoint at '{path}'")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - foreign
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CorruptArtefactError(
            f"'{path}' is no checkpoint that can be read without running its code "
            f"({type(error).__name__}: {reason})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise CorruptArtefactError(f"'{path}' is no checkpoint: it holds a {type(loaded).__name__}")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CorruptArtefactError(f"'{path}' is no checkpoint: it holds no tensors")
    return tensors


def _judge_leak(path: Path, layout: Layout, protocol: Protocol) -> tuple[str, ...]:
    seen = _BOXES_SEEN.get(layout)
    if seen is None or protocol == "coco" or (layout, protocol) == ("opera", "lvis"):
        return ()
    if protocol == "ovcoco":
        raise DataError(
            f"'{path}' is a detector trained on {seen}: a student that starts from it cannot be "
            "scored on OV-COCO's novel classes. Start from a backbone instead "
            "(--set student.backbone.weights=FILE)"
        )
    return (
        f"this detector was trained on {seen}; some of them are rare in LVIS, so say so beside "
        "any APr of a student that starts from it",
    )


def _rename(
    foreign: Mapping[str, Tensor], layout: Layout, student: DKDETR
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    wanted = student.state_dict()
    state: dict[str, Tensor] = {}
    used: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for key in sorted(foreign, key=lambda name: ("decoder." in name, name)):
        name = pivot_name(key, layout)
        if name is None:
            ignored[key] = _why_unknown(key)
            continue
        ours, rows = _our_name(name, student)
        if layout not in ("opera",) and ours.startswith("classifiers."):
            ignored[key] = "a classifier of fixed classes; ours compares with text"
        elif ours.startswith(_MASKS) and student.mask_head is None:
            ignored[key] = (
                "part of the mask head; this student has boxes only (student.mask_head = true)"
            )
        elif ours not in wanted:
            ignored[key] = "the student has no such part"
            if re.fullmatch(r"trunk\.neck\..+\.0\.bias", ours):
                raise MismatchError(
                    f"the checkpoint's neck has biases ('{key}') and the student's none: "
                    "--set student.neck_bias=true"
                )
        elif ours in state:
            if not torch.equal(foreign[key] if rows is None else foreign[key][rows], state[ours]):
                raise CorruptArtefactError(
                    f"'{used[ours]}' and '{key}' are copies of one tensor in every release of this "
                    "layout; here they differ, and nobody can say which one counts"
                )
            ignored[key] = f"a copy of '{used[ours]}'"
        else:
            state[ours] = foreign[key] if rows is None else foreign[key][rows]
            used[ours] = key
    return state, used, ignored


def _why_unknown(key: str) -> str:
    if key.startswith("text_encoder."):
        return "a text bank, no weights: it is imported as a vocabulary"
    if re.match(r"(?:backbone\.)?fc\.", key):
        return "ImageNet's classifier"
    return UNKNOWN


def _our_name(name: str, student: DKDETR) -> tuple[str, slice | None]:
    """Returns our name for a pivot name, and which rows of the tensor are ours."""
    num_lateral = len(student.trunk.neck.lateral)
    num_layers = len(student.decoder.layers)
    found = re.fullmatch(r"backbone\.0\.body\.layer(\d)\.(.+)", name)
    if found:
        return f"trunk.backbone.stages.{int(found[1]) - 1}.{found[2]}", None
    found = re.fullmatch(r"input_proj\.(\d+)\.(.+)", name)
    if found:
        level = int(found[1])
        part = f"lateral.{level}" if level < num_lateral else f"extra.{level - num_lateral}"
        return f"trunk.neck.{part}.{found[2]}", None
    found = re.fullmatch(r"class_embed\.(\d+)\.(.+)", name)
    if found:
        if int(found[1]) == num_layers:
            # Every label of the first stage is 0: the other rows were only ever negatives.
            return f"trunk.query_selection.objectness.{found[2]}", slice(0, 1)
        return f"classifiers.{found[1]}.projection.{found[2]}", None
    found = re.fullmatch(r"bbox_embed\.(\d+)\.layers\.(\d)\.(.+)", name)
    if found:
        first_stage = int(found[1]) == num_layers
        head = "trunk.query_selection.box_head" if first_stage else f"decoder.box_heads.{found[1]}"
        return f"{head}.linear{int(found[2]) + 1}.{found[3]}", None
    for pattern, template in _PARTS:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(template), None
    return name, None


_PARTS = (
    (r"backbone\.0\.body\.conv1\.(.+)", r"trunk.backbone.stem.0.\1"),
    (r"backbone\.0\.body\.bn1\.(.+)", r"trunk.backbone.stem.1.\1"),
    (r"transformer\.level_embed", r"trunk.level_embeddings"),
    (r"transformer\.enc_output\.(.+)", r"trunk.query_selection.projection.\1"),
    (r"transformer\.enc_output_norm\.(.+)", r"trunk.query_selection.norm.\1"),
    (r"transformer\.pos_trans\.(.+)", r"anchor_projection.\1"),
    (r"transformer\.pos_trans_norm\.(.+)", r"anchor_norm.\1"),
    (
        r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)",
        r"trunk.encoder.layers.\1.self_attention.\2",
    ),
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.(.+)", r"trunk.encoder.layers.\1.norm.\2"),
    (
        r"transformer\.encoder\.layers\.(\d+)\.norm2\.(.+)",
        r"trunk.encoder.layers.\1.feed_forward.norm.\2",
    ),
    (
        r"transformer\.encoder\.layers\.(\d+)\.(linear[12])\.(.+)",
        r"trunk.encoder.layers.\1.feed_forward.\2.\3",
    ),
    (
        r"transformer\.decoder\.layers\.(\d+)\.(self|cross)_attn\.(.+)",
        r"decoder.layers.\1.\2_attention.\3",
    ),
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.(.+)", r"decoder.layers.\1.cross_norm.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.norm2\.(.+)", r"decoder.layers.\1.self_norm.\2"),
    (
        r"transformer\.decoder\.layers\.(\d+)\.norm3\.(.+)",
        r"decoder.layers.\1.feed_forward.norm.\2",
    ),
    (
        r"transformer\.decoder\.layers\.(\d+)\.(linear[12])\.(.+)",
        r"decoder.layers.\1.feed_forward.\2.\3",
    ),
)


def _origin(key: str, parts: Mapping[str, str]) -> str:
    return parts.get(key, key)


def _fill_gaps(
    path: Path, layout: Layout, state: dict[str, Tensor], student: DKDETR
) -> tuple[str, ...]:
    """Returns which of our tensors stay as they are; a neck without biases gets zeros."""
    wanted = student.state_dict()
    if layout == "resnet50":
        wanted = {key: value for key, value in wanted.items() if key.startswith("trunk.backbone.")}
    gaps = [key for key in wanted if key not in state]
    for key in gaps:
        if re.fullmatch(r"trunk\.neck\..+\.0\.bias", key):
            state[key] = torch.zeros_like(wanted[key])
    ours_alone = _OURS_ALONE
    if not any(key.startswith(_MASKS) for key in state):
        ours_alone += r"|mask_head\..+"  # a detector of boxes alone: the head keeps its start
    lost = [key for key in gaps if key not in state and not re.fullmatch(ours_alone, key)]
    if layout in _RELEASED_IN_BOTH_STAGES and not any(key.startswith(_SELECTION) for key in state):
        raise MismatchError(
            f"'{path}' is a Deformable DETR of one stage, whose queries know no proposals; this "
            "student starts from the two-stage one with box refinement: of its authors "
            "'r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage', of "
            "transformers 'SenseTime/deformable-detr-with-box-refine-two-stage'"
        )
    if lost:
        kind = (
            "a ResNet-50" if layout == "resnet50" else "a two-stage, box-refining Deformable DETR"
        )
        raise CorruptArtefactError(
            f"'{path}' does not hold {kind} of this student's depth: {len(lost)} tensors are "
            f"missing, first {lost[:3]}"
        )
    return tuple(key for key in student.state_dict() if key not in state)


def _check_shapes(path: Path, state: Mapping[str, Tensor], student: DKDETR) -> None:
    wanted = student.state_dict()
    unequal = [
        f"{key} is {tuple(state[key].shape)} there, {tuple(wanted[key].shape)} here"
        for key in state
        if state[key].shape != wanted[key].shape
    ]
    if unequal:
        raise MismatchError(
            f"'{path}' has other sizes than this student ({len(unequal)} tensors; {unequal[0]}): "
            "choose an experiment with its embed_dim, ffn_dim, num_heads and levels"
        )
