"""What to know of a vocabulary before trusting it: names that mean nearly the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dkdetr.data.prompts import same_reading
from dkdetr.data.vocabulary import Vocabulary, in_order_of, thresholds_by_name

NEAR = 0.95
"""Cosine above which two names compete for the same boxes."""
_SHOWN = 20
_SHOWN_IN_FORCE = 5
_BLOCK = 512


@dataclass(frozen=True)
class VocabularyDescription:
    """Names, origin and doubts. `near` holds (name, name, cosine), the closest pair first."""

    names: tuple[str, ...]
    num_base: int
    teacher: str
    prompts: tuple[str, ...]
    hash: str
    near: tuple[tuple[str, str, float], ...]
    merged: tuple[tuple[str, ...], ...]
    """Names that read the same once underscores, case and slashes are gone."""
    thresholds: Mapping[str, float]

    def lines(self) -> list[str]:
        """Returns the description for people."""
        shown = ", ".join(self.names[:_SHOWN])
        more = f" and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        lines = [
            f"names: {len(self.names)} ({self.num_base} base): {shown}{more}",
            f"teacher: {self.teacher}",
            f"prompts: {len(self.prompts)}, e.g. '{self.prompts[0]}'" if self.prompts else "",
            f"hash: {self.hash[:16]}",
            thresholds_in_words(self.thresholds),
        ]
        return [line for line in lines if line] + self.warnings()

    def warnings(self) -> list[str]:
        """Returns the doubts alone, a line each."""
        lines = [f"warning: {' and '.join(group)} read the same" for group in self.merged]
        lines += [
            f"warning: '{first}' and '{second}' are near-duplicates (cosine {cosine:.3f})"
            for first, second, cosine in self.near[:_SHOWN]
        ]
        if len(self.near) > _SHOWN:
            lines.append(f"warning: {len(self.near) - _SHOWN} more pairs above {NEAR}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Returns everything as a plain table."""
        return vars(self)


def describe_vocabulary(vocabulary: Vocabulary) -> VocabularyDescription:
    """Returns a vocabulary's description, with every pair of names above cosine 0.95."""
    return VocabularyDescription(
        names=vocabulary.names,
        num_base=sum(vocabulary.is_base),
        teacher=vocabulary.teacher,
        prompts=vocabulary.prompts,
        hash=vocabulary.hash,
        near=_near_pairs(vocabulary),
        merged=tuple(tuple(group) for group in same_reading(vocabulary.names)),
        thresholds=in_order_of(vocabulary.names, vocabulary.thresholds),
    )


def thresholds_in_words(thresholds: Mapping[str, float]) -> str:
    """Returns a line on the least scores of some names; "" where there are none."""
    return f"least scores: {_scores(thresholds, _SHOWN)}" if thresholds else ""


def thresholds_in_force(vocabulary: Vocabulary, typed: Mapping[str, float]) -> str:
    """Returns a line on the vocabulary's own least scores, where none is typed for all names.

    "" where it has none, or each gives way to one that is typed.

    Args:
        vocabulary: what is looked for.
        typed: least scores by name, which come before its own.

    Raises:
        UsageError: one is of none of the names, or no score.
    """
    given = thresholds_by_name(vocabulary.names, typed)
    ordered = in_order_of(vocabulary.names, vocabulary.thresholds)
    own = {name: least for name, least in ordered.items() if name not in given}
    return f"least scores of the vocabulary: {_scores(own, _SHOWN_IN_FORCE)}" if own else ""


def _scores(thresholds: Mapping[str, float], most: int) -> str:
    shown = ", ".join(f"{name} {least:g}" for name, least in list(thresholds.items())[:most])
    return shown + (f" and {len(thresholds) - most} more" if len(thresholds) > most else "")


def _near_pairs(vocabulary: Vocabulary) -> tuple[tuple[str, str, float], ...]:
    rows = vocabulary.embeddings
    pairs: list[tuple[str, str, float]] = []
    for start in range(0, len(rows), _BLOCK):
        similarity = rows[start : start + _BLOCK] @ rows.T
        first, second = np.nonzero(similarity > NEAR)
        for a, b in zip((first + start).tolist(), second.tolist(), strict=True):
            if a < b:
                cosine = float(similarity[a - start, b])
                pairs.append((vocabulary.names[a], vocabulary.names[b], cosine))
    return tuple(sorted(pairs, key=lambda pair: -pair[2]))
