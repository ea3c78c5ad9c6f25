"""A row against the baseline, name by name: how far a difference of few seeds can be trusted.

A group's AP is the mean over its names. Where seeds are few, the spread of the difference over
names says whether most names moved or a few did; it says nothing about other seeds.
"""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dkdetr.data.split_sources import Protocol
from dkdetr.evaluation.protocols import GROUP_KEYS

GroupScores = Mapping[str, Mapping[str, float]]
"""AP in [0, 1] by column of the table (`APr`, `AP50_novel`) and category id."""

_SCORE: Mapping[Protocol, str] = {"lvis": "AP", "ovcoco": "AP50"}


def read_group_scores(path: Path, protocol: Protocol) -> dict[str, dict[str, float]]:
    """Returns the scores in a `per_category.csv`; empty for a protocol without groups.

    Names without an object to find have no score.
    """
    if protocol not in _SCORE:
        return {}
    column_of = {group: column for column, group in GROUP_KEYS[protocol].items()}
    scores: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            value, column = line[_SCORE[protocol]], column_of.get(line["group"])
            if value and column is not None:
                scores.setdefault(column, {})[line["category_id"]] = round(float(value), 5)
    return scores


@dataclass(frozen=True)
class NameDifference:
    """The mean over names of a row's AP less the baseline's, its standard error, the names."""

    mean: float
    error: float
    names: int


def difference_by_name(
    pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> NameDifference | None:
    """Returns what a group's names gained; None if fewer than two are scored everywhere.

    Args:
        pairs: for each seed, the row's and the baseline's scores by name. A name's difference is
            its mean over the seeds.
    """
    if not pairs:
        return None
    names = set.intersection(*(set(scores) for pair in pairs for scores in pair))
    if len(names) < 2:
        return None
    moved = [
        statistics.fmean(ours[name] - theirs[name] for ours, theirs in pairs)
        for name in sorted(names)
    ]
    error = statistics.stdev(moved) / math.sqrt(len(moved))
    return NameDifference(statistics.fmean(moved), error, len(moved))
