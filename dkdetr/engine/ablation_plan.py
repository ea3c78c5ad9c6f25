"""What an ablation will run: each row's settings, folder and commands, and what sharing saves."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.location import CachePath
from cache.store import open_cache
from dkdetr.config import ExperimentConfig
from dkdetr.data.cached_split import load_cached_split
from dkdetr.data.loader import batches_per_epoch
from dkdetr.data.split_sources import Protocol
from dkdetr.data.splits import load_split
from dkdetr.data.vocabulary import from_metadata
from dkdetr.engine.ablation_tables import (
    AblationTable,
    row_overrides,
    set_words,
    table_of,
    wanted_rows,
    with_weights,
)
from dkdetr.engine.evaluate_run import refuse_other_names, validation_split
from dkdetr.engine.jobs import Job
from dkdetr.engine.metric_log import read_metrics
from dkdetr.engine.row_places import places_for
from dkdetr.engine.run_folder import RUNS, RunFolder, portable_name
from dkdetr.engine.start import ablated_experiment
from dkdetr.errors import MismatchError, UsageError
from dkdetr.experiment_file import (
    ConfigError,
    ResolvedConfig,
    config_from_dict,
    config_hash,
    load_experiment,
)

BURN_IN = "burn_in"
ROW_FILE = "row.json"
SCORE_FILE = "score.json"


@dataclass(frozen=True)
class AblateRequest:
    """What is asked of `dkdetr ablate`.

    `experiment` None: the one of the cache's split, of LVIS the paper's 36 epochs; `split` None:
    its validation split; `out` None: runs/ablate-EXPERIMENT-HASH, which all tables of an experiment
    share; `rows` empty: all; `jobs` None: as many as there are GPUs, or cores where there are none.
    `eval_every`: as of `train`, of burn-ins and rows, on `split`.
    """

    cache: CachePath
    table: str
    experiment: str | None
    overrides: Sequence[str]
    seeds: int
    rows: Sequence[str]
    jobs: int | None
    split: str | None
    out: Path | None
    data_root: Path
    device: str
    eval_every: int = 0


@dataclass(frozen=True)
class PlannedRun:
    """One training with one seed. `steps` are its own, those of a shared burn-in left out."""

    run: str
    seed: int
    folder: Path
    hash: str
    steps: int
    batch_size: int
    commands: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """Returns what it is known by: runs of one folder are one training."""
        return f"{self.folder.parent.name}/{self.folder.name}"


@dataclass(frozen=True)
class AblationPlan:
    """Everything that is decided before anything runs."""

    table: AblationTable
    out: Path
    split: str
    protocol: Protocol
    experiment: str
    cache_fingerprint: str
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]
    """Of all rows of the table, seed by seed; which of them are asked for says `wanted`."""
    burn_ins: tuple[PlannedRun, ...]
    """One a seed; none where the experiment distils from its first epoch on."""
    wanted: frozenset[str]

    def trainings(self) -> list[PlannedRun]:
        """Returns the burn-ins and the rows' runs, those that share a folder once."""
        return list({run.name: run for run in (*self.burn_ins, *self.runs)}.values())

    def jobs(self) -> list[Job]:
        """Returns what is left to do: unfinished rows that are asked for, and their burn-ins."""
        burn_ins = {each.seed: each for each in self.burn_ins}
        jobs: dict[str, Job] = {}
        for run in self.runs:
            if run.run not in self.wanted or self.finished(run) is not None:
                continue
            burn_in = burn_ins.get(run.seed)
            if burn_in is not None:
                log = burn_in.folder / "log.txt"
                jobs.setdefault(burn_in.name, Job(burn_in.name, burn_in.commands, log))
            needs = burn_in.name if burn_in is not None else None
            jobs[run.name] = Job(run.name, run.commands, run.folder / "log.txt", needs)
        return list(jobs.values())

    def finished(self, run: PlannedRun) -> dict[str, Any] | None:
        """Returns a finished row's record, or None.

        Raises:
            MismatchError: the folder holds a row of other settings, another cache or split.
        """
        path = run.folder / ROW_FILE
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        record["config_hash"] = _hash_today(record)
        wanted = {"config_hash": run.hash, "split": self.split}
        wanted["cache_fingerprint"] = self.cache_fingerprint
        for key, value in wanted.items():
            if record.get(key) != value:
                raise MismatchError(
                    f"'{run.folder}' holds a finished row with {key} {record.get(key)}, asked for "
                    f"is {value}: give another --out, or delete that folder"
                )
        return record


def make_plan(request: AblateRequest) -> AblationPlan:
    """Returns the plan of a table.

    Raises:
        UsageError: an unknown table or row, or an experiment that nothing can be taken away from.
        MismatchError: curves are asked for, on a split of other names than the cache's.
        cache.spec.CacheError: the cache is unsealed, stale or damaged.
    """
    table = table_of(request.table)
    cache = open_cache(request.cache)
    info = cache.info
    experiment = request.experiment or ablated_experiment(info.split)
    resolved = load_experiment(experiment, request.overrides)
    base = resolved.config
    check_row_tables(resolved, experiment)
    known = row_overrides(base)
    own = {row: known[row] | dict(resolved.rows.get(row, {})) for row in known}
    wanted = wanted_rows(table, request.rows)
    if request.seeds < 1:
        raise UsageError("--seeds wants 1 or more")
    if request.eval_every < 0:
        raise UsageError("--eval-every wants 0 or more epochs")
    seeds = tuple(base.seed + number for number in range(request.seeds))
    names = _folder_names(experiment, request.overrides, own, [row.run for row in table.rows])
    out = request.out or RUNS / f"ablate-{portable_name(base.name)}-{config_hash(base)}"
    split = request.split or validation_split(info.split)
    scored = load_split(split, request.data_root)
    if request.eval_every:
        remedy = "leave --eval-every out, or name another --split"
        refuse_other_names(from_metadata(*cache.text()), scored, remedy)
    steps = _steps_per_epoch(request, base, info.split)
    maker = _RunMaker(request, experiment, out, split, base, steps, num_rows=len(wanted))
    return AblationPlan(
        table=with_weights(table, own),
        out=out,
        split=split,
        protocol=scored.protocol,
        experiment=experiment,
        cache_fingerprint=info.fingerprint,
        seeds=seeds,
        runs=tuple(
            maker.row(row.run, names[row.run], own[row.run], seed)
            for seed in seeds
            for row in table.rows
        ),
        burn_ins=tuple(maker.burn_in(seed) for seed in seeds) if base.kd.start_epoch else (),
        wanted=wanted,
    )


def check_row_tables(resolved: ResolvedConfig, experiment: str) -> None:
    """Returns if every `[ablate.ROW]` table of an experiment is of a known row and can be.

    By itself: what `--set` makes impossible of it counts where that row is asked for.

    Raises:
        ConfigError: names the table.
    """
    known = row_overrides(ExperimentConfig(name="any"))
    for row, changes in resolved.rows.items():
        if row not in known:
            raise ConfigError(f"[ablate.{row}]: no such row; rows: {', '.join(known)}")
        try:
            load_experiment(experiment, set_words(known[row] | dict(changes)))
        except ConfigError as error:
            raise ConfigError(f"[ablate.{row}]: {error}") from None


def _hash_today(record: Mapping[str, Any]) -> str:
    """Returns the hash of a row's settings; those that did not exist then have their defaults."""
    try:
        if record.get("config"):
            return config_hash(config_from_dict(record["config"]))
    except ConfigError:  # a setting of then is none of today's: these are other settings
        pass
    return str(record["config_hash"])


def seconds_per_step(run: PlannedRun) -> float | None:
    """Returns what a step of this run took, by its diary; None if it has not been timed."""
    rates = [
        float(record["images_per_s"])
        for record in read_metrics(RunFolder(run.folder).metrics)
        if float(record.get("images_per_s", 0)) > 0
    ]
    return run.batch_size / statistics.median(rates) if rates else None


def savings(plan: AblationPlan) -> list[str]:
    """Returns, in words, what shared burn-in and cache spare the rows asked for or finished."""
    asked = {
        run.name: run.seed
        for run in plan.runs
        if run.run in plan.wanted or plan.finished(run) is not None
    }
    timed = [seconds_per_step(run) for run in plan.trainings()]
    known = [seconds for seconds in timed if seconds is not None]
    lines: list[str] = []
    if plan.burn_ins:
        rows = Counter(asked.values())
        spared = sum(run.steps * max(0, rows[run.seed] - 1) for run in plan.burn_ins)
        if known:
            step = statistics.median(known)
            cost = f"{spared * step / 3600:.2f} device-hours at {step:.3f} s a step, as measured"
        else:
            cost = "device-hours unknown: no run here has been timed yet"
        lines.append(f"one burn-in a seed instead of one a row spares {spared:,} steps ({cost})")
    else:
        lines.append("no burn-in to share: the experiment distils from its first epoch on")
    lines.append(
        f"one cache serves all {len(asked)} trainings: each but the first spares a whole stage 1 "
        "(its cost: dkdetr cache-teacher --dry-run)"
    )
    return lines


@dataclass(frozen=True)
class _RunMaker:
    request: AblateRequest
    experiment: str
    out: Path
    split: str
    base: ExperimentConfig
    steps_per_epoch: int
    num_rows: int
    """That are asked for, with each seed."""

    def burn_in(self, seed: int) -> PlannedRun:
        start = self.base.kd.start_epoch
        folder = self._folder(seed, BURN_IN)
        config = self._config({}, seed)
        words = (*self._train(folder, seed, {}, side_by_side=1), "--until", str(start))
        steps = start * self.steps_per_epoch
        batch = config.data.batch_size
        return PlannedRun(BURN_IN, seed, folder, config_hash(config), steps, batch, (words,))

    def row(self, run: str, name: str, overrides: Mapping[str, Any], seed: int) -> PlannedRun:
        folder, start = self._folder(seed, name), self.base.kd.start_epoch
        config = self._config(overrides, seed)
        train = self._train(folder, seed, overrides, side_by_side=self.num_rows)
        if start:
            train = (*train, "--from", str(self._folder(seed, BURN_IN)))
        request = self.request
        score = (
            "eval", str(folder), "--split", self.split, "--data-root", str(request.data_root),
            "--device", request.device, "--json", str(folder / SCORE_FILE),
        )  # fmt: skip
        steps = (config.optim.epochs - start) * self.steps_per_epoch
        batch = config.data.batch_size
        return PlannedRun(run, seed, folder, config_hash(config), steps, batch, (train, score))

    def _folder(self, seed: int, name: str) -> Path:
        return self.out / f"seed{seed}" / name

    def _config(self, overrides: Mapping[str, Any], seed: int) -> ExperimentConfig:
        words = [*self.request.overrides, *set_words(overrides), f"seed={seed}"]
        return load_experiment(self.experiment, words).config

    def _train(
        self, folder: Path, seed: int, overrides: Mapping[str, Any], *, side_by_side: int
    ) -> tuple[str, ...]:
        """Returns a training's words; so many of a seed may run at the same time."""
        request = self.request
        settings = [*request.overrides, *set_words(overrides)]
        asked = any(setting.startswith("data.workers=") for setting in settings)
        most = side_by_side * request.seeds
        loaders = places_for(request.device, request.jobs, most=most).loader_processes
        if self.base.data.workers > loaders and not asked:  # the others need cores, too
            settings.append(f"data.workers={loaders}")
        every = ("--eval-every", str(request.eval_every), "--eval-split", self.split)
        return (
            "train", "--cache", str(request.cache), "--experiment", self.experiment,
            "--run", str(folder), "--data-root", str(request.data_root),
            "--device", request.device, "--seed", str(seed), *(every if request.eval_every else ()),
            *(word for setting in settings for word in ("--set", setting)),
        )  # fmt: skip


def _folder_names(
    experiment: str,
    overrides: Sequence[str],
    own: Mapping[str, Mapping[str, Any]],
    needed: Sequence[str],
) -> dict[str, str]:
    """Returns each run's folder: rows of equal settings share the first one's, in any table."""
    first_of: dict[str, str] = {}
    names: dict[str, str] = {}
    for run, changes in own.items():
        try:
            config = load_experiment(experiment, [*overrides, *set_words(changes)]).config
        except ConfigError:
            if run in needed:
                raise
            continue
        names[run] = first_of.setdefault(config_hash(config), run)
    return names


def _steps_per_epoch(request: AblateRequest, base: ExperimentConfig, train_split: str) -> int:
    vocabulary = from_metadata(*open_cache(request.cache).text())
    split = load_cached_split(train_split, request.data_root)
    return batches_per_epoch(split, vocabulary, base, cache_path=request.cache)
