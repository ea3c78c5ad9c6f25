"""What the small teacher reads: captions from templates, and a vocabulary as small as they are.

CLIP's own vocabulary has 49,408 rows, more than all the rest of a small model. open_clip's
tokenizer reads its merges from a file, so a file of about two thousand merges gives a vocabulary
in which every word of the captions is one token, and any other word is spelled out.
"""

import gzip
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import regex

_TEMPLATES = (
    "{article} {}",
    "{}",
    "the {}",
    "a photo of {article} {}",
    "a photo of {article} {}.",
    "This is {article} {}.",
    "This is a photo of {article} {}.",
    "This is a photo of the {}.",
    "This is a photo of {article} {} in the scene.",
    "There is {article} {} in the scene.",
    "There is the {} in the scene.",
    "itap of my {}.",
    "itap of {article} {}.",
    "a drawing of {article} {}",
    "a pictogram of {article} {}",
    "a picture of the {}",
    "an icon that shows {article} {}",
    "{article} {} on a background",
    "a {} in a video game.",
    "art of the {}.",
    "a {adjective} photo of the {}.",
    "This is a {adjective} photo of {article} {}.",
    "a photo of the {kind} {}.",
    "This is a photo of a {kind} {}.",
    "This is a {adjective} {}.",
)
_ADJECTIVES = (
    "good", "bad", "bright", "dark", "cropped", "blurry", "pixelated", "black and white",
    "low resolution", "close-up", "jpeg corrupted", "origami", "plastic", "toy", "cartoon",
)  # fmt: skip
_KINDS = ("nice", "cool", "weird", "small", "large", "clean", "dirty", "hard to see")
_OTHER_WORDS = "one many plushie embroidered painting an image of picture with and my his her"

# The pattern by which open_clip's tokenizer cuts a text into words.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
_END = "</w>"


def caption(name: str, generator: np.random.Generator) -> str:
    """Returns a sentence about a name, from a template drawn at random."""
    template = _TEMPLATES[generator.integers(len(_TEMPLATES))]
    return _fill(
        template,
        name,
        adjective=_ADJECTIVES[generator.integers(len(_ADJECTIVES))],
        kind=_KINDS[generator.integers(len(_KINDS))],
    )


def plain_captions(names: Sequence[str]) -> list[list[str]]:
    """Returns a few fixed sentences for every name, for measuring."""
    return [
        [
            _fill(template, name)
            for template in ("a photo of {article} {}.", "This is {article} {}.")
        ]
        for name in names
    ]


def merges_file(names: Iterable[str]) -> bytes:
    """Returns a gzip file of merges by which every word of the names' captions is one token.

    The form is that of CLIP's own file: a first line for people, then a merge a line. The same
    names give the same bytes.
    """
    # No line end after the last merge: open_clip would take the empty rest for a merge.
    text = "\n".join(["pictogram captions: byte pair merges", *_merges(_words(names))])
    return gzip.compress(text.encode(), mtime=0)


def _fill(template: str, name: str, *, adjective: str = "", kind: str = "") -> str:
    article = "an" if name[:1].lower() in {"a", "e", "i", "o", "u"} else "a"
    filled = template.replace("{article}", article).replace("{adjective}", adjective)
    return filled.replace("{kind}", kind).replace("{}", name)


def _words(names: Iterable[str]) -> Counter[str]:
    texts = [*names, *_TEMPLATES, *_ADJECTIVES, *_KINDS, _OTHER_WORDS]
    words: Counter[str] = Counter()
    for text in texts:
        bare = text
        for place in ("{article}", "{adjective}", "{kind}", "{}"):
            bare = bare.replace(place, " ")
        words.update(_WORD.findall(bare.lower()))
    return words


def _merges(words: Counter[str]) -> list[str]:
    """Returns byte pair merges, commonest pair first, until every ASCII word is whole."""
    pieces = {word: [*word[:-1], word[-1] + _END] for word in sorted(words) if word.isascii()}
    merges: list[str] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(" ".join(best))
        for word, parts in pieces.items():
            pieces[word] = _join(parts, best)


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        # As the tokenizer does: left to right, a part is used once.
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined
