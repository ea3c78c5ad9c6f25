"""Line charts as inline SVG: no scripts, colours from the page's own light or dark theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 10, 30
_NUM_TICKS = 4


@dataclass(frozen=True)
class Line:
    """One line: its colour is that of run number `run` (from 1)."""

    run: int
    points: Sequence[Sequence[float]]
    """(x, y) each."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, in the chart's own pixels."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """What a template draws: paths in the chart's own pixels, and the axes' marks."""

    title: str
    x_name: str
    paths: tuple[tuple[int, str], ...]
    """(run, SVG path); a line without a point has no path."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def line_chart(
    title: str,
    x_name: str,
    lines: Sequence[Line],
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Chart:
    """Returns the chart; points that are not finite are left out. Ranges default to the data's."""
    kept = [
        Line(line.run, [p for p in line.points if all(map(math.isfinite, p))]) for line in lines
    ]
    points = [point for line in kept for point in line.points] or [(0.0, 0.0), (1.0, 1.0)]
    xs = x_range or _widened([x for x, _ in points])
    ys = y_range or _widened([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        right, down = (x - xs[0]) / (xs[1] - xs[0]), (y - ys[0]) / (ys[1] - ys[0])
        wide, high = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
        # What leaves a given range is drawn at its edge.
        return _LEFT + wide * min(max(right, 0), 1), _TOP + high * (1 - min(max(down, 0), 1))

    paths = []
    for line in kept:
        if line.points:
            spots = [place(*point) for point in line.points]
            paths.append((line.run, "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in spots)))
    return Chart(
        title=title,
        x_name=x_name,
        paths=tuple(paths),
        x_ticks=tuple(Tick(place(x, ys[0])[0], _short(x)) for x in _ticks(*xs)),
        y_ticks=tuple(Tick(place(xs[0], y)[1], _short(y)) for y in _ticks(*ys)),
    )


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Returns round numbers in the range, about `_NUM_TICKS` of them."""
    raw = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * number for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
