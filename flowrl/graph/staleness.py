"""The arithmetic of staleness: how many credits keep which bound.

With `initial` credits, `per_version` groups learned per version and a window of W groups, a group is admitted only
while fewer than `initial` are out. So at most initial - 1 older groups and, through the window, W - 1 younger ones are
learned between its admission and itself. Staleness is therefore at most (initial + W - 2) // per_version policy
versions. `Graph.check` refuses what exceeds the bound; the virtual-clock tests try to break it.

Tests: tests/unit/graph/test_graph.py
"""

from __future__ import annotations

from typing import NamedTuple


class Admission(NamedTuple):
    """What a stage that returns credits learns; the numbers of the bound are said here and nowhere else."""

    per_version: int  # groups learned into each version
    versions: int | None = None  # the run ends after so many; None: when the source says so
    max_staleness: int | None = None  # policy versions; None: no policy of this run has sampled what it learns

    def most_credits(self, window: int) -> int:
        """Return the credits that keep within `max_staleness`; without a policy those of two versions.

        >>> Admission(per_version=64, max_staleness=2).most_credits(window=1)
        192
        """
        return most_credits(1 if self.max_staleness is None else self.max_staleness, self.per_version, window)


def staleness_bound(initial: int, per_version: int, window: int) -> int:
    """Return the greatest staleness, in policy versions, that these credits allow.

    >>> staleness_bound(initial=300, per_version=64, window=1)
    4
    >>> staleness_bound(initial=64, per_version=64, window=1)
    0
    """
    return (initial + window - 2) // per_version


def most_credits(max_staleness: int, per_version: int, window: int) -> int:
    """Return the most credits that keep staleness within `max_staleness` policy versions.

    >>> most_credits(max_staleness=2, per_version=64, window=1)
    192
    """
    return (max_staleness + 1) * per_version + 1 - window
