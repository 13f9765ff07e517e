"""Charts as the template draws them: what stands where, in percent of the plot, and the words on the axes.

A plot is an SVG that is stretched to its place, with every label an HTML element at a percentage, so that a chart is
readable at any width.

Invariants:
- pure functions of figures;
- every x, y and label is finite;
- at most `MOST_POINTS` points a line, each the mean of as many neighbours as that takes.

Called by page.py.

Tests: tests/unit/telemetry/test_charts.py
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

import msgspec

from flowrl.telemetry.view import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MOST_POINTS = 240
ROOM = 0.06  # of the height that is left free above and below the lines
LEAST_RANGE = 0.01  # of the values: smaller changes are drawn as small, not blown up to the height of the plot
NICE = (1.0, 2.0, 2.5, 5.0, 10.0)  # a tick's distance is one of these times a power of ten
NICE_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 43_200, 86_400)

Points = list[tuple[float, float]]  # x and y, x ascending


class Tick(msgspec.Struct, frozen=True):
    """A label on an axis."""

    at: float  # percent of the axis
    label: str


class ChartLine(msgspec.Struct, frozen=True):
    """A series as a path, and its values for whoever points at the chart."""

    name: str
    path: str
    last: str  # its last value in words
    values: list[float | None]  # at the chart's places
    whiskers: str = ""  # path of the intervals about its points


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """A plot of lines, or of means with their intervals."""

    title: str
    lines: list[ChartLine]
    places: list[float]  # of the values, percent of the width
    labels: list[str]  # what stands at each place, in words
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    note: str = ""


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x_name: str = "version",
    half_widths: Mapping[str, Mapping[float, float]] | None = None,
    note: str = "",
) -> Chart | None:
    """Return a chart of series over whole numbers, or None where they have no finite point.

    `half_widths` are those of intervals about a series' points, by its name and x.
    """
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return None
    num_merged = math.ceil(max(map(len, finite.values())) / MOST_POINTS)
    if num_merged > 1:
        finite = {name: thinned(points, num_merged) for name, points in finite.items()}
        note = f"{note + '; ' if note else ''}each point is the mean of {num_merged} {x_name}s"
    spread = {
        name: {x: w for x, w in widths.items() if math.isfinite(w)} for name, widths in (half_widths or {}).items()
    }
    xs = sorted({x for points in finite.values() for x, _ in points})
    ys = [y for points in finite.values() for _, y in points]
    ys += [
        y + sign * widths[x]
        for name, widths in spread.items()
        for x, y in finite.get(name, [])
        if x in widths
        for sign in (-1, 1)
    ]
    x_at = _scale(xs[0], xs[-1])
    low, high = _with_room(min(ys), max(ys))
    y_at = _scale(low, high)
    return Chart(
        title=title,
        lines=[_line(name, points, xs, x_at, y_at, spread.get(name, {})) for name, points in finite.items()],
        places=[round(x_at(x), 2) for x in xs],
        labels=[f"{x_name} {x:g}" for x in xs],
        x_ticks=[Tick(round(x_at(x), 2), f"{x:g}") for x in ticks(xs[0], xs[-1], most=5, is_whole=True)],
        y_ticks=[Tick(round(y_at(y), 2), number(y)) for y in ticks(low, high, most=4)],
        note=note,
    )


def _line(
    name: str,
    points: Points,
    xs: Sequence[float],
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    widths: Mapping[float, float],
) -> ChartLine:
    steps = [f"{x_at(x):.2f} {100 - y_at(y):.2f}" for x, y in points]
    path = "M" + "L".join(steps) + ("h0" if len(steps) == 1 else "")  # a line of no length is drawn as a dot
    known = dict(points)
    values = [float(f"{known[x]:.4g}") if x in known else None for x in xs]
    whiskers = "".join(
        f"M{x_at(x):.2f} {100 - y_at(y - widths[x]):.2f}V{100 - y_at(y + widths[x]):.2f}"
        for x, y in points
        if x in widths
    )
    return ChartLine(name, path, number(points[-1][1]), values, whiskers)


def thinned(points: Points, count: int) -> Points:
    """Return the means of `count` neighbours each; [(1, 0), (2, 4), (3, 5)] by 2 is [(1.5, 2), (3, 5)]."""
    parts = [points[first : first + count] for first in range(0, len(points), count)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def ticks(low: float, high: float, *, most: int, is_whole: bool = False) -> list[float]:
    """Return round numbers between two, at most so many and at least one; 0.13 to 0.41 gives 0.2, 0.3, 0.4."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    distance = next(power * nice for nice in NICE if power * nice >= raw * (1 - 1e-9))
    if is_whole:
        distance = max(1, math.ceil(distance))
    first = math.ceil(low / distance - 1e-9)
    found = [step * distance for step in range(first, math.floor(high / distance + 1e-9) + 1)]
    return [float(each) for each in found] or [low]


def duration_ticks(total_s: float, *, most: int = 6) -> list[Tick]:
    """Return round durations from 0 to a total, at percentages of it."""
    if total_s <= 0:
        return [Tick(0.0, format_duration(0))]
    distance_s = next((nice for nice in NICE_S if total_s / nice <= most), math.ceil(total_s / most / 86_400) * 86_400)
    return [
        Tick(round(100 * at / total_s, 2), format_duration(at)) for at in range(0, math.floor(total_s) + 1, distance_s)
    ]


def number(value: float) -> str:
    """Return a number in few characters: 0.1328, 7.125, 33,120, 1.2e-06."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.4g}"


def _with_room(low: float, high: float) -> tuple[float, float]:
    """Widen a range a little; one that comes near 0 begins there, and what hardly changes is to look like it."""
    if low == high == 0:
        return 0.0, 1.0
    if high - low < LEAST_RANGE * max(abs(low), abs(high)):
        half = LEAST_RANGE * max(abs(low), abs(high)) / 2
        return (low + high) / 2 - half, (low + high) / 2 + half
    room = ROOM * (high - low)
    if 0 <= low <= 0.5 * high:
        return 0.0, high + room
    return low - room, high + room


def _scale(low: float, high: float) -> Callable[[float], float]:
    """Return what maps a range to 0 to 100; a range of no width to its middle."""
    return (lambda value: 100 * (value - low) / (high - low)) if high > low else (lambda value: 50.0)
