"""The rows of each ablation as overrides of one experiment, and the paper's numbers for them.

A row says only what it changes; one and the same row may stand in several tables and is trained
once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dkdetr.config import ExperimentConfig
from dkdetr.errors import UsageError

# Ours: the paper does not state it. ViLD's weight, which is DetPro's (method A.6).
_L1_WEIGHT = 0.5


@dataclass(frozen=True)
class TableRow:
    """A line of a table; `run` names the training, which other tables may share.

    `paper` holds the paper's numbers by metric, in percent; empty where it has none.
    """

    run: str
    label: str
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AblationTable:
    """A table: its lines, and the run that the others are compared with, seed by seed."""

    name: str
    title: str
    baseline: str
    rows: tuple[TableRow, ...]
    note: str = ""


def row_overrides(base: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Returns what each known run changes of the experiment, as `{"a.b": value}`.

    Raises:
        UsageError: the experiment does not distil by SKD and RKD: its rows would mean nothing.
    """
    kd = base.kd
    if kd.regions_per_image < 1 or kd.skd.weight <= 0 or kd.rkd.weight <= 0:
        raise UsageError(
            f"experiment '{base.name}' is no base for an ablation: rows take away from it, so it "
            "must have kd.regions_per_image, kd.skd.weight and kd.rkd.weight above 0"
        )
    no_skd, no_rkd = {"kd.skd.weight": 0.0}, {"kd.rkd.weight": 0.0}
    return {
        "baseline": no_skd | no_rkd,
        "skd": no_rkd,
        "rkd": no_skd,
        "both": {},
        "both_no_auxiliary": {"kd.auxiliary_queries": False},
        "both_iou": {"kd.alignment": "iou"},
        "skd_l1": no_rkd | {"kd.skd.loss": "l1", "kd.skd.weight": _L1_WEIGHT},
        "rkd_image": no_skd | {"kd.rkd.relations": ["image"]},
        "rkd_batch": no_skd | {"kd.rkd.relations": ["batch"]},
        "neighbors_25": {"kd.rkd.neighbor_fraction": 0.25},
        "neighbors_50": {"kd.rkd.neighbor_fraction": 0.5},
        "both_hybrid": {"kd.alignment": "hybrid"},
        "both_online": {"kd.alignment": "online"},
        # One to one: repeats would force nearly each of so few queries onto some object.
        "extra_queries": no_skd
        | no_rkd
        | {"kd.hybrid_queries": kd.regions_per_image, "kd.hybrid_repeats": 1},
        "layers_last": {"kd.layers": "last"},
        "layers_all": {"kd.layers": "all"},
    }


def table_of(name: str) -> AblationTable:
    """Returns a table by its name.

    Raises:
        UsageError: there is no such table.
    """
    if name not in _TABLES:
        raise UsageError(f"no table '{name}': choose one of {', '.join(TABLE_NAMES)}")
    return _TABLES[name]


def with_weights(table: AblationTable, own: Mapping[str, Mapping[str, Any]]) -> AblationTable:
    """Returns a table whose note states the weight of L1 that its row is trained with.

    Args:
        own: what each run changes of the experiment, with what the experiment's file says of it.
    """
    if all(row.run != "skd_l1" for row in table.rows):
        return table
    weight = own["skd_l1"]["kd.skd.weight"]
    whose = "ViLD's" if weight == _L1_WEIGHT else "the experiment's"
    return replace(table, note=f"{table.note} Here it is {weight:g}, {whose}.")


def _lvis(rare: float, common: float, frequent: float, all_of_them: float) -> dict[str, float]:
    return {"APr": rare, "APc": common, "APf": frequent, "AP": all_of_them}


# R50, 36 epochs, boxes, LVIS v1 val; and Table 3's OV-COCO, which has these two rows alone.
_BASELINE = TableRow(
    "baseline", "baseline", _lvis(17.0, 30.0, 36.9, 30.5) | {"AP50_novel": 9.0, "AP50_base": 61.2}
)
_SKD = TableRow("skd", "SKD", _lvis(20.0, 30.8, 37.4, 31.5))
_RKD = TableRow("rkd", "RKD", _lvis(19.8, 30.9, 37.6, 31.5))
_BOTH = TableRow(
    "both", "SKD + RKD", _lvis(20.4, 30.9, 37.6, 31.7) | {"AP50_novel": 32.3, "AP50_base": 61.1}
)

_TABLES = {
    "5": AblationTable(
        "5",
        "Table 5: the parts of the distillation",
        "baseline",
        (
            _BASELINE,
            _SKD,
            _RKD,
            TableRow(
                "both_no_auxiliary",
                "SKD + RKD, no auxiliary queries",
                _lvis(19.7, 27.3, 35.6, 29.2),
            ),
            _BOTH,
            TableRow("both_iou", "SKD + RKD, auxiliary, iou"),
        ),
        "Without auxiliary queries the alignment changes too: a detection query learns from the "
        "cached region that its anchor overlaps. The last row has auxiliary queries and such an "
        "alignment, as a control; it still differs in how many regions it may choose from. The "
        "paper has no such row.",
    ),
    "6": AblationTable(
        "6",
        "Table 6: the loss of SKD",
        "baseline",
        (
            _BASELINE,
            TableRow("skd_l1", "L1", _lvis(18.9, 30.8, 37.3, 31.4)),
            TableRow("skd", "BCE", _SKD.paper),
        ),
        "The paper does not state the weight of L1.",
    ),
    "7": AblationTable(
        "7",
        "Table 7: the relations of RKD",
        "baseline",
        (
            _BASELINE,
            TableRow("rkd_image", "image", _lvis(19.5, 30.8, 37.4, 31.3)),
            TableRow("rkd_batch", "batch", _lvis(19.2, 31.2, 37.6, 31.6)),
            TableRow("rkd", "image + batch", _RKD.paper),
        ),
        "Each relation has the weight of RKD: both together weigh twice as much as either alone.",
    ),
    "neighbors": AblationTable(
        "neighbors",
        "Related images in one batch (not in the paper)",
        "both",
        (
            TableRow("both", "fraction 0", _BOTH.paper),
            TableRow("neighbors_25", "fraction 0.25"),
            TableRow("neighbors_50", "fraction 0.5"),
        ),
    ),
    "alignment": AblationTable(
        "alignment",
        "Which region a KD query stands for",
        "both",
        (
            TableRow("both", "cached"),
            TableRow("both_iou", "iou"),
            TableRow("both_hybrid", "hybrid"),
            TableRow("both_online", "online", _BOTH.paper),
        ),
        "The paper embeds the crops of the student's own boxes during training: `online`.",
    ),
    "controls": AblationTable(
        "controls",
        "Controls (not in the paper)",
        "baseline",
        (
            _BASELINE,
            TableRow("extra_queries", "extra queries, no KD"),
            TableRow("layers_last", "SKD + RKD, last layer"),
            TableRow("layers_all", "SKD + RKD, all layers"),
        ),
        "As many extra detection queries as there are KD queries, in training alone: what they "
        "gain is not the teacher's doing.",
    ),
}
TABLE_NAMES = tuple(_TABLES)


def wanted_rows(table: AblationTable, rows: Sequence[str]) -> frozenset[str]:
    """Returns the runs of the rows that are asked for; none: all. Raises UsageError for others."""
    names = [row.run for row in table.rows]
    strange = [row for row in rows if row not in names]
    if strange:
        raise UsageError(
            f"table {table.name} has no row '{strange[0]}'; its rows: {', '.join(names)}"
        )
    return frozenset(rows or names)


def set_words(overrides: Mapping[str, Any]) -> list[str]:
    """Returns overrides as `--set` takes them: `a.b=value`, the value in TOML."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
