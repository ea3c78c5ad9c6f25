"""`dkdetr report RUN...`: one page on one or several scored runs."""

import json
import platform
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dkdetr.data.splits import load_split
from dkdetr.engine.evaluate_run import validation_split
from dkdetr.engine.metric_log import read_metrics
from dkdetr.engine.run_agreement import read_agreement
from dkdetr.engine.run_folder import RunFolder
from dkdetr.errors import DataError, UsageError
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.ground_truth import GroundTruth, ground_truth_of
from dkdetr.evaluation.pictures import choose_images
from dkdetr.evaluation.report import RunForReport, write_report
from dkdetr.evaluation.results import read_results
from dkdetr.experiment_file import flatten


@dataclass(frozen=True)
class ReportRequest:
    """What to report: scored runs or results files; `split` None: the first run's validation."""

    runs: Sequence[Path]
    split: str | None
    out: Path | None
    data_root: Path
    num_pictures: int = 12
    command: str = "dkdetr report"


def report_runs(request: ReportRequest) -> Path:
    """Returns the page's path: RUN/report.html for one run, report.html for several.

    Everything is computed from what `dkdetr eval` left in the runs and from the annotations.

    Raises:
        UsageError: no run, or no split to report on.
        DataError: a run is not there, or was not scored on the split.
    """
    if not request.runs:
        raise UsageError("report wants a run that `dkdetr eval` scored, or a results json")
    for path in request.runs:
        if not path.exists():
            raise DataError(f"no run folder or results file '{path}'")
    first = request.runs[0]
    machine = RunFolder(first).read_provenance()
    name = request.split or validation_split(machine.get("split"))
    split = load_split(name, request.data_root)
    truth = ground_truth_of(split)
    runs = [_read(path, title, truth) for path, title in _titled(request.runs)]
    out = request.out or (first / "report.html" if len(request.runs) == 1 and first.is_dir()
                          else Path("report.html"))  # fmt: skip
    write_report(
        out,
        title=", ".join(run.name for run in runs),
        about=[
            ("Command", request.command),
            ("Date", datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC")),
            ("Versions", f"Python {platform.python_version()}, PyTorch {torch.__version__}"),
            *([("Trained on", str(machine["device"]))] if "device" in machine else []),
        ],
        split=split,
        truth=truth,
        runs=runs,
        chosen=choose_images(truth, count=request.num_pictures),
        notes=[],
    )
    return out


def _titled(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Returns each path with a short name that no other has: as many folders as it takes."""
    whole = [
        path.resolve().with_suffix("").parts if path.is_file() else path.resolve().parts
        for path in paths
    ]
    different = set(whole)
    titled: list[tuple[Path, str]] = []
    for path, own in zip(paths, whole, strict=True):
        depth = next(n for n in range(1, len(own) + 1) if _is_alone(own[-n:], different))
        name, number = "/".join(own[-depth:]), 1
        while (title := f"{name} ({number})" if number > 1 else name) in (
            each for _, each in titled
        ):
            number += 1  # the same path again
        titled.append((path, title))
    return titled


def _is_alone(end: tuple[str, ...], paths: Iterable[tuple[str, ...]]) -> bool:
    return sum(path[-len(end) :] == end for path in paths) == 1


def _read(path: Path, title: str, truth: GroundTruth) -> RunForReport:
    scored = _Scored(path) if path.is_file() else _scored_of(path, truth.name)
    averaged, results = scored.averaged, read_results(scored.results)
    if results.masks is not None:
        raise UsageError(f"'{path}' holds masks: report is on boxes, give results.json")
    run = RunFolder(path)
    settings: dict[str, Any] = {}
    if run.config.is_file():
        settings = flatten(tomllib.loads(run.config.read_text(encoding="utf-8")))
    return RunForReport(
        name=f"{title}, averaged weights" if averaged else title,
        note=", ".join(filter(None, (str(settings.get("name", "")), _moment_of(scored, run)))),
        metrics=score(truth, results),
        results=results,
        history=read_metrics(run.metrics),
        agreement=read_agreement(path, truth.name, averaged=averaged),
        settings=settings,
    )


@dataclass(frozen=True)
class _Scored:
    """A results file, whether the averaged weights found that, and at which step, if it says so."""

    results: Path
    averaged: bool = False
    iteration: int | None = None


def _moment_of(scored: _Scored, run: RunFolder) -> str:
    """Returns in words at which step a run was scored, and how far it has come since."""
    step, newest = scored.iteration, run.newest_step()
    if step is None:
        return ""
    since = f", trained to step {newest} since" if newest is not None and newest > step else ""
    return f"scores of step {step}{since}"


def _scored_of(run: Path, split: str) -> _Scored:
    """Returns the results on a split; those of the averaged weights are the last choice."""
    for averaged in (False, True):
        for folder in RunFolder(run).evaluations(averaged=averaged):
            metrics = folder / "metrics.json"
            if not metrics.is_file():
                continue
            table = json.loads(metrics.read_text(encoding="utf-8"))
            if table.get("split") == split:
                return _Scored(folder / "results.json", averaged, table.get("iteration"))
    raise DataError(f"'{run}' was not scored on {split}; next: dkdetr eval {run} --split {split}")
