"""From boxes to the teacher's view of them: windows, views, and one vector a box.

The default crop (method B.4): the box, and the box grown 1.5 times about its centre, each clamped
to the picture, rounded outward to whole pixels and squashed to the teacher's input size; the two
unit embeddings are averaged and normalised again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, cast, get_args

import numpy as np
from jaxtyping import Float, Int

from dkdetr.errors import UsageError
from pipeline.window_fit import Placement

_MIN_SIDE = 2
_MAX_SCALE = 10.0

CropMode = Literal["squash", "clip_center", "pad_square", "context_square", "native"]
Combine = Literal["mean", "sum"]
_COMBINED: dict[Combine, str] = {
    "mean": "mean of unit vectors, normalised",
    "sum": "sum of features, normalised",
}
Views = Literal["orig", "orig,flip", "avg"]


@dataclass(frozen=True)
class CropRule:
    """How a box becomes what the teacher sees.

    Modes: `squash` ignores the aspect ratio, so that the whole box is seen; `clip_center` is CLIP's
    own preprocessing (short side to size, centre cut), which shows a 4:1 box's central quarter;
    `pad_square` keeps the ratio and fills up with the teacher's mean colour; `context_square` sees
    the box within a square of 8 times its area (OADP), moved into the picture; `native` is one of
    the first three, as the teacher's own preprocessing has it.

    Combination of a box's vectors: `mean` of unit vectors, or the plain `sum` of the teacher's
    features (DetPro, ViLD); both normalised at the end.

    Views: `orig`; `orig,flip` keeps a second vector of the mirrored crop for mirrored training
    views; `avg` averages the two.
    """

    mode: CropMode = "squash"
    scales: tuple[float, ...] = (1.0, 1.5)
    combine: Combine = "mean"
    views: Views = "orig"

    @property
    def placement(self) -> Placement:
        """How a window is fitted into the teacher's input."""
        assert self.mode != "native", "a native rule is resolved by the teacher"
        return "squash" if self.mode == "context_square" else self.mode

    @property
    def views_per_box(self) -> int:
        """How many crops a box gives at each scale."""
        return 1 if self.views == "orig" else 2

    def parts(self) -> dict[str, Any]:
        """Returns the rule as the cache's fingerprint records it."""
        return {
            "mode": self.mode,
            "scales": list(self.scales),
            "combine": _COMBINED[self.combine],
            "views": self.views,
            "clamp": "to the picture",
            "rounding": "outward",
            "min_side": _MIN_SIDE,
        }


def rule_from_parts(parts: Mapping[str, Any]) -> CropRule:
    """Returns the rule that `CropRule.parts` recorded in a cache."""
    combine = next(word for word, told in _COMBINED.items() if told == parts["combine"])
    scales = tuple(parts["scales"])
    return CropRule(parts["mode"], scales, cast("Combine", combine), parts["views"])


def parse_crop_rule(
    mode: str, scales: str = "1.0,1.5", combine: str | None = None, views: str = "orig"
) -> CropRule:
    """Returns the rule that the command line's words name.

    Args:
        mode: one of `CropMode`, or `vild`: clip_center with the plain sum, as DetPro's caches have.
        scales: factors of the box's sides, with commas between them.
        combine: `mean` or `sum`; None: mean, and sum for `vild`.
        views: one of `Views`.

    Raises:
        UsageError: says which word, and what may stand there.
    """
    if mode == "vild":
        if combine == "mean":
            raise UsageError(
                "--crop-mode vild means --crop-combine sum; for the mean of unit vectors give "
                "--crop-mode clip_center"
            )
        mode, combine = "clip_center", "sum"
    try:
        factors = tuple(float(word) for word in scales.split(","))
    except ValueError:
        factors = ()
    fine = all(isfinite(factor) and 0 < factor <= _MAX_SCALE for factor in factors)
    if not factors or not fine or len(set(factors)) < len(factors):
        raise UsageError(
            f"--crop-scales {scales}: give different factors above 0 and at most {_MAX_SCALE:g}, "
            "with commas, for example 1.0,1.5"
        )
    chosen = (("--crop-mode", mode, CropMode), ("--crop-combine", combine or "mean", Combine),
              ("--views", views, Views))  # fmt: skip
    for option, word, kind in chosen:
        if word not in get_args(kind):
            more = " or vild" if option == "--crop-mode" else ""
            known = " | ".join(get_args(kind))
            raise UsageError(f"{option} {word}: choose one of {known}{more}")
    return CropRule(
        cast("CropMode", mode), factors, cast("Combine", combine or "mean"), cast("Views", views)
    )


def crop_windows(
    boxes_xyxy: Float[np.ndarray, "num_boxes 4"], rule: CropRule, *, height: int, width: int
) -> Int[np.ndarray, "num_boxes num_scales 4"]:
    """Returns (left, top, right, bottom) in whole pixels of every box at every scale.

    Windows lie in the picture and are at least 2 pixels (or the whole picture) in each direction.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 1, 4)
    scales = np.asarray(rule.scales, dtype=np.float64)[None, :, None]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    half = (boxes[..., 2:] - boxes[..., :2]).clip(min=0) / 2 * scales
    limit = np.array([width, height])
    if rule.mode == "context_square":
        # Half the side of a square of 8 w h, no greater than the picture, moved into it.
        half = np.sqrt(8 * half.prod(axis=-1, keepdims=True)).repeat(2, axis=-1)
        half = np.minimum(half, limit / 2)
        centre = np.clip(centre, half, limit - half)
    # A hair inward before rounding outward: 10.000001 from float32 arithmetic is pixel 10, not 11.
    low = np.floor((centre - half).clip(0, limit) + 1e-3).astype(np.int64)
    high = np.ceil((centre + half).clip(0, limit) - 1e-3).astype(np.int64)
    least = np.minimum(_MIN_SIDE, limit)
    low = np.minimum(low, limit - least)
    high = np.maximum(high, low + least)
    return np.concatenate((low, high), axis=-1)


def combine_crops(
    features: Float[np.ndarray, "num_boxes num_crops embed_dim"], combine: Combine = "mean"
) -> Float[np.ndarray, "num_boxes embed_dim"]:
    """Returns one unit vector a box from the features of its crops."""
    rows = features.astype(np.float32)
    if combine == "mean":
        rows = unit_rows(rows)
    return unit_rows(rows.sum(axis=1))


def unit_rows(features: Float[np.ndarray, "*shape embed_dim"]) -> np.ndarray:
    """Returns the vectors at length 1."""
    return features / np.linalg.norm(features, axis=-1, keepdims=True).clip(min=1e-12)
