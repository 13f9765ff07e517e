"""Amounts over time in a bounded number of bins, whatever the length of the run.

Invariants: the sum of a row's bins is the sum of what was added to it; there are never more than `most` bins, for when
time goes beyond the last one, neighbours are added together and every bin is twice as wide. Used by activity.py.

Tests: tests/unit/runs/page/test_activity.py
"""

from __future__ import annotations

from collections import defaultdict

FIRST_WIDTH_S = 0.25  # finer than a status, so that a run of a minute has a shape

Row = dict[str, float]  # amounts by key


class Bins:
    """Rows of bins on one axis of time that begins at 0."""

    def __init__(self, most: int) -> None:
        self.width_s = FIRST_WIDTH_S
        self._most = most
        self._rows: defaultdict[str, dict[int, Row]] = defaultdict(dict)  # row -> place of the bin -> amounts

    def add(self, row: str, key: str, start_s: float, end_s: float, amount: float) -> None:
        """Spread an amount evenly over a time; Bins(most=4).add("a", "x", 0, 2, 8) puts 1 into each quarter second.

        (That is 8 bins, so they are made twice as wide first, and hold 2 each.)
        """
        start_s, end_s = max(0.0, start_s), max(0.0, start_s, end_s)
        self.reach(end_s)
        first = min(int(start_s / self.width_s), self._most - 1)
        last = min(int(end_s / self.width_s), self._most - 1)
        for place in range(first, last + 1):
            share = 1.0
            if end_s > start_s:
                low, high = max(start_s, place * self.width_s), min(end_s, (place + 1) * self.width_s)
                share = max(0.0, high - low) / (end_s - start_s)
            if share or first == last:
                into = self._rows[row].setdefault(place, {})
                into[key] = into.get(key, 0.0) + share * amount

    def reach(self, time_s: float) -> None:
        """Make the bins wide enough to hold a time; two sets that reach the same time have bins of one width."""
        while time_s > self.width_s * self._most:
            self._widen()

    @property
    def names(self) -> list[str]:
        """Return the rows in the order in which they came up."""
        return list(self._rows)

    def row(self, name: str) -> dict[int, Row]:
        """Return the bins of a row that have anything, by their place."""
        return dict(sorted(self._rows[name].items()))

    def _widen(self) -> None:
        self.width_s *= 2
        for name, bins in self._rows.items():
            wider: dict[int, Row] = {}
            for place, amounts in bins.items():
                into = wider.setdefault(place // 2, {})
                for key, amount in amounts.items():
                    into[key] = into.get(key, 0.0) + amount
            self._rows[name] = wider
