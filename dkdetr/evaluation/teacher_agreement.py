"""How well a student's features agree with the teacher's embeddings of the same regions.

Three measures, each a mean over regions (method A.6, C.2), all within an image:

- margin: cosine to the region's own embedding less the mean cosine to those of the image's other
  regions. SKD pushes features away from what all embeddings share, so the cosine alone says little.
- relation KL: KL(teacher's row || student's row) of the similarities to all regions of the image,
  itself included, divided by a temperature, by softmax: what RKD minimises; 0 is agreement.
- rank correlation: Spearman's, between the student's and the teacher's similarities to the image's
  other regions; 1 is the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax
from scipy.stats import rankdata

from dkdetr.evaluation.protocols import in_group_order
from dkdetr.evaluation.scored_weights import ScoredWeights

NO_OBJECT = "no object"
TEMPERATURE = 0.2
"""The paper's for RKD; the same for every run, so that runs can be compared."""


@dataclass(frozen=True)
class GroupAgreement:
    """A group's means over its regions; NaN where no image has enough regions for a measure."""

    group: str
    num_regions: int
    cosine: float
    margin: float
    relation_kl: float
    rank_correlation: float


@dataclass(frozen=True)
class TeacherAgreement:
    """A run's agreement: through which queries, on which images, by group (`all` first).

    `weights`: of which weights; None where a file of before does not say.
    """

    queries: str
    split: str
    held_out: bool
    num_images: int
    groups: tuple[GroupAgreement, ...]
    weights: ScoredWeights | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns plain data; NaN as null, the weights by the keys of `metrics.json`."""
        groups = [
            {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in vars(g).items()}
            for g in self.groups
        ]
        described = {key: value for key, value in vars(self).items() if key != "weights"}
        weights = {} if self.weights is None else self.weights.as_json()
        return described | weights | {"groups": groups}

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> "TeacherAgreement":
        """Returns what `as_json` described."""
        return cls(
            queries=described["queries"],
            split=described["split"],
            held_out=described["held_out"],
            num_images=described["num_images"],
            groups=tuple(_with_nan(group) for group in described["groups"]),
            weights=ScoredWeights.from_json(described),
        )

    def lines(self) -> list[str]:
        """Returns a small table for people."""
        head = f"{'group':12s} regions  cosine  margin      KL  rank"
        rows = [
            f"{g.group:12s} {g.num_regions:7d} {g.cosine:7.3f} {g.margin:7.3f} "
            f"{g.relation_kl:7.4f} {g.rank_correlation:5.2f}"
            for g in self.groups
        ]
        where = "held-out" if self.held_out else "TRAINING (not held out)"
        title = f"agreement with the teacher, {self.queries}, on {self.num_images} {where} images"
        return [f"{title} of {self.split}", head, *rows]


def agreement_by_group(
    student: Float[np.ndarray, "num_regions embed_dim"],
    teacher: Float[np.ndarray, "num_regions embed_dim"],
    image: Int[np.ndarray, "num_regions"],
    groups: Sequence[str],
    *,
    temperature: float = TEMPERATURE,
) -> tuple[GroupAgreement, ...]:
    """Returns the measures of all regions and of each group, which a region's own row decides.

    Args:
        student: features, of any norm but 0.
        teacher: embeddings of the same regions.
        image: which image a region is of; relations reach no further.
        groups: one a region.
        temperature: of the relations' softmax.
    """
    student = student / np.linalg.norm(student, axis=1, keepdims=True)
    teacher = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    measured = np.full((len(student), 4), np.nan)
    for number in np.unique(image):
        rows = np.flatnonzero(image == number)
        measured[rows] = _measure_image(student[rows], teacher[rows], temperature)
    named = np.array(groups, dtype=object)
    there = in_group_order(groups)
    picks = [("all", np.ones(len(student), dtype=bool)), *((g, named == g) for g in there)]
    return tuple(
        GroupAgreement(group, int(rows.sum()), *_means(measured[rows])) for group, rows in picks
    )


def _with_nan(group: dict[str, Any]) -> GroupAgreement:
    fields: dict[str, Any] = {k: math.nan if v is None else v for k, v in group.items()}
    return GroupAgreement(**fields)


def _measure_image(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    """Returns cosine, margin, KL and rank correlation of each region of an image."""
    count = len(student)
    across = student @ teacher.T
    own = np.diagonal(across)
    measured = np.full((count, 4), np.nan)
    measured[:, 0] = own
    if count < 2:
        return measured
    measured[:, 1] = own - (across.sum(axis=1) - own) / (count - 1)
    theirs, ours = teacher @ teacher.T, student @ student.T
    log_theirs = log_softmax(theirs / temperature, axis=1)
    log_ours = log_softmax(ours / temperature, axis=1)
    measured[:, 2] = (np.exp(log_theirs) * (log_theirs - log_ours)).sum(axis=1)
    if count > 2:
        others = ~np.eye(count, dtype=bool)
        measured[:, 3] = _row_correlation(
            ours[others].reshape(count, -1), theirs[others].reshape(count, -1)
        )
    return measured


def _row_correlation(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Returns Spearman's coefficient of each row; NaN where one side has but one rank."""
    a, b = rankdata(ours, axis=1), rankdata(theirs, axis=1)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norms = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    products = (a * b).sum(axis=1)
    return np.divide(products, norms, out=np.full(len(a), np.nan), where=norms > 0)


def _means(measured: np.ndarray) -> list[float]:
    return [
        float(np.mean(kept)) if len(kept := column[~np.isnan(column)]) else float("nan")
        for column in measured.T
    ]
