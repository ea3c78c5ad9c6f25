"""From another project's checkpoint to a student file, with a report of every tensor."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkdetr.data.vocabulary import load_vocabulary
from dkdetr.errors import MismatchError, UsageError
from dkdetr.experiment_file import load_experiment
from dkdetr.inference.convert import (
    UNKNOWN,
    ConversionReport,
    Protocol,
    read_tensors,
    take_over,
)
from dkdetr.inference.foreign_names import join_attention, pivot_name, recognise
from dkdetr.student.build import build_student
from dkdetr.student_file import STUDENT_SUFFIX, StudentFile, save_student_file

_CLIP_DIM = 512
_MOST_UNKNOWN = 20


@dataclass(frozen=True)
class FileConversion:
    """What a conversion took, left and found missing; `settings` were read off the file."""

    report: ConversionReport
    settings: Mapping[str, Any]

    def lines(self) -> list[str]:
        """Returns the report for people: every reason with its count and an example.

        Unknown tensors are named, for nobody has decided that they may be left.
        """
        report = self.report
        lines = [f"layout: {report.layout}", f"used: {len(report.used)} tensors"]
        lines += [f"setting from the file: {key} = {value}" for key, value in self.settings.items()]
        reasons = Counter(_kind(reason) for reason in report.ignored.values())
        for reason, count in reasons.most_common():
            example = next(key for key, why in report.ignored.items() if _kind(why) == reason)
            lines.append(f"ignored: {count} ({reason}), e.g. {example}")
        unknown = [key for key, why in report.ignored.items() if why == UNKNOWN]
        lines += [f"unknown: {key}" for key in unknown[:_MOST_UNKNOWN]]
        if len(unknown) > _MOST_UNKNOWN:
            lines.append(f"unknown: {len(unknown) - _MOST_UNKNOWN} more (--json FILE has them all)")
        parts = Counter(".".join(name.split(".")[:2]) for name in report.missing)
        lines += [f"keeps its start: {part} ({count} tensors)" for part, count in parts.items()]
        return lines + [f"warning: {warning}" for warning in report.warnings]

    def as_json(self) -> dict[str, Any]:
        """Returns every tensor's fate as a plain table."""
        return self.report.as_json() | {"settings": dict(self.settings)}


def convert_file(
    source: Path,
    out: Path,
    experiment: str,
    overrides: Sequence[str],
    *,
    protocol: Protocol,
    vocabulary_path: Path | None,
) -> FileConversion:
    """Writes the student file of another project's weights; returns what became of each tensor.

    The file holds the tensors that were taken and no others: a training that starts from it makes
    the rest itself, by its own seed.

    Args:
        source: see `take_over`.
        out: ends in `.safetensors`.
        experiment: whose student it becomes: a shipped name or a TOML file.
        overrides: `a.b=c` settings; `student.neck_bias` is read off the file.
        protocol: see `take_over`.
        vocabulary_path: the names and embeddings that the weights' classifier was trained with.

    Raises:
        DkdetrError: see `take_over`, `load_experiment` and `load_vocabulary`.
    """
    if out.suffix != STUDENT_SUFFIX:
        raise UsageError(f"'{out}': a student file's name ends in {STUDENT_SUFFIX}")
    foreign = read_tensors(source)
    settings: dict[str, Any] = {}
    text_dim = _CLIP_DIM
    layout = recognise(list(foreign))
    if layout is not None:
        renamed = {pivot_name(key, layout): key for key in join_attention(foreign)[0]}
        if layout != "resnet50":
            settings["student.neck_bias"] = "input_proj.0.0.bias" in renamed
        if layout == "opera" and "class_embed.0.weight" in renamed:
            text_dim = len(foreign[str(renamed["class_embed.0.weight"])])
    derived = [f"{key}={str(value).lower()}" for key, value in settings.items()]
    config = load_experiment(experiment, [*derived, *overrides]).config
    vocabulary = None
    if vocabulary_path is not None:
        vocabulary = load_vocabulary(vocabulary_path)
        if layout == "opera" and vocabulary.embed_dim != text_dim:
            raise MismatchError(
                f"'{vocabulary_path}' has embeddings of {vocabulary.embed_dim} numbers, the "
                f"weights' classifier speaks {text_dim}: it was trained with another teacher"
            )
        text_dim = vocabulary.embed_dim
    torch.manual_seed(config.seed)
    student = build_student(config, text_dim=text_dim, load_weights=False)
    report = take_over(source, foreign, student, protocol=protocol)
    state: dict[str, Tensor] = student.state_dict()
    save_student_file(
        out,
        StudentFile(
            tensors={name: state[name] for name in state if name not in report.missing},
            config=config,
            vocabulary=vocabulary,
            provenance={
                "source": source.name,
                "layout": report.layout,
                "saw_boxes_of": report.saw_boxes_of,
                "warnings": list(report.warnings),
            },
        ),
    )
    return FileConversion(report, settings)


def _kind(reason: str) -> str:
    return reason.partition(" '")[0]
