"""What is kept of a finished row: enough for the table, on another day and machine too."""

import json
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkdetr.atomic_file import write_text
from dkdetr.engine.ablation_names import GroupScores, read_group_scores
from dkdetr.engine.ablation_plan import (
    ROW_FILE,
    SCORE_FILE,
    AblationPlan,
    PlannedRun,
    seconds_per_step,
)
from dkdetr.engine.ablation_results import COLUMNS
from dkdetr.engine.metric_log import in_brief, read_metrics
from dkdetr.engine.run_folder import RunFolder
from dkdetr.evaluation.protocols import OVERALL_KEYS

_KEPT_LINES = 8


def record_row(plan: AblationPlan, run: PlannedRun) -> None:
    """Writes a row's record, last of all: its presence says that the row is whole."""
    scored = json.loads((run.folder / SCORE_FILE).read_text(encoding="utf-8"))
    kept = {*OVERALL_KEYS, *COLUMNS[plan.protocol]}
    record = {
        "row": run.run,
        "seed": run.seed,
        "config_hash": run.hash,
        "config": _settings_of(run),
        "cache_fingerprint": plan.cache_fingerprint,
        "split": plan.split,
        "evaluator": scored.get("evaluator"),
        "metrics": {key: value for key, value in scored.items() if key in kept},
        "names": _names_of(plan, scored),
        "steps": run.steps,
        "seconds_per_step": seconds_per_step(run),
        "commands": [f"dkdetr {shlex.join(words)}" for words in run.commands],
        "log": in_brief(_training_log(run), _KEPT_LINES),
    }
    write_text(run.folder / ROW_FILE, json.dumps(record, indent=2) + "\n")


def _training_log(run: PlannedRun) -> list[dict[str, Any]]:
    """Returns the diary without the lines of scores, which the record has under `metrics`."""
    records = read_metrics(RunFolder(run.folder).metrics)
    return [record for record in records if record.get("kind") != "eval"]


def _settings_of(run: PlannedRun) -> dict[str, Any]:
    path = RunFolder(run.folder).config
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _names_of(plan: AblationPlan, scored: Mapping[str, Any]) -> GroupScores:
    table = scored.get("files", {}).get("per_category")
    return {} if table is None else read_group_scores(Path(table), plan.protocol)
