"""`dkdetr demo`: the whole pipeline on the embedded data set, and a page to look at.

Two students are trained side by side from the same cache, on the same batches: one with
distillation and one without. Every figure in the table comes from this run.
"""

import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cache.store import open_cache
from dkdetr.config import ExperimentConfig
from dkdetr.cores import cores_at_hand
from dkdetr.data.loader import batches_per_epoch
from dkdetr.data.splits import Split, load_split
from dkdetr.data.vocabulary import from_metadata
from dkdetr.engine.distributed import pick_device
from dkdetr.engine.evaluate_run import EvalRequest, Scored, evaluate_run
from dkdetr.engine.metric_log import read_metrics
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.train import train
from dkdetr.engine.train_request import TrainRequest
from dkdetr.evaluation.ground_truth import ground_truth_of
from dkdetr.evaluation.pictures import choose_images
from dkdetr.evaluation.report import RunForReport, write_report
from dkdetr.evaluation.results import read_results
from dkdetr.evaluation.table import print_metrics
from dkdetr.experiment_file import load_experiment
from dkdetr.progress import format_duration, progress
from pipeline.build import cache_teacher
from pipeline.executor import Executor
from pipeline.pictograms.dataset import prepare_pictograms
from pipeline.request import CacheRequest

_EXPERIMENT = "pictograms_tiny"
_SPLIT = "pictograms_tiny"
_NUM_PICTURES = 12
# Two minutes of training leave scores low; their order is what was learned.
_PAGE_THRESHOLD = 0.2


@dataclass(frozen=True)
class _Row:
    name: str
    note: str
    overrides: tuple[str, ...]


_ROWS = (
    _Row("baseline", "no distillation", ("kd.regions_per_image=0",)),
    _Row("DK-DETR", "SKD and RKD from the cache", ()),
)


@dataclass(frozen=True)
class DemoSummary:
    """What the demo made: the page, the metrics by row and the seconds of each part."""

    page: Path
    metrics: dict[str, dict[str, Any]]
    seconds: dict[str, float]


def run_demo(out: Path, *, device: str, say: Callable[[str], None]) -> DemoSummary:
    """Returns after the page is written; what an earlier start finished is not done again.

    Args:
        out: everything goes here: data/, cache/, runs/ and report.html.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        say: told in a line what begins.

    Raises:
        UsageError: the extra [demo] is missing.
    """
    # One thread a process, several processes: on a small or busy machine OpenMP's threads wait
    # for each other longer than they work.
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    data_root, cache = out / "data", out / "cache"
    say("1/4  drawing the pictograms' world: 65 names, 17 of them never annotated for training")
    prepare_pictograms(data_root, size="tiny", protocol="lvis-like", seed=0)
    clock.lap("data")
    say("2/4  stage 1: proposals, then the small CLIP's embedding of every region")
    summary = cache_teacher(
        CacheRequest(
            split=f"{_SPLIT}_train",
            out=cache,
            data_root=data_root,
            teacher="pictograms",
            proposals="fit",
            fit_epochs=1,
            prompts="single",
            keep=16,
            executor=Executor(workers=_num_workers(device)),
            device=device,
            command="demo",
        ),
        say,
    )
    say("\n".join(summary.lines()))
    clock.lap("cache")
    say("3/4  stage 2: two students side by side, with and without distillation")
    scored = _train_rows(out, data_root, cache, device)
    clock.lap("train and score")
    say("4/4  writing the page")
    page = out / "report.html"
    _write_page(page, data_root, scored, seconds)
    clock.lap("page")
    print_metrics([(row.name, each.evaluation.metrics) for row, each in scored])
    print("APr: the novel names, which no training box ever showed")
    times = ", ".join(f"{part} {format_duration(value)}" for part, value in seconds.items())
    print(f"time: {times}; {format_duration(sum(seconds.values()))} in all")
    print(f"pictures of the detections: {page.resolve()}")
    metrics = {row.name: each.evaluation.metrics.as_json() for row, each in scored}
    return DemoSummary(page=page, metrics=metrics, seconds=seconds)


def demo_page(out: Path, device: str) -> Any:
    """Returns the parts of the local page (`dkdetr.inference.serve`) on what a demo made."""
    from pipeline.served_page import PageRequest, open_page

    runs = tuple(out / "runs" / row.name for row in reversed(_ROWS))
    return open_page(
        PageRequest(
            runs=runs,
            cache=out / "cache",
            pictures=out / "data" / "pictograms" / "tiny" / "images" / "val",
            threshold=_PAGE_THRESHOLD,
            report=out / "report.html",
            data_root=out / "data",
            device=device,
        )
    )


def _num_workers(device: str) -> int:
    """Processes that embed: two where only the CPU can, none beside this one with a GPU."""
    on_cpu = pick_device(device).type == "cpu"
    return min(2, cores_at_hand()) if on_cpu else 0


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._since = time.monotonic()

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self._seconds[part] = round(now - self._since, 1)
        self._since = now


def _train_rows(out: Path, data_root: Path, cache: Path, device: str) -> list[tuple[_Row, Scored]]:
    configs = [load_experiment(_EXPERIMENT, row.overrides).config for row in _ROWS]
    folders = [out / "runs" / row.name for row in _ROWS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(_ROWS), mp_context=context) as pool:
        waiting = [
            pool.submit(_train_and_score, TrainRequest(cache, config, folder, data_root, device))
            for config, folder in zip(configs, folders, strict=True)
        ]
        _watch(waiting, folders, _num_iterations(configs[0], cache, data_root))
        return list(zip(_ROWS, [each.result() for each in waiting], strict=True))


def _num_iterations(config: ExperimentConfig, cache: Path, data_root: Path) -> int:
    vocabulary = from_metadata(*open_cache(cache).text())
    split = load_split(f"{_SPLIT}_train", data_root)
    length = batches_per_epoch(split, vocabulary, config, cache_path=cache)
    return length * config.optim.epochs


def _train_and_score(request: TrainRequest) -> Scored:
    """Runs in a process of its own, one thread: the rows share the machine's cores."""
    torch.set_num_threads(1)
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    request.run.mkdir(parents=True, exist_ok=True)
    with (request.run / "log.txt").open("a", encoding="utf-8") as log:
        sys.stderr = log
        train(request)
        scored = evaluate_run(
            EvalRequest(
                run=request.run,
                split=f"{_SPLIT}_val",
                vocabulary=None,
                data_root=request.data_root,
                device=request.device,
            )
        )
        assert scored is not None, "one process is the first rank"
        return scored


def _stop_with_parent(parent: int) -> None:
    """Sends SIGTERM once the parent is gone: the row saves itself, and a second one ends it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10.0)


def _watch(waiting: Sequence[Future[Scored]], folders: Sequence[Path], total: int) -> None:
    """Shows how far the slower row is, from the rows' own diaries, until both are done."""
    with progress("train both", total) as advance:
        while not all(each.done() for each in waiting):
            last = [read_metrics(RunFolder(folder).metrics)[-1:] for folder in folders]
            done = min(int(rows[0]["iteration"]) if rows else 0 for rows in last)
            totals = [rows[0].get("total") if rows else None for rows in last]
            losses = ["-" if total is None else f"{total:.1f}" for total in totals]
            advance(done, f"loss {' / '.join(losses)}" if done < total else "scoring")
            if any(each.done() and each.exception() for each in waiting):
                break
            time.sleep(1.0)
        advance(total, "")


def _write_page(
    page: Path, data_root: Path, scored: Sequence[tuple[_Row, Scored]], seconds: dict[str, float]
) -> None:
    split: Split = load_split(f"{_SPLIT}_val", data_root)
    truth = ground_truth_of(split)
    runs = [
        RunForReport(
            name=row.name,
            note=row.note,
            metrics=each.evaluation.metrics,
            results=read_results(each.evaluation.paths["results"]),
        )
        for row, each in scored
    ]
    attribution = (data_root / "pictograms" / "tiny" / "ATTRIBUTION.txt").read_text("utf-8")
    times = ", ".join(f"{part} {format_duration(value)}" for part, value in seconds.items())
    write_report(
        page,
        title="DK-DETR on pictograms: finding what was never annotated",
        about=[
            ("command", "dkdetr demo"),
            ("date", datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC")),
            ("versions", f"Python {platform.python_version()}, PyTorch {torch.__version__}"),
            ("machine", f"{platform.machine()}, {cores_at_hand()} cores"),
            ("time", times),
        ],
        split=split,
        truth=truth,
        runs=runs,
        chosen=choose_images(truth, count=_NUM_PICTURES),
        notes=[
            "Both students were trained in this run, from the same cache and on the same batches. "
            "Pictograms are a model of the problem, not LVIS: these figures say nothing about "
            "LVIS's.",
            attribution,
        ],
    )
