"""Times by part from hand-made events: nesting, threads, the rest."""

from dataclasses import dataclass

import pytest
from torch.autograd import DeviceType

from dkdetr.engine.step_parts import REST, step_times


@dataclass(frozen=True)
class Range:
    start: float
    end: float


@dataclass(frozen=True)
class Event:
    name: str
    time_range: Range
    thread: int = 1
    device_type: DeviceType = DeviceType.CPU
    self_device_time_total: float = 0.0


def event(name: str, start: float, end: float, **more) -> Event:
    return Event(name, Range(start, end), **more)


EVENTS = [
    event("ProfilerStep#3", 0, 100_000),
    event("part: data wait", 1_000, 11_000),
    event("part: rest of forward", 20_000, 50_000),
    event("part: backbone", 21_000, 31_000),
    event("part: decoder", 31_000, 45_000),
    event("part: losses", 50_000, 70_000),
    event("part: matching", 52_000, 58_000),
    event("part: backward", 70_000, 90_000),
    event("aten::conv", 22_000, 23_000, self_device_time_total=4_000),
    event("aten::cat", 48_000, 48_500, self_device_time_total=300),
    event("aten::cdist", 53_000, 54_000, self_device_time_total=500),
    event("aten::copy_", 95_000, 96_000, self_device_time_total=70),
    event("conv backward", 71_000, 72_000, thread=9, self_device_time_total=9_000),
    event("kernel", 22_500, 26_500, device_type=DeviceType.CUDA, self_device_time_total=4_000),
]


def test_parts_lose_what_lies_in_them_and_sum_to_the_whole() -> None:
    times = step_times(EVENTS)
    ms = {part.name: part.clock_ms for part in times.parts}
    assert ms == pytest.approx(
        {"data wait": 10, "backbone": 10, "decoder": 14, "rest of forward": 6, "matching": 6,
         "losses": 14, "backward": 20, REST: 20}
    )  # fmt: skip
    assert sum(ms.values()) == times.whole_ms == 100
    gpu = {part.name: part.gpu_ms for part in times.parts if part.gpu_ms}
    assert gpu == pytest.approx(
        {"backbone": 4, "rest of forward": 0.3, "matching": 0.5, "backward": 9, REST: 0.07}
    )
    assert "a whole step          100.00" in times.table()


def test_several_steps_give_their_mean() -> None:
    later = [event("ProfilerStep#4", 100_000, 140_000), event("part: backward", 110_000, 120_000)]
    times = step_times([*EVENTS, *later])
    assert times.whole_ms == 70
    assert {part.name: part.clock_ms for part in times.parts}["backward"] == 15
