"""`dkdetr report RUN...`: one page on one or several scored runs."""

import contextlib
import json
import platform
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dkdetr.config import Precision
from dkdetr.data.splits import load_split
from dkdetr.engine.evaluate_run import validation_split
from dkdetr.engine.metric_log import read_metrics
from dkdetr.engine.run_agreement import read_agreement
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.run_titles import titled
from dkdetr.errors import DataError, UsageError
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.ground_truth import GroundTruth, ground_truth_of
from dkdetr.evaluation.pictures import choose_images
from dkdetr.evaluation.report import RunForReport, write_report
from dkdetr.evaluation.results import read_results
from dkdetr.evaluation.scored_weights import WEIGHTS_KEY, strange_precision, strange_words
from dkdetr.evaluation.teacher_agreement import TeacherAgreement
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
    runs = [_read(path, title, truth) for path, title in titled(request.runs)]
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


def _read(path: Path, title: str, truth: GroundTruth) -> RunForReport:
    scored = _Scored(path, {}) if path.is_file() else _scored_of(path, truth.name)
    results = read_results(scored.results)
    if results.masks is not None:
        raise UsageError(f"'{path}' holds masks: report is on boxes, give results.json")
    run = RunFolder(path)
    settings: dict[str, Any] = {}
    if run.config.is_file():
        settings = flatten(tomllib.loads(run.config.read_text(encoding="utf-8")))
    made_with, precision = run.read_provenance(), settings.get("optim.precision")
    agreement = read_agreement(
        path, truth.name, averaged=scored.averaged, weights=scored.said.get(WEIGHTS_KEY)
    )
    return RunForReport(
        name=", ".join([title, *_not_its_own(scored, made_with, precision, truth.name)]),
        note=", ".join(filter(None, (str(settings.get("name", "")), *_said_of(scored, run)))),
        metrics=score(truth, results),
        results=results,
        history=read_metrics(run.metrics),
        agreement=agreement,
        agreement_note=_weights_of(agreement, scored),
        settings=settings,
    )


@dataclass(frozen=True)
class _Scored:
    """A results file, what its `metrics.json` says, and whether the averaged weights found that."""

    results: Path
    said: Mapping[str, Any]
    averaged: bool = False


def _not_its_own(
    scored: _Scored, made_with: Mapping[str, Any], precision: Precision | None, split: str
) -> list[str]:
    """Returns, to be read wherever a run is named, what its scores are of but its last weights,
    asked with its own words, in its own precision, on its own validation split."""
    if not scored.said:  # a results file alone
        return []
    told = ["averaged weights"] if scored.averaged else []
    with contextlib.suppress(UsageError):  # which split is its own, it does not say
        if split != validation_split(made_with.get("split")):
            told.append(f"on {split.rpartition('/')[2]}")
    said = scored.said
    if said.get("words") == "split":
        told.append("asked for the split's own names")
    elif "words" in said and (words := strange_words(said, made_with.get("vocabulary_hash"))):
        told.append(words)
    if "precision" in said and precision and (other := strange_precision(said, precision)):
        told.append(other)
    return told


def _said_of(scored: _Scored, run: RunFolder) -> list[str]:
    """Returns in words at which step a run was scored, and how far it has come since; and whether
    its scores, being of before, leave something unsaid."""
    step, newest = scored.said.get("iteration"), run.newest_step()
    told = [] if step is None else [f"scores of step {step}"]
    if step is not None and newest is not None and newest > step:
        told.append(f"trained to step {newest} since")
    if scored.said and "words" not in scored.said:
        told.append("the scores do not say what words were asked")
    return told


def _weights_of(agreement: Sequence[TeacherAgreement], scored: _Scored) -> str:
    """Returns in words which weights an agreement is of, where these are not those of the scores,
    or where one of the two, being of before, does not say.

    '' where they are, or where there is none.
    """
    if not agreement:
        return ""
    weights = agreement[0].weights
    if weights is None:
        return "of weights that it does not name"
    if WEIGHTS_KEY not in scored.said:
        return "the scores do not name their weights"
    at = "" if weights.iteration is None else f", those of step {weights.iteration}"
    if weights.xxh3_128 != scored.said[WEIGHTS_KEY]:
        return f"of other weights than the scores{at}"
    precision = scored.said.get("precision", weights.precision)
    if weights.precision != precision:
        return f"of precision {weights.precision}, where the scores are of {precision}"
    return ""


def _scored_of(run: Path, split: str) -> _Scored:
    """Returns the results on a split; those of the averaged weights are the last choice."""
    for averaged in (False, True):
        for folder in RunFolder(run).evaluations(averaged=averaged):
            metrics = folder / "metrics.json"
            if not metrics.is_file():
                continue
            said = json.loads(metrics.read_text(encoding="utf-8"))
            if said.get("split") == split:
                return _Scored(folder / "results.json", said, averaged)
    raise DataError(f"'{run}' was not scored on {split}; next: dkdetr eval {run} --split {split}")
