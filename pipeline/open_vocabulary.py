"""Where words meet the teacher's text tower: vocabularies of names, detectors that take words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dkdetr.config import Precision
from dkdetr.data.annotations import Category
from dkdetr.data.name_lists import NameEntry, read_entries
from dkdetr.data.prompts import read_templates
from dkdetr.data.vocabulary import (
    Vocabulary,
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
    thresholds_by_name,
)
from dkdetr.data.vocabulary_check import VocabularyDescription, describe_vocabulary
from dkdetr.defaults import DEFAULT_PROMPTS
from dkdetr.encoders import TextEncoder
from dkdetr.engine.distributed import pick_device
from dkdetr.engine.run_folder import require_newest_run
from dkdetr.engine.subject import load_subject
from dkdetr.errors import UsageError
from dkdetr.inference.hub import student_place
from dkdetr.inference.predict import DKDETR, words_vocabulary
from pipeline.teacher import load_teacher
from pipeline.text_bank import Background, import_vocabulary


def load_detector(
    model: Path | None,
    words: str | None,
    vocabulary_path: Path | None,
    teacher: str | None,
    device: str,
    *,
    precision: Precision = "auto",
    compiled: bool = False,
) -> tuple[DKDETR, Vocabulary]:
    """Returns a detector and what it is to look for.

    Args:
        model: a run, a checkpoint, a student file or `owner/name` on the hub; None: the newest run
            below `runs`.
        words: names parted by commas, or @LIST, a shipped list or a file; embedded by the teacher.
        vocabulary_path: a vocabulary file instead; with neither, the student's own names.
        teacher: the specification of the text tower; None: the one the student learned from. Of a
            file that brings no vocabulary it says which one that is.
        device: see `pick_device`.
        precision: see `dkdetr.precision.computing`.
        compiled: see `dkdetr.evaluation.compiled`.

    Raises:
        DkdetrError: nothing to load, or a vocabulary of another teacher.
    """
    if words is not None and vocabulary_path is not None:
        raise UsageError("give words (-c) or a vocabulary (--vocab), not both")
    if teacher is not None and words is None:
        raise UsageError("--teacher is for words (-c): there are none to embed")
    place = student_place(model or require_newest_run("name a student with --model"))
    given = load_vocabulary(vocabulary_path) if vocabulary_path else None
    chosen = pick_device(device)
    fallback: Vocabulary | Callable[[], Vocabulary] | None = given
    if words is not None and teacher is not None:
        fallback = partial(_of_words, words, teacher, chosen)
    subject = load_subject(place, fallback)
    detector = DKDETR(
        subject.student,
        subject.config,
        subject.vocabulary,
        device=chosen,
        precision=precision,
        compiled=compiled,
    )
    if words is None:
        return detector, detector.resolve(given)
    if not subject.brings_vocabulary:
        return detector, subject.vocabulary  # these words
    spec = teacher or subject.provenance.get("teacher_spec")
    if spec is None:
        raise UsageError(
            f"'{subject.path}' does not say whose text tower made its embeddings "
            f"({subject.vocabulary.teacher}): name it with --teacher"
        )
    return detector, detector.resolve(_of_words(words, spec, chosen, subject.vocabulary.prompts))


def _of_words(
    words: str, teacher: str, device: torch.device, prompts: Sequence[str] = ()
) -> Vocabulary:
    """Returns the vocabulary of `load_detector`'s words; without prompts by the usual ones."""
    encoder = load_teacher(teacher, device)
    if not words.startswith("@"):
        return words_vocabulary(words.split(","), encoder, prompts)
    templates = prompts or read_templates(DEFAULT_PROMPTS)
    return embed_entries(read_entries(words[1:]), templates, encoder)


def build_vocabulary_file(
    names: str | Path,
    out: Path,
    teacher: str,
    prompts: str,
    device: str,
    *,
    thresholds: Mapping[str, float] | None = None,
) -> VocabularyDescription:
    """Writes the vocabulary of a list of names; returns its description with its doubts.

    Args:
        names: a shipped list or a file (`dkdetr.data.name_lists`).
        out: the vocabulary's file.
        teacher: the specification of the text tower.
        prompts: see `read_templates`.
        device: where it runs.
        thresholds: least scores of some names, which `predict` then goes by.

    Raises:
        DkdetrError: no such list, an empty or a doubtful one, or no such teacher.
        UsageError: a threshold of none of the names, or beyond 0..1.
    """
    entries, templates = read_entries(names), read_templates(prompts)
    least = thresholds_by_name([entry.name for entry in entries], thresholds or {})
    encoder = load_teacher(teacher, pick_device(device))
    vocabulary = replace(embed_entries(entries, templates, encoder), thresholds=least)
    save_vocabulary(vocabulary, out)
    return describe_vocabulary(vocabulary)


def import_vocabulary_file(
    bank: Path,
    names: str,
    out: Path,
    teacher: str,
    background: Background | None,
    dim: int | None,
    *,
    thresholds: Mapping[str, float] | None = None,
) -> VocabularyDescription:
    """Writes another project's text bank as a vocabulary; returns its description.

    Args:
        bank: .npy, .pt or .pth, either way round, of any norm (`pipeline.text_bank`).
        names: of its rows, in their order: a shipped list or a file.
        out: the vocabulary's file.
        teacher: the identity of what embedded it; a student understands the same one alone.
        background: which row is no name.
        dim: the length of a row, where the sides cannot be told apart.
        thresholds: see `build_vocabulary_file`.

    Raises:
        DkdetrError: no such file, or a bank that does not fit the names.
        UsageError: a threshold of none of the names, or beyond 0..1.
    """
    entries = read_entries(names)
    least = thresholds_by_name([entry.name for entry in entries], thresholds or {})
    vocabulary = import_vocabulary(
        bank, _categories(entries), teacher=teacher, embed_dim=dim, background=background
    )
    vocabulary = replace(vocabulary, thresholds=least)
    save_vocabulary(vocabulary, out)
    return describe_vocabulary(vocabulary)


def embed_entries(
    entries: Sequence[NameEntry], templates: Sequence[str], encoder: TextEncoder
) -> Vocabulary:
    """Returns the vocabulary of names, each with its synonyms."""
    synonyms = {entry.name: entry.synonyms for entry in entries}
    return build_vocabulary(_categories(entries), templates, encoder, synonyms=synonyms)


def _categories(entries: Sequence[NameEntry]) -> list[Category]:
    return [Category(each.category_id, each.name, "", is_base=True) for each in entries]
