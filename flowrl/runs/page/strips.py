"""Strips: what a node or a queue did over run time as one row of the page, all rows on one axis.

Invariants: pure functions of `Activity`; one rectangle for each run of equal bins, in the grid of an SVG that is
`Activity.nodes` bins wide and 100 high. Called by page.py.

Tests: tests/unit/runs/page/test_activity.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flowrl.runs.page.activity import FILLED, SEEN
from flowrl.telemetry.view import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.runs.page.activity import Activity
    from flowrl.runs.page.bins import Row

MOST_ROWS = 16  # nodes or queues; further ones are left out, and that is said


class Band(msgspec.Struct, frozen=True):
    """One colour of a strip."""

    kind: str  # a cause's value, or "fill"
    name: str
    path: str
    share: str  # of the strip's whole time, in words


class Strip(msgspec.Struct, frozen=True, kw_only=True):
    """A row."""

    name: str
    about: str
    width: int  # of the grid
    bands: list[Band]
    places: list[float]  # of the bins, percent of the width
    labels: list[str]  # what a bin says, in words


def node_strips(activity: Activity, nodes: Sequence[str], causes: Sequence[str]) -> list[Strip]:
    """Return a strip for each node: the shares of its replicas' time by cause, stacked."""
    found: list[Strip] = []
    width = _width(activity)
    for node in [name for name in nodes if name in activity.nodes.names][:MOST_ROWS]:
        bins = {place: row for place, row in activity.nodes.row(node).items() if sum(row.values()) > 0}
        spans: dict[str, list[tuple[int, int, int]]] = {cause: [] for cause in causes}
        for place, row in bins.items():
            level, total = 0.0, sum(row.values())
            for cause in causes:
                top = level + 100 * row.get(cause, 0.0) / total
                spans[cause].append((place, round(level), round(top)))
                level = top
        spent = {cause: sum(row.get(cause, 0.0) for row in bins.values()) for cause in causes}
        whole = sum(spent.values()) or 1.0
        bands = [Band(c, words(c), _path(spans[c]), f"{spent[c] / whole:.0%}") for c in causes if spent[c] > 0]
        about = ", ".join(f"{band.name} {band.share}" for band in bands if band.share != "0%")
        found.append(
            Strip(name=node, about=about, width=width, bands=bands,
                  places=_places(bins, width), labels=[_shares_in_words(row, causes) for row in bins.values()])
        )  # fmt: skip
    return found


def queue_strips(activity: Activity, queues: Sequence[str]) -> list[Strip]:
    """Return a strip for each queue: how much of its depth was filled."""
    found: list[Strip] = []
    width = _width(activity)
    for queue in [name for name in queues if name in activity.queues.names][:MOST_ROWS]:
        bins = {place: row for place, row in activity.queues.row(queue).items() if row.get(SEEN, 0.0) > 0}
        depth = max(1, activity.depths[queue])
        means = {place: row[FILLED] / row[SEEN] for place, row in bins.items()}
        spans = [(place, 0, min(100, round(100 * mean / depth))) for place, mean in means.items()]
        seen_s = sum(row[SEEN] for row in bins.values())
        mean = sum(row[FILLED] for row in bins.values()) / seen_s if seen_s else 0.0
        about = f"mean {mean:.1f}, greatest {activity.most[queue]}, of {depth}"
        found.append(
            Strip(name=queue, about=about, width=width, bands=[Band("fill", "held", _path(spans), "")],
                  places=_places(bins, width), labels=[f"{mean:.1f} of {depth}" for mean in means.values()])
        )  # fmt: skip
    return found


def _width(activity: Activity) -> int:
    """Return the bins up to the end of the run; both sets of rows have bins of one width."""
    return max(1, round(activity.end_s / activity.nodes.width_s + 0.5))


def _places(bins: dict[int, Row], width: int) -> list[float]:
    return [round(100 * (place + 0.5) / width, 2) for place in bins]


def _shares_in_words(row: Row, causes: Sequence[str]) -> str:
    total = sum(row.values())
    return ", ".join(f"{words(c)} {row[c] / total:.0%}" for c in causes if row.get(c, 0.0) / total >= 0.005)


def _path(spans: Sequence[tuple[int, int, int]]) -> str:
    """Return rectangles from (place, low, high); neighbours of one height are one rectangle."""
    parts: list[str] = []
    begin = length = low = high = 0
    for place, bottom, top in [*spans, (-2, 0, 0)]:
        if length and place == begin + length and (bottom, top) == (low, high):
            length += 1
            continue
        if length and high > low:
            parts.append(f"M{begin} {100 - high}h{length}v{high - low}h-{length}z")
        begin, length, low, high = place, 1, bottom, top
    return "".join(parts)
