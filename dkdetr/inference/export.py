"""A student to share: weights without what only training needs, and a card that says what it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkdetr.atomic_file import write_text
from dkdetr.config import ExperimentConfig, Precision
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.data.vocabulary_check import thresholds_in_words
from dkdetr.defaults import DEFAULT_THRESHOLD
from dkdetr.evaluation.scored_weights import WEIGHTS_KEY, strange_precision, strange_words
from dkdetr.experiment_file import config_hash
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import TRAINING_ONLY, StudentFile, save_student_file, weights_hash

# What a card and a file may say of a run: no path, no host, no command line.
_TOLD = (
    "experiment", "cache_fingerprint", "teacher", "teacher_spec", "random_teacher", "train_split",
    "averaged", "torch", "saw_boxes_of",
)  # fmt: skip
_SHOWN_SCORES = (
    "AP", "AP50", "AP75", "APr", "APc", "APf", "AP50_novel", "AP50_base", "AP50_all",
    "segm.AP", "segm.APr", "segm.APc", "segm.APf",
)  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """Scores on file that are not the card's: why, in words, and of which split, if it says so."""

    line: str
    split: str | None


@dataclass(frozen=True)
class Exported:
    """The files that were written, and which scores on file are not the card's."""

    weights: Path
    card: Path
    left_out: tuple[LeftOut, ...]


def export_student(
    path: Path,
    student: DKDETR,
    config: ExperimentConfig,
    vocabulary: Vocabulary,
    provenance: Mapping[str, Any],
    *,
    scores: Sequence[Path],
) -> Exported:
    """Returns the student file and its model card, NAME.safetensors and NAME.md.

    KD and denoising queries stay behind. `dkdetr eval`, `--set student.weights=FILE` and `dkdetr
    export` read the file.

    Args:
        path: the file to write.
        student: in evaluation mode.
        config: what it was trained with.
        vocabulary: travels along, with its thresholds, so that no CLIP is needed to score.
        provenance: of the run; what it says of places and machines is left out.
        scores: folders of evaluations; the numbers of those that were of these very weights, asked
            as `dkdetr eval` does without options, go on the card; of others a line says why not.
    """
    tensors = {k: v for k, v in student.state_dict().items() if not k.startswith(TRAINING_ONLY)}
    told = {key: provenance[key] for key in _TOLD if provenance.get(key) not in (None, "")}
    if "train_split" in told:
        told["train_split"] = _without_folders(told["train_split"])
    if str(told.get("teacher_spec", "")).partition(":")[2].startswith("/"):
        # A file of this machine; who has it names it with --teacher. Its hash is in `teacher`.
        del told["teacher_spec"]
    save_student_file(path, StudentFile(tensors, config, vocabulary, told))
    card = path.with_suffix(".md")
    num_parameters = sum(parameter.numel() for parameter in student.parameters())
    own = _Own(weights_hash(student), vocabulary.hash, config.optim.precision)
    found, left_out = _scores_of(scores, own)
    write_text(card, _card(path, config, vocabulary, told, num_parameters, found, left_out))
    return Exported(path, card, left_out)


def _card(
    path: Path,
    config: ExperimentConfig,
    vocabulary: Vocabulary,
    told: Mapping[str, Any],
    num_parameters: int,
    scores: Sequence[str],
    left_out: Sequence[LeftOut],
) -> str:
    base = sum(vocabulary.is_base)
    least = thresholds_in_words(vocabulary.thresholds)
    lines = [
        "---",
        "library_name: dkdetr",
        "pipeline_tag: object-detection",
        "tags: [object-detection, open-vocabulary, knowledge-distillation, deformable-detr]",
        "---",
        f"# {path.stem}",
        "",
        f"A DK-DETR student ({num_parameters / 1e6:.1f} million parameters, "
        f"{'boxes and masks' if config.student.mask_head else 'boxes'}) trained by "
        f"experiment `{config.name}` (settings {config_hash(config)}).",
        "",
        f"* Vocabulary: {len(vocabulary)} names, {base} of them base; other names need text "
        f"embeddings of the same teacher, `{vocabulary.teacher}`.",
        *([f"* `dkdetr predict` goes by {least}; by {DEFAULT_THRESHOLD} of other names."]
          if least else []),
        f"* Input: pictures with their longest side at {config.data.image_size} pixels.",
        "* Trained on boxes of base categories alone; novel names are found by what the teacher "
        "knows of them.",
        *([f"* Weights: running average, decay {config.optim.ema_decay}."]
          if told.get("averaged") else []),
        *([f"* **It began from weights that had seen {told['saw_boxes_of']}.**"]
          if told.get("saw_boxes_of") else []),
        *(["* **The teacher was random: this is a trial, not a detector.**"]
          if told.get("random_teacher") else []),
        "",
        "| made of | |",
        "|---|---|",
        *(f"| {key.replace('_', ' ')} | {value} |" for key, value in told.items()),
        "",
        "## Scores",
        "",
    ]  # fmt: skip
    lines += [f"* {line}" for line in (*scores, *(each.line for each in left_out))]
    if not scores and not left_out:
        lines.append("None were computed before this file was written.")
    lines += ["", "## Use", "", "```", f"dkdetr eval {path.name} --split SPLIT", "```", ""]
    return "\n".join(lines)


def _without_folders(split: str) -> str:
    """Returns a split's name with the last parts alone of the folders that one's own names hold."""
    kind, *places = split.split(":")
    return ":".join((kind, *(Path(place).name for place in places)))


@dataclass(frozen=True)
class _Own:
    """What scores of the file itself are of."""

    weights: str
    vocabulary_hash: str
    precision: Precision


def _scores_of(folders: Sequence[Path], own: _Own) -> tuple[tuple[str, ...], tuple[LeftOut, ...]]:
    """Returns a line with the numbers of every evaluation that is the file's own, and the others.

    The others in words: weights that went on learning, other words or another precision, or of
    before scores said so.
    """
    found: list[str] = []
    others: list[LeftOut] = []
    for folder in folders:
        path = folder / "metrics.json"
        if not path.is_file():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        if (strange := _strange(table, own)) is not None:
            line = f"{folder.name}: the scores on file are {strange}, and were left out"
            others.append(LeftOut(line, table.get("split")))
            continue
        numbers = {k: table[k] for k in _SHOWN_SCORES if isinstance(table.get(k), float)}
        shown = ", ".join(f"{key} {100 * value:.1f}" for key, value in numbers.items())
        asked = "" if table["words"] == "own" else " (asked for the split's own names)"
        found.append(f"{folder.name}: {shown}{asked}")
    return tuple(found), tuple(others)


def _strange(table: Mapping[str, Any], own: _Own) -> str | None:
    """Returns what makes scores another student's than the file's, in words; None: nothing."""
    if WEIGHTS_KEY not in table:
        return "of weights that they do not name"
    if table[WEIGHTS_KEY] != own.weights:
        step = table.get("iteration")
        return "of other weights" if step is None else f"of other weights, those of step {step}"
    return strange_words(table, own.vocabulary_hash) or strange_precision(table, own.precision)
