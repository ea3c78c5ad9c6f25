"""Where a training step's time goes, part by part, from a profile.

The parts of the student and the matching are marked from outside, for the time of a profile alone;
`dkdetr.engine.step` and `train` mark the rest themselves.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from dkdetr.losses import criterion

PARTS: tuple[str, ...] = (
    "data wait", "views", "backbone", "neck", "encoder", "first stage", "decoder", "masks",
    "rest of forward", "matching", "losses", "backward", "optimiser",
)  # fmt: skip
REST = "the rest"
_MARK = "part: "
_STEP = "ProfilerStep"
_MODULES = {
    "backbone": "trunk.backbone",
    "neck": "trunk.neck",
    "encoder": "trunk.encoder",
    "first stage": "trunk.query_selection",
    "decoder": "decoder",
    "masks": "mask_head",
}


def marked(part: str) -> record_function:
    """Returns a context under which a profile counts time for a part; nearly free without one."""
    assert part in PARTS, part
    return record_function(_MARK + part)


@contextmanager
def marked_modules(student: nn.Module) -> Iterator[None]:
    """Marks the student's parts and the matching while it is open; the student may be in DDP.

    A compiled student stays whole: marks within it would cut its graph, and another program would
    be profiled. All of it is "rest of forward" then.
    """
    inner = student.module if isinstance(student, DistributedDataParallel) else student
    with ExitStack() as undo:
        for part, name in _MODULES.items() if inner._compiled_call_impl is None else ():
            module = inner
            for step in name.split("."):
                module = getattr(module, step, None)
            if isinstance(module, nn.Module):
                _mark_forward(module, part, undo)
        for function in ("send_costs", "assign"):
            _mark_function(function, undo)
        yield


def _mark_forward(module: nn.Module, part: str, undo: ExitStack) -> None:
    open_ones: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ones.append(marked(part))
        open_ones[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ones.pop().__exit__(None, None, None)

    undo.callback(module.register_forward_pre_hook(enter).remove)
    undo.callback(module.register_forward_hook(leave, always_call=True).remove)


def _mark_function(name: str, undo: ExitStack) -> None:
    plain: Callable[..., Any] = getattr(criterion, name)

    @wraps(plain)
    def measured(*args: Any, **more: Any) -> Any:
        with marked("matching"):
            return plain(*args, **more)

    setattr(criterion, name, measured)
    undo.callback(setattr, criterion, name, plain)


@dataclass(frozen=True)
class PartTime:
    """Milliseconds of a step: on the clock of the process, and of kernels on a GPU."""

    name: str
    clock_ms: float
    gpu_ms: float


@dataclass(frozen=True)
class StepTimes:
    """A step's parts, without the parts that lie within them; they sum to the whole."""

    parts: tuple[PartTime, ...]
    whole_ms: float

    def table(self) -> str:
        """Returns the parts as lines of text."""
        total_gpu = sum(part.gpu_ms for part in self.parts)
        lines = [f"{'part of a step':18s} {'ms':>9s} {'share':>7s} {'GPU ms':>9s}"]
        for part in self.parts:
            share = part.clock_ms / max(self.whole_ms, 1e-9)
            gpu = f"{part.gpu_ms:9.2f}" if total_gpu else f"{'-':>9s}"
            lines.append(f"{part.name:18s} {part.clock_ms:9.2f} {share:7.1%} {gpu}")
        gpu = f"{total_gpu:9.2f}" if total_gpu else f"{'-':>9s}"
        lines.append(f"{'a whole step':18s} {self.whole_ms:9.2f} {'':7s} {gpu}")
        return "\n".join(lines)


def step_times(events: Iterable[Any]) -> StepTimes:
    """Returns the mean times of the profiled steps.

    A GPU works on while the process has gone ahead: read the second column there. Kernels that
    the backward pass launches from a thread of its own count for it.

    Args:
        events: of a finished profile (`profile.events()`).
    """
    on_cpu = [event for event in events if event.device_type.name == "CPU"]
    steps = [event for event in on_cpu if event.name.startswith(_STEP)]
    marks = [event for event in on_cpu if event.name.startswith(_MARK)]
    count = max(1, len(steps))
    whole = sum(_length(event) for event in steps)
    clock = dict.fromkeys(PARTS, 0.0)
    gpu = dict.fromkeys((*PARTS, REST), 0.0)
    spans = sorted(marks, key=lambda event: (event.time_range.start, -event.time_range.end))
    open_ones: list[Any] = []
    for event in spans:
        while open_ones and open_ones[-1].time_range.end <= event.time_range.start:
            open_ones.pop()
        clock[_part(event)] += _length(event)
        if open_ones:
            clock[_part(open_ones[-1])] -= _length(event)
        open_ones.append(event)
    threads = {event.thread for event in marks}
    for event in on_cpu:
        if not event.name.startswith((_MARK, _STEP)) and event.self_device_time_total:
            part = _innermost(event, spans) if event.thread in threads else "backward"
            gpu[part] += event.self_device_time_total
    clock[REST] = whole - sum(clock.values())
    parts = [
        PartTime(name, clock[name] / 1000 / count, gpu[name] / 1000 / count)
        for name in (*PARTS, REST)
        if clock[name] or gpu[name]
    ]
    return StepTimes(tuple(parts), whole / 1000 / count)


def _part(event: Any) -> str:
    return event.name.removeprefix(_MARK)


def _length(event: Any) -> float:
    return event.time_range.end - event.time_range.start


def _innermost(event: Any, spans: list[Any]) -> str:
    """Returns the part that an operation belongs to: of those around it the last to begin."""
    at = event.time_range.start
    last = bisect_right(spans, at, key=lambda span: span.time_range.start)
    around = (span for span in reversed(spans[:last]) if span.time_range.end > at)
    found = next(around, None)
    return REST if found is None else _part(found)
