"""`train --profile N`: where the time of N steps goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from dkdetr.atomic_file import write_text
from dkdetr.engine.step_parts import marked_modules, step_times

WARMUP_STEPS = 3
_ROWS = 30


@contextmanager
def profiled(folder: Path, steps: int, student: nn.Module) -> Iterator[profile]:
    """Yields a profiler whose `step` is to be called after each training step.

    It looks away for the first `WARMUP_STEPS`. Afterwards `folder` holds `trace.json` (for
    chrome://tracing or Perfetto) and `table.txt`: the parts of a step (dkdetr.engine.step_parts),
    then the costliest operations; the table is printed too.
    """
    tables: list[str] = []

    def keep(finished: profile) -> None:
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / "trace.json"))
        tables.append(step_times(finished.events() or []).table())
        tables.append(finished.key_averages().table(sort_by=key, row_limit=_ROWS))

    with step_profiler(student, steps, warmup=WARMUP_STEPS, keep=keep) as profiler:
        yield profiler
    if tables:
        text = "\n\n".join(tables)
        write_text(folder / "table.txt", text + "\n")
        print(text)


@contextmanager
def step_profiler(
    student: nn.Module, steps: int, *, warmup: int, keep: Callable[[profile], None] | None = None
) -> Iterator[profile]:
    """Yields a profiler whose `step` is to be called after each training step.

    Args:
        student: its parts are marked while this is open.
        steps: to be profiled.
        warmup: steps before them, at least one: in the last of them the profiler starts itself.
        keep: called with the profile once `steps` are done.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=warmup - 1, warmup=1, active=steps, repeat=1)
    with (
        marked_modules(student),
        # Without `acc_events` torch 2.11 warns of further cycles, and there is one.
        profile(
            activities=activities, schedule=plan, on_trace_ready=keep, acc_events=True
        ) as profiler,
    ):
        yield profiler
