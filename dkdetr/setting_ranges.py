"""Which values the numeric settings may have; `experiment_file` refuses any other.

Those that are annotated with a range of their own (`Positive`, `Fraction`, ...) are not here;
finite they must be, too.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dkdetr.config import ExperimentConfig

_Range = tuple[str, Callable[[float], bool]]

_POSITIVE: _Range = ("above 0", lambda value: value > 0)
_NOT_NEGATIVE: _Range = ("0 or above", lambda value: value >= 0)
_AT_LEAST_ONE: _Range = ("1 or above", lambda value: value >= 1)
_SHARE: _Range = ("from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_ONE: _Range = ("from 0 to below 1", lambda value: 0 <= value < 1)
_ANY: _Range = ("a finite number", lambda value: True)

RANGES: Mapping[str, _Range] = {
    "seed": _NOT_NEGATIVE,
    "checkpoint_every_s": _NOT_NEGATIVE,
    "student.backbone.frozen_stages": ("from 0 to 5", lambda value: 0 <= value <= 5),
    "student.backbone.width": _AT_LEAST_ONE,
    "student.backbone.stages": ("from 2 to 5", lambda value: 2 <= value <= 5),
    "student.backbone.extra_levels": _NOT_NEGATIVE,
    "student.embed_dim": _AT_LEAST_ONE,
    "student.num_heads": _AT_LEAST_ONE,
    "student.num_points": _AT_LEAST_ONE,
    "student.ffn_dim": _AT_LEAST_ONE,
    "student.dropout": _BELOW_ONE,
    "student.num_encoder_layers": _NOT_NEGATIVE,
    "student.num_decoder_layers": _AT_LEAST_ONE,
    "student.num_queries": _AT_LEAST_ONE,
    "classifier.temperature": _POSITIVE,
    "classifier.bias_init": _ANY,
    "detection.cost_class": _NOT_NEGATIVE,
    "detection.cost_bbox": _NOT_NEGATIVE,
    "detection.cost_giou": _NOT_NEGATIVE,
    "detection.weight_class": _NOT_NEGATIVE,
    "detection.weight_bbox": _NOT_NEGATIVE,
    "detection.weight_giou": _NOT_NEGATIVE,
    "detection.focal_alpha": _SHARE,
    "detection.focal_gamma": _NOT_NEGATIVE,
    "kd.skd.bias": _ANY,
    "optim.lr": _POSITIVE,
    "optim.slow_lr_factor": _NOT_NEGATIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.betas": _BELOW_ONE,
    "optim.clip_norm": _POSITIVE,
    "optim.warmup_iterations": _NOT_NEGATIVE,
    "optim.warmup_ratio": _SHARE,
    "optim.epochs": _AT_LEAST_ONE,
    "optim.lr_drop_epochs": _NOT_NEGATIVE,
    "optim.lr_drop_factor": _POSITIVE,
    "optim.ema_decay": _BELOW_ONE,
    "data.batch_size": _AT_LEAST_ONE,
    "data.workers": _NOT_NEGATIVE,
    "data.repeat_threshold": _SHARE,
    "data.image_size": ("32 or above", lambda value: value >= 32),
    "data.scale_range": _POSITIVE,
    "data.flip_probability": _SHARE,
    "compute.micro_batches": _AT_LEAST_ONE,
    "compute.rank_timeout_s": _POSITIVE,
    "eval.max_detections": _AT_LEAST_ONE,
    "eval.batch_size": _AT_LEAST_ONE,
}
"""By dotted path; a setting that holds several numbers wants it of each."""


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond any float
        return False


def range_problem(config: ExperimentConfig, flat: Mapping[str, Any]) -> str | None:
    """Returns `'a.b' must be ..., got ...` of the first setting out of range, or None."""
    for path, value in flat.items():
        words, fits = RANGES.get(path, _ANY)
        several: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
        numbers = [each for each in several if isinstance(each, int | float)]
        if not all(_is_finite(number) and fits(number) for number in numbers):
            return f"'{path}' must be {words}, got {value!r}"
    stages = config.student.backbone.stages
    if not stages or sorted(set(stages)) != list(stages):
        return f"'student.backbone.stages' must rise, from one stage on, got {stages!r}"
    low, high = config.data.scale_range
    if low > high:
        return f"'data.scale_range' must be (least, most), got {config.data.scale_range!r}"
    return None
