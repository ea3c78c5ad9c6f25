"""`dkdetr ablate`: every row of a table from one cache and, for each seed, one burn-in.

Each row is a `dkdetr train` and a `dkdetr eval` in processes of their own, so that rows run side
by side, one that fails takes no other with it, and what is run is what anybody can type.
"""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dkdetr.atomic_file import write_bytes, write_text
from dkdetr.engine.ablation_plan import (
    BURN_IN,
    AblateRequest,
    AblationPlan,
    PlannedRun,
    make_plan,
    savings,
)
from dkdetr.engine.ablation_plot import plot_png
from dkdetr.engine.ablation_record import record_row
from dkdetr.engine.ablation_results import (
    COLUMNS,
    NOT_RUN,
    AblationResult,
    RowResult,
    comma_separated,
    markdown,
)
from dkdetr.engine.folder_lock import locked_folder
from dkdetr.engine.gpu_sharing import side_by_side_on_gpus
from dkdetr.engine.interruption import StopFlag, stop_on_sigterm
from dkdetr.engine.jobs import STOPPED, Job, Jobs, Outcome
from dkdetr.engine.metric_log import read_metrics
from dkdetr.engine.row_places import places_for
from dkdetr.engine.run_folder import RunFolder
from dkdetr.errors import DkdetrError, PreemptedError
from dkdetr.progress import progress

_BUSY = (
    "another ablation is at work in '{}', or rows of one that was killed still are; wait for "
    "them, or end them, or give another --out"
)


class RowFailedError(DkdetrError):
    """Rows failed; the table stands with the others. Carries the first failure's code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class AblationSummary:
    """What an ablation came to; `failed` is the first failure's exit code, 0 if there is none."""

    text: str
    result: AblationResult
    paths: Mapping[str, Path] = field(default_factory=dict)
    failed: int = 0

    def lines(self) -> list[str]:
        """Returns what is printed."""
        return [self.text, *(f"{name}: {path}" for name, path in self.paths.items())]

    def as_json(self) -> dict[str, Any]:
        """Returns every row's metrics by seed, with the paper's (those in percent)."""
        return {
            "table": self.result.table.name,
            "rows": {
                each.row.run: {
                    "label": each.row.label,
                    "seeds": {str(seed): dict(values) for seed, values in each.by_seed.items()},
                    "failed": {str(seed): why for seed, why in each.failures.items()},
                    "paper": dict(each.row.paper),
                }
                for each in self.result.rows
            },
            "files": {name: str(path) for name, path in self.paths.items()},
        }

    def raise_failures(self) -> None:
        """Raises RowFailedError if a row failed."""
        if self.failed:
            count = sum(len(each.failures) for each in self.result.rows)
            raise RowFailedError(
                f"{count} of the table's runs failed, see above; the others stand, and the same "
                "command tries the failed ones again",
                self.failed,
            )


def ablate(request: AblateRequest, program: Sequence[str]) -> AblationSummary:
    """Returns the table after its rows have run; finished rows are not run again.

    Args:
        request: what to run.
        program: the words that start `dkdetr`.

    Raises:
        UsageError: an unknown table, row or setting.
        MismatchError: the folder holds rows of other settings or another cache.
        FolderLockedError: another ablation is at work there.
        PreemptedError: SIGTERM came; every row has saved itself.
    """
    plan = make_plan(request)
    for run in plan.runs:  # a row of other settings is refused before anything is trained
        plan.finished(run)
    # Rows keep the lock's file open: it holds as long as one of them lives.
    with stop_on_sigterm() as stop, locked_folder(plan.out, _BUSY.format(plan.out)) as lock:
        outcomes = _run(plan, request, program, stop, lock)
    summary = _write(plan, outcomes)
    if stop.is_set or any(outcome.code == STOPPED for outcome in outcomes.values()):
        raise PreemptedError(
            f"stopped by SIGTERM; rows saved themselves in '{plan.out}'; the same command goes on"
        )
    return summary


def price_ablation(request: AblateRequest) -> AblationSummary:
    """Returns what `ablate` would run, what is there already, and what sharing saves."""
    plan = make_plan(request)
    lines = [f"{plan.table.title}, {len(plan.seeds)} seed(s), in {plan.out}"]
    todo = {job.name for job in plan.jobs()}
    trainings = plan.trainings()
    for run in trainings:
        state = "to run" if run.name in todo else NOT_RUN
        if run.run == BURN_IN:
            state = "to run or resume" if run.name in todo else "not needed"
        elif plan.finished(run) is not None:
            state = "finished"
        lines.append(f"  {run.name:32s} {run.steps:8,} steps  {state}")
    left = sum(run.steps for run in trainings if run.name in todo)
    most = max(1, len(todo))
    count = len(places_for(request.device, request.jobs, most=most).environments)
    lines.append(f"{left:,} steps to run at most, {count} run(s) side by side")
    lines += savings(plan)
    return AblationSummary("\n".join(lines), _collect(plan, {}))


def _run(
    plan: AblationPlan,
    request: AblateRequest,
    program: Sequence[str],
    stop: StopFlag,
    lock: int,
) -> dict[str, Outcome]:
    todo = plan.jobs()
    if not todo:
        return {}
    by_name = {run.name: run for run in plan.trainings()}
    places = places_for(request.device, request.jobs, most=len(todo))
    diary = _Diary(plan.out / "ablate.log")
    diary.tell(f"table {plan.table.name}: {len(todo)} to run")

    def done(job: Job, outcome: Outcome) -> None:
        run = by_name[job.name]
        if outcome.code == 0 and run.run != BURN_IN:
            record_row(plan, run)
        state = "done" if outcome.code == 0 else f"exit {outcome.code}: {outcome.message}"
        diary.tell(f"{job.name}: {state}")

    runs = [by_name[job.name] for job in todo]
    sharing = nullcontext({})
    if places.share_gpus:
        sharing = side_by_side_on_gpus("cuda" if request.device == "auto" else request.device)

    def steps_done() -> int:
        return sum(_steps_done(run, plan) for run in runs)

    steps = sum(run.steps for run in runs)
    with (
        sharing as added,
        progress(f"ablate {plan.table.name}", steps, done=steps_done()) as advance,
    ):
        environments = [dict(each) | dict(added) for each in places.environments]
        jobs = Jobs(todo, program, environments, held=(lock,))

        def watch() -> None:
            ended = sum(outcome.code == 0 for outcome in jobs.outcomes.values())
            note = f"{ended} of {len(todo)} done; now {', '.join(jobs.running) or '-'}"
            advance(steps_done(), note)

        jobs.run(stop, watch=_every(2.0, watch), done=done)
    return jobs.outcomes


def _collect(plan: AblationPlan, outcomes: Mapping[str, Outcome]) -> AblationResult:
    records = {
        (run.run, run.seed): record
        for run in plan.runs
        if (record := plan.finished(run)) is not None
    }
    failures = {
        (run.run, run.seed): f"exit {outcome.code}: {outcome.message} (see {run.folder}/log.txt)"
        for run in plan.runs
        if (outcome := outcomes.get(run.name)) is not None and outcome.code not in (0, STOPPED)
    }
    rows: list[RowResult] = []
    for row in plan.table.rows:
        by_seed = {seed: record for (run, seed), record in records.items() if run == row.run}
        rows.append(
            RowResult(
                row=row,
                by_seed={seed: record["metrics"] for seed, record in by_seed.items()},
                failures={seed: why for (run, seed), why in failures.items() if run == row.run},
                by_name={
                    seed: record["names"] for seed, record in by_seed.items() if record.get("names")
                },
            )
        )
    return AblationResult(
        table=plan.table,
        subject=f"{plan.experiment} on {plan.split}, {_seeds_in_words(plan.seeds)}",
        columns=COLUMNS[plan.protocol],
        seeds=plan.seeds,
        rows=tuple(rows),
        remarks=(*savings(plan), *_step_times(plan, records)),
    )


def _step_times(
    plan: AblationPlan, records: Mapping[tuple[str, int], Mapping[str, Any]]
) -> list[str]:
    """Returns a line on what a step of each finished row took, the mean over its seeds."""
    shown = []
    for row in plan.table.rows:
        times = [
            record["seconds_per_step"]
            for (run, _), record in records.items()
            if run == row.run and record["seconds_per_step"]
        ]
        if times:
            shown.append(f"{row.label} {sum(times) / len(times):.3f}")
    if not shown:
        return []
    return [f"seconds a step, beside what else ran on the machine: {'; '.join(shown)}"]


def _write(plan: AblationPlan, outcomes: Mapping[str, Outcome]) -> AblationSummary:
    result = _collect(plan, outcomes)
    stem = f"table_{plan.table.name}"
    paths = {kind: plan.out / f"{stem}.{kind}" for kind in ("md", "csv", "png", "sh")}
    text = markdown(result)
    write_text(paths["md"], text)
    write_text(paths["csv"], comma_separated(result))
    write_bytes(paths["png"], plot_png(result, with_paper=plan.split == "lvis_val"))
    commands = [f"dkdetr {shlex.join(words)}" for run in plan.trainings() for words in run.commands]
    write_text(paths["sh"], "\n".join(commands) + "\n")
    codes = [outcome.code for outcome in outcomes.values() if outcome.code not in (0, STOPPED)]
    failed = (codes[0] if codes[0] > 0 else 1) if codes else 0
    return AblationSummary(text, result, paths, failed)


def _steps_done(run: PlannedRun, plan: AblationPlan) -> int:
    """Returns a run's own steps so far, by its diary; a shared burn-in's are not its own."""
    last = read_metrics(RunFolder(run.folder).metrics)[-1:]
    if not last:
        return 0
    shared = 0
    if run.run != BURN_IN:
        shared = next((each.steps for each in plan.burn_ins if each.seed == run.seed), 0)
    return max(0, min(run.steps, int(last[0]["iteration"]) - shared))


def _seeds_in_words(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"one seed ({seeds[0]})"
    return f"{len(seeds)} seeds ({', '.join(str(seed) for seed in seeds)})"


def _every(seconds: float, function: Callable[[], None]) -> Callable[[], None]:
    last = -seconds

    def call() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            function()

    return call


class _Diary:
    """A line an event, with the time; small enough to keep."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def tell(self, event: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {event}\n")
