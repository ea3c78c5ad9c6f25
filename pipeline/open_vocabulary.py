"""Where words meet the teacher's text tower: vocabularies of names, detectors that take words."""

from collections.abc import Sequence
from pathlib import Path

from dkdetr.data.annotations import Category
from dkdetr.data.prompts import prompt_set
from dkdetr.data.vocabulary import (
    Vocabulary,
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
)
from dkdetr.data.vocabulary_check import VocabularyDescription, describe_vocabulary
from dkdetr.engine.distributed import pick_device
from dkdetr.engine.run_folder import newest_run
from dkdetr.engine.subject import load_subject
from dkdetr.errors import DataError, UsageError
from dkdetr.evaluation.detect import Precision
from dkdetr.inference.predict import DKDETR, words_vocabulary
from dkdetr.structures import TextEncoder
from pipeline.teacher import load_teacher


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
        model: a run, a checkpoint or a student file; None: the newest run below `runs`.
        words: names parted by commas; embedded by the teacher.
        vocabulary_path: a vocabulary file instead; with neither, the student's own names.
        teacher: the specification of the text tower; None: the one the student learned from.
        device: see `pick_device`.
        precision: see `dkdetr.evaluation.detect.autocast`.
        compiled: see `dkdetr.evaluation.compiled`.

    Raises:
        DkdetrError: nothing to load, or a vocabulary of another teacher.
    """
    if words is not None and vocabulary_path is not None:
        raise UsageError("give words (-c) or a vocabulary (--vocab), not both")
    place = model or newest_run(Path("runs"))
    if place is None:
        raise DataError("no run below 'runs/'; name a student with --model")
    given = load_vocabulary(vocabulary_path) if vocabulary_path else None
    subject = load_subject(place, given)
    chosen = pick_device(device)
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
    spec = teacher or subject.provenance.get("teacher_spec")
    if spec is None:
        raise UsageError(
            f"'{subject.path}' does not say whose text tower made its embeddings "
            f"({subject.vocabulary.teacher}): name it with --teacher"
        )
    encoder = load_teacher(spec, chosen)
    spoken = words_vocabulary(words.split(","), encoder, subject.vocabulary.prompts)
    return detector, detector.resolve(spoken)


def build_vocabulary_file(
    names: Path, out: Path, teacher: str, prompts: str, device: str
) -> VocabularyDescription:
    """Writes the vocabulary of a list of names; returns its description with its doubts.

    Raises:
        DkdetrError: no such list, an empty or a doubtful one, or no such teacher.
    """
    entries = read_names(names)
    templates = prompt_set(prompts).templates
    vocabulary = embed_names(entries, templates, load_teacher(teacher, pick_device(device)))
    save_vocabulary(vocabulary, out)
    return describe_vocabulary(vocabulary)


def read_names(path: Path) -> list[tuple[str, ...]]:
    """Returns the entries of a list: a line is a name, or a name and its synonyms, by commas.

    Empty lines and lines that begin with # are left out.

    Raises:
        DataError: no such file, no UTF-8, no name in it, or a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no list of names '{path}'") from None
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text: {error.reason}") from None
    entries: list[tuple[str, ...]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = tuple(word.strip() for word in line.split(",") if word.strip())
        if not words or line.lstrip().startswith("#"):
            continue
        if words[0] in seen:
            raise DataError(f"'{path}' names '{words[0]}' twice: lines {seen[words[0]]}, {number}")
        seen[words[0]] = number
        entries.append(words)
    if not entries:
        raise DataError(f"'{path}' holds no name")
    return entries


def embed_names(
    entries: Sequence[tuple[str, ...]], templates: Sequence[str], encoder: TextEncoder
) -> Vocabulary:
    """Returns the vocabulary of names, each with its synonyms; ids from 1 in their order."""
    categories = [
        Category(category_id=number, name=entry[0], frequency="", is_base=True)
        for number, entry in enumerate(entries, start=1)
    ]
    synonyms = {name: words for name, *words in entries}
    return build_vocabulary(categories, templates, encoder, synonyms=synonyms)
