"""`train --profile N`: where the time of N steps goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dkdetr.atomic_file import write_text

WARMUP_STEPS = 3
_ROWS = 30


@contextmanager
def profiled(folder: Path, steps: int) -> Iterator[profile]:
    """Yields a profiler whose `step` is to be called after each training step.

    It looks away for the first `WARMUP_STEPS`. Afterwards `folder` holds `trace.json` (for
    chrome://tracing or Perfetto) and `table.txt`; the table is printed too.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=steps, repeat=1)
    tables: list[str] = []

    def keep(finished: profile) -> None:
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / "trace.json"))
        tables.append(finished.key_averages().table(sort_by=key, row_limit=_ROWS))

    with profile(activities=activities, schedule=plan, on_trace_ready=keep) as profiler:
        yield profiler
    for table in tables:
        write_text(folder / "table.txt", table + "\n")
        print(table)
