"""Charts: points stand where their values say, ticks are round, and a long run stays small."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest

from flowrl.telemetry.charts import MOST_POINTS, duration_ticks, line_chart, number, thinned, ticks


def test_points_stand_in_proportion() -> None:
    chart = line_chart("reward", {"mean": [(0.0, 0.0), (1.0, 5.0), (4.0, 10.0)]})
    assert chart is not None
    corners = [tuple(map(float, pair.split())) for pair in re.split("[ML]", chart.lines[0].path)[1:]]
    height = 10.6  # 0 to 10 with 6 % of room above
    expected = [(0.0, 100.0), (25.0, 100 - 500 / height), (100.0, 100 - 1000 / height)]
    assert [corner for pair in corners for corner in pair] == pytest.approx([v for p in expected for v in p], abs=0.01)
    assert chart.labels == ["version 0", "version 1", "version 4"]
    assert chart.lines[0].last == "10"


def test_lines_of_different_lengths_share_one_axis() -> None:
    chart = line_chart("loss", {"training": [(1, 2.0), (2, 1.0)], "held-out": [(2, 1.5)], "none": [(1, math.nan)]})
    assert chart is not None
    assert [line.values for line in chart.lines] == [[2.0, 1.0], [None, 1.5]]
    assert chart.lines[1].path.endswith("h0"), "a dot"


def test_what_is_not_finite_is_no_chart() -> None:
    assert line_chart("reward", {"mean": [(0, math.nan), (1, math.inf)]}) is None
    assert line_chart("reward", {}) is None


def test_intervals_are_within_the_plot() -> None:
    chart = line_chart("score", {"mean": [(0, 0.1), (9, 0.4)]}, half_widths={"mean": {0: 0.05, 9: math.inf}})
    assert chart is not None
    assert chart.lines[0].whiskers.count("M") == 1, "an interval of one prompt has no ends"
    low, high = (float(y) for y in re.findall(r"[ V]([\d.]+)", chart.lines[0].whiskers))
    assert 0 <= high < low <= 100


def test_a_long_run_is_thinned_and_says_so() -> None:
    draw = random.Random(0)
    points = [(float(version), draw.random()) for version in range(10_000)]
    chart = line_chart("reward", {"mean": points})
    assert chart is not None
    assert len(chart.places) <= MOST_POINTS
    assert chart.note == "each point is the mean of 42 versions"
    mean = sum(y for _, y in thinned(points, 100)) / 100
    assert mean == pytest.approx(sum(y for _, y in points) / 10_000)


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_few_and_within(seed: int) -> None:
    draw = random.Random(seed)
    low = draw.uniform(-10, 10) * 10 ** draw.uniform(-6, 6)
    high = low + 10 ** draw.uniform(-6, 6)
    found = ticks(low, high, most=4)
    assert 1 <= len(found) <= 5
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in found)
    distances = {float(f"{b - a:.3g}") for a, b in itertools.pairwise(found)}
    assert all(re.fullmatch(r"(1|2|2\.5|5)e[+-]\d+|[125]", f"{d:.1e}".replace(".0e", "e")) for d in distances)


def test_what_hardly_changes_looks_like_it() -> None:
    chart = line_chart("ess", {"ess": [(1, 0.99999), (2, 1.0)]})
    assert chart is not None
    heights = [float(y) for y in re.findall(r" ([\d.]+)", chart.lines[0].path)]
    assert abs(heights[0] - heights[1]) < 1
    assert len({tick.label for tick in chart.y_ticks}) == len(chart.y_ticks)


@pytest.mark.parametrize(
    ("total_s", "labels"),
    [
        (7.5, ["0 s", "2 s", "4 s", "6 s"]),
        (473, ["0 s", "2m00s", "4m00s", "6m00s"]),
        (30 * 86_400, ["0 s", "5d00h", "10d00h", "15d00h", "20d00h", "25d00h", "30d00h"]),
        (0, ["0 s"]),
    ],
)
def test_time_is_marked_in_round_durations(total_s: float, labels: list[str]) -> None:
    assert [tick.label for tick in duration_ticks(total_s)] == labels


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.13281, "0.1328"), (33_120.4, "33,120"), (1.2e-6, "1.2e-06"), (2.5e9, "2.5e+09")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
