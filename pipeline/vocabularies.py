"""The vocabulary of a split: its names, base and novel, through the teacher's text tower."""

from typing import Any

import xxhash

from dkdetr.data.splits import Split
from dkdetr.data.vocabulary import Vocabulary, build_vocabulary
from pipeline.teacher import load_teacher
from pipeline.teacher_model import Teacher


def build_split_vocabulary(
    split: Split, teacher_spec: str, templates: tuple[str, ...], *, device: str = "cpu"
) -> Vocabulary:
    """Returns the vocabulary of all of a split's categories, in their order.

    Raises:
        DkdetrError: see `load_teacher` and `build_vocabulary`.
    """
    teacher = load_teacher(teacher_spec, device)
    return build_vocabulary(split.categories, templates, teacher)


def text_parts(
    split: Split, prompts: str, templates: tuple[str, ...], teacher: Teacher
) -> dict[str, Any]:
    """Returns what the text's own fingerprint is made of: of a file, what it says, not its name."""
    names = "\n".join(
        f"{category.category_id} {int(category.is_base)} {category.frequency} {category.name}"
        for category in split.categories
    )
    return {
        "num_names": len(split.categories),
        "names_xxh3_128": xxhash.xxh3_128_hexdigest(names.encode()),
        "prompts": prompts,
        "templates_xxh3_128": xxhash.xxh3_128_hexdigest("\n".join(templates).encode()),
        "teacher": teacher.identity,
        **teacher.text_parts(),
    }
