"""Prompt templates, as data: the sentences into which a category's name is put.

`{}` stands for the name and `{article}` for "a" or "an". A set with `this_is` puts "This is "
before a sentence that would begin with an article.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dkdetr.errors import UsageError

_VILD_PAIRS = (
    "good", "bad", "bright", "dark", "low resolution", "cropped", "close-up", "jpeg corrupted",
    "blurry", "pixelated", "black and white",
)  # fmt: skip
_VILD_KINDS = ("nice", "cool", "weird", "small", "large", "clean", "dirty", "hard to see")
_VILD_THINGS = ("plastic", "toy", "plushie", "cartoon")


@dataclass(frozen=True)
class PromptSet:
    """A named set of templates and where it comes from."""

    name: str
    templates: tuple[str, ...]
    source: str


def _vild_templates() -> tuple[str, ...]:
    """Returns ViLD's 63 sentences; order has no meaning, since embeddings are averaged."""
    scene = ("There is {article} {} in the scene.", "There is the {} in the scene.")
    photo_in_scene = tuple(
        f"This is a photo of {who} {{}} in the scene." for who in ("{article}", "the", "one")
    )
    itap = tuple(f"itap of {who} {{}}." for who in ("{article}", "my", "the"))
    photo = tuple(
        f"This is a photo of {who} {{}}." for who in ("{article}", "my", "the", "one", "many")
    )
    adjective_photo = tuple(
        f"This is a {adjective} photo of {who} {{}}."
        for adjective in _VILD_PAIRS
        for who in ("{article}", "the")
    )
    photo_of_kind = tuple(
        f"This is a photo of {who} {kind} {{}}." for kind in _VILD_KINDS for who in ("a", "the")
    )
    things = tuple(f"This is {who} {thing} {{}}." for thing in _VILD_THINGS for who in ("a", "the"))
    art = (
        "This is an embroidered {}.",
        "This is the embroidered {}.",
        "This is a painting of the {}.",
        "This is a painting of a {}.",
    )
    return (
        *scene, *photo_in_scene, *itap, *photo, *adjective_photo, *photo_of_kind, *things, *art,
    )  # fmt: skip


_SETS = (
    PromptSet("single", ("a photo of {article} {}.",), "Radford et al. 2021, arXiv 2103.00020"),
    PromptSet(
        "clip7",
        (
            "itap of {article} {}.",
            "a bad photo of the {}.",
            "a origami {}.",
            "a photo of the large {}.",
            "a {} in a video game.",
            "art of the {}.",
            "a photo of the small {}.",
        ),
        "the seven-template subset of OpenAI CLIP's notebook Prompt_Engineering_for_ImageNet",
    ),
    PromptSet(
        "vild63",
        _vild_templates(),
        "Gu et al., ViLD (ICLR 2022), arXiv 2104.13921: the sentences of its public demonstration, "
        "tensorflow/tpu, models/official/detection/projects/vild (Apache-2.0), with 'This is'",
    ),
)
PROMPT_SETS: Mapping[str, PromptSet] = MappingProxyType({each.name: each for each in _SETS})


def prompt_set(name: str) -> PromptSet:
    """Returns a set by its name; raises UsageError that lists the known ones."""
    if name not in PROMPT_SETS:
        known = ", ".join(PROMPT_SETS)
        raise UsageError(f"unknown prompts '{name}'; known: {known}, or a file of templates")
    return PROMPT_SETS[name]


def templates_of_sets(names: str) -> tuple[str, ...]:
    """Returns the templates of sets, their names joined by commas; equal ones count once.

    Raises:
        UsageError: an unknown set.
    """
    sets = [prompt_set(name.strip()) for name in names.split(",")]
    return tuple(dict.fromkeys(line for each in sets for line in each.templates))


def read_templates(word: str) -> tuple[str, ...]:
    """Returns the templates of sets, joined by commas, or of a file: one a line, with `{}`.

    Empty lines and lines that begin with # are left out. Equal templates count once.

    Raises:
        UsageError: an unknown set and no such file, no UTF-8, or a line without `{}`.
    """
    path = Path(word)
    if not path.is_file():
        return templates_of_sets(word)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompts '{path}' are not UTF-8 text: {error.reason}") from None
    lines = [line.strip() for line in text.splitlines()]
    found = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    for template in found:
        fill_prompt(template, "name")
    if not found:
        raise UsageError(f"'{path}' holds no template")
    return found


def readable_name(name: str) -> str:
    """Returns a data set's name as people write it: `fire_hydrant` -> fire hydrant.

    A slash becomes "or", as ViLD does. Parentheses stay: without them LVIS's bow, fish, octopus,
    pan and salmon would each stand for two categories.
    """
    return " ".join(name.replace("_", " ").replace("/", " or ").split()).lower().rstrip(".")


def same_reading(names: Iterable[str]) -> list[list[str]]:
    """Returns the groups of names that read the same, each in the names' order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(readable_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def fill_prompt(template: str, name: str) -> str:
    """Returns the sentence that `template` makes of a category's name.

    Raises:
        UsageError: the template has no place `{}` for the name.
    """
    if "{}" not in template:
        raise UsageError(f"the prompt '{template}' has no place {{}} for the name")
    words = readable_name(name)
    article = "an" if words[:1] in {"a", "e", "i", "o", "u"} else "a"
    return template.replace("{article}", article).replace("{}", words)
