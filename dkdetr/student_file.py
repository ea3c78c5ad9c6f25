"""One student as one safetensors file: for sharing, for scoring, for starting a training from.

Inside: the tensors by name and, in the header, the settings, the vocabulary it speaks (if any),
where it comes from, and a hash over all of it. No code runs when such a file is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dkdetr.atomic_file import write_bytes
from dkdetr.config import ExperimentConfig
from dkdetr.data.vocabulary import Vocabulary, from_metadata
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError
from dkdetr.experiment_file import config_from_dict, config_to_dict
from dkdetr.student.build import build_student, build_trunk
from dkdetr.student.detector import DKDETR, KD_PREFIX, ProposingTrunk

STUDENT_SUFFIX = ".safetensors"
"""Ends the name of such a file, by which it is told from a run and its checkpoints."""
_FORMAT = "dkdetr-student-1"
_TEXT = "vocabulary.embeddings"
_TRUNK = "trunk."
_FIRST_CLASSIFIER = "classifiers.0.projection.weight"
TRAINING_ONLY = (KD_PREFIX, "denoising_content.")
"""How the names of tensors begin that only training uses: a student speaks without them."""


@dataclass(frozen=True)
class StudentFile:
    """What such a file holds.

    `tensors` need not be complete: one that comes from a plain detector has no classifiers, and a
    training that starts from it makes its own. `provenance` says whose weights these are;
    `saw_boxes_of`, if it is there, names what a foreign detector was trained on.
    """

    tensors: Mapping[str, Tensor]
    config: ExperimentConfig
    vocabulary: Vocabulary | None
    provenance: Mapping[str, Any]


def save_student_file(path: Path, file: StudentFile) -> None:
    """Writes the file atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in file.tensors.items()}
    vocabulary = None
    if file.vocabulary is not None:
        tensors[_TEXT] = torch.from_numpy(file.vocabulary.embeddings.copy())
        vocabulary = file.vocabulary.metadata()
    described = {
        "format": _FORMAT,
        "config": json.dumps(config_to_dict(file.config), sort_keys=True),
        "vocabulary": json.dumps(vocabulary, sort_keys=True),
        "provenance": json.dumps(dict(file.provenance), sort_keys=True),
    }
    described["xxh3_128"] = _hash(tensors, described)
    write_bytes(path, save(tensors, metadata=described), large=True)


def load_student_file(path: Path) -> StudentFile:
    """Returns what a student file holds, after checking its hash.

    Raises:
        DataError: no such file.
        CorruptArtefactError: not a student file, or damaged.
    """
    if not path.is_file():
        raise DataError(f"no student file '{path}'")
    try:
        with safe_open(path, framework="pt") as opened:
            described = dict(opened.metadata() or {})
            names = list(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CorruptArtefactError(f"'{path}' is not a safetensors file: {error}") from None
    expected = described.pop("xxh3_128", None)
    if described.get("format") != _FORMAT or expected is None:
        raise CorruptArtefactError(
            f"'{path}' is not a student file ({_FORMAT}); other projects' weights become one by "
            "`dkdetr convert`"
        )
    if _hash(tensors, described) != expected:
        raise CorruptArtefactError(f"'{path}' is damaged: its content does not give its own hash")
    text = tensors.pop(_TEXT, None)
    vocabulary = None
    if text is not None:
        vocabulary = from_metadata(json.loads(described["vocabulary"]), text.numpy())
    return StudentFile(
        tensors=tensors,
        config=config_from_dict(json.loads(described["config"])),
        vocabulary=vocabulary,
        provenance=json.loads(described["provenance"]),
    )


def is_student_file(path: Path) -> bool:
    """Returns whether a file says that it is one; its hash is not looked at."""
    try:
        with safe_open(path, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        return False


def student_vocabulary(path: Path) -> Vocabulary:
    """Returns the vocabulary that a student file brings.

    Raises:
        DataError: no such file, or it brings none.
        CorruptArtefactError: not a student file, or damaged.
    """
    vocabulary = load_student_file(path).vocabulary
    if vocabulary is None:
        raise DataError(f"the student file '{path}' brings no vocabulary")
    return vocabulary


def weights_hash(student: nn.Module) -> str:
    """Returns a hash of the weights that a student detects with: its file's are the run's own."""
    tensors = {
        name: tensor.detach().cpu()
        for name, tensor in student.state_dict().items()
        if not name.startswith(TRAINING_ONLY)
    }
    return _hash(tensors, {})


def build_from_file(path: Path, file: StudentFile, *, text_dim: int) -> DKDETR:
    """Returns the file's student whole, in evaluation mode, on the CPU.

    Args:
        path: for messages.
        file: what it holds.
        text_dim: width of the vocabulary that it will be scored with.

    Raises:
        MismatchError: tensors are missing, or have other shapes.
    """
    learned = file.tensors.get(_FIRST_CLASSIFIER)
    if learned is not None and len(learned) != text_dim:
        raise MismatchError(
            f"'{path}' compares with text embeddings of {len(learned)} numbers, these have "
            f"{text_dim}: it learned from another teacher"
        )
    student = build_student(file.config, text_dim=text_dim, load_weights=False)
    missing = load_into(path, file, student)
    lost = _needed(missing)
    if lost:
        raise MismatchError(
            f"'{path}' lacks {len(lost)} of the student's tensors, first '{lost[0]}': it can start "
            "a training (--set student.weights=FILE), but there is nothing yet to score"
        )
    return student.eval()


def build_trunk_from_file(path: Path, file: StudentFile) -> ProposingTrunk:
    """Returns what of the file's student proposes, in evaluation mode, on the CPU.

    It needs neither vocabulary nor decoder.

    Raises:
        MismatchError: tensors of it are missing, or have other shapes.
    """
    trunk = build_trunk(file.config.student, load_weights=False)
    inside = {
        name.removeprefix(_TRUNK): tensor
        for name, tensor in file.tensors.items()
        if name.startswith(_TRUNK)
    }
    if lost := _needed(load_into(path, replace(file, tensors=inside), trunk)):
        raise MismatchError(
            f"'{path}' lacks {len(lost)} of the first stage's tensors, first '{_TRUNK}{lost[0]}': "
            "it cannot propose; it can start a training (dkdetr train --set student.weights=FILE)"
        )
    return trunk.eval()


def _needed(missing: tuple[str, ...]) -> list[str]:
    """Returns which of a file's missing tensors its student cannot do without."""
    return [
        name
        for name in missing
        if not name.startswith(TRAINING_ONLY) and not name.endswith(".num_batches_tracked")
    ]


def load_into(path: Path, file: StudentFile, student: nn.Module) -> tuple[str, ...]:
    """Fills a student, or its part, with the file's; returns the names that keep their own start.

    Raises:
        MismatchError: a tensor is not the student's, or has another shape; nothing was changed.
    """
    wanted = student.state_dict()
    foreign = [
        name for name in file.tensors if name not in wanted and not name.startswith(TRAINING_ONLY)
    ]
    if foreign:
        raise MismatchError(
            f"'{path}' holds {len(foreign)} tensors that this student has not, first "
            f"'{foreign[0]}': compare its settings (dkdetr config show) with the experiment's"
        )
    taken = {name: tensor for name, tensor in file.tensors.items() if name in wanted}
    for name, tensor in taken.items():
        if tensor.shape != wanted[name].shape:
            raise MismatchError(
                f"'{path}' has other sizes than this student: {name} is {tuple(tensor.shape)} "
                f"there, {tuple(wanted[name].shape)} here"
            )
    student.load_state_dict(taken, strict=False)
    return tuple(name for name in wanted if name not in taken)


def _hash(tensors: Mapping[str, Tensor], described: Mapping[str, str]) -> str:
    digest = xxhash.xxh3_128(json.dumps(dict(described), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
