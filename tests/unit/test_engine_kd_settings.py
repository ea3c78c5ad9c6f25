"""No setting of `kd` is an ornament: each one changes a step, or is shown to act elsewhere."""

from collections.abc import Mapping
from typing import Any

import pytest
from step_options import option_config, step_under, training_batch

from dkdetr.config import ExperimentConfig
from dkdetr.experiment_file import config_from_dict, config_to_dict, flatten

IN_A_STEP: Mapping[str, tuple[str, Any]] = {
    "regions_per_image": ("iou", 2),
    "layers": ("cached", "all"),
    "auxiliary_queries": ("cached", False),
    "alignment": ("cached", "iou"),
    "content": ("cached", "slots"),
    "align_iou": ("iou", 0.3),
    "candidates_per_image": ("iou", 4),
    "exclude": ("online", "matched"),
    "hybrid_queries": ("cached", 6),
    "hybrid_repeats": ("extra queries", 1),
    "skd.weight": ("cached", 0.2),
    "skd.loss": ("cached", "infonce"),
    "skd.temperature": ("cached", 0.1),
    "skd.bias": ("cached", -1.0),
    "skd.duplicate_similarity": ("cached", 0.01),
    "rkd.weight": ("cached", 1.0),
    "rkd.temperature": ("cached", 0.1),
    "rkd.relations": ("cached", ("image",)),
    "rkd.include_self": ("cached", False),
    "rkd.reverse": ("cached", True),
    "rkd.cross_only": ("cached", True),
    "selection.max_base_iou": ("iou", 0.0),
    "selection.nms_iou": ("online", 0.05),
    "selection.min_side": ("online", 40.0),
}
"""Under which option another value is tried."""

ELSEWHERE = {
    "start_epoch": "test_data_loader, test_engine_step_options",
    "selection.min_visible": "test_data_regions",
    "rkd.gather": "distributed/test_kd_across_ranks",
    "rkd.neighbor_fraction": "test_data_neighbor_batches",
}


def test_every_setting_is_listed():
    known = flatten(config_to_dict(option_config("cached"))["kd"])
    assert set(known) == IN_A_STEP.keys() | ELSEWHERE.keys()
    assert not IN_A_STEP.keys() & ELSEWHERE.keys()


def parts_of_a_step(config: ExperimentConfig) -> dict[str, float]:
    parts = step_under(config)(training_batch(config)).parts
    return {name: value.item() for name, value in parts.items()}


@pytest.mark.parametrize("setting", IN_A_STEP)
def test_another_value_is_another_step(setting: str):
    option, value = IN_A_STEP[setting]
    before = option_config(option)
    table = config_to_dict(before)
    *tables, key = setting.split(".")
    place = table["kd"]
    for name in tables:
        place = place[name]
    assert place[key] != value
    place[key] = value
    after = config_from_dict(table)
    assert parts_of_a_step(after) != parts_of_a_step(before)
