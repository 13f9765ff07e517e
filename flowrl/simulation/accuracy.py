"""How near a prediction came to a real run of the same graph and steps.

Compared are learned samples per second, staleness and every node's shares between the first and the last step, as a
run's report gives them; the prediction is of a whole run of as many steps, so filling and draining the pipeline is in
both. Used by `flowrl tune --verify` and perf/prediction.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import DataError
from flowrl.simulation.run import simulate
from flowrl.telemetry.causes import Cause
from flowrl.telemetry.history import read_history
from flowrl.telemetry.view import RunView, shares, words

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.simulation.costs import Profile

SHOWN = 0.02  # a share of the time below which it is not told
IDLE = (Cause.WAIT_INPUT, Cause.WAIT_ROOM)


class Pair(msgspec.Struct, frozen=True):
    """A figure as it was measured and as it was predicted."""

    measured: float
    predicted: float


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did and what was said of it."""

    samples_per_s: Pair
    staleness: Pair  # mean over learned groups
    shares: dict[str, dict[str, Pair]]  # node -> cause -> part of its replicas' time

    @property
    def error(self) -> float:
        """Return by what part of the measured throughput the predicted one is too high."""
        return self.samples_per_s.predicted / self.samples_per_s.measured - 1

    @property
    def idle(self) -> dict[str, Pair]:
        """Return the part of its time that each node waits for input or room; of nodes that only wait, nothing."""
        return {
            node: Pair(sum(pairs[cause].measured for cause in IDLE), sum(pairs[cause].predicted for cause in IDLE))
            for node, pairs in self.shares.items()
            if pairs[Cause.COMPUTE].measured > SHOWN or pairs[Cause.COMPUTE].predicted > SHOWN
        }

    @property
    def worst_share(self) -> float:
        """Return the greatest difference of any share, as a part of the time."""
        return max(abs(pair.predicted - pair.measured) for node in self.shares.values() for pair in node.values())


def accuracy(run_dir: Path, graph: Graph, profile: Profile) -> Accuracy:
    """Predict a run that has ended and hold it against what it did.

    Raises:
        DataError: the run learned fewer than two steps.
    """
    view = RunView()
    view.fold(happened.event for happened in read_history(run_dir))
    measured = view.steady_per_s("samples")
    if measured is None or view.first_step is None:
        raise DataError(str(run_dir), "learned fewer than two steps", "give it more")
    found = simulate(graph, profile, steps=view.num_steps_done, is_whole=True, detail="causes")
    learned = view.staleness - Counter(view.first_step.staleness)  # as samples are counted: after the first step
    mean = sum(stale * count for stale, count in learned.items()) / max(1, learned.total())
    return Accuracy(
        samples_per_s=Pair(measured, found.samples_per_s),
        staleness=Pair(mean, found.mean_staleness),
        shares={node: _pairs(shares(view.steady_seconds(node)), predicted) for node, predicted in found.shares.items()},
    )


def _pairs(measured: dict[str, float], predicted: dict[str, float]) -> dict[str, Pair]:
    return {cause.value: Pair(measured.get(cause, 0.0), predicted.get(cause, 0.0)) for cause in Cause}


def describe(found: Accuracy, label: str) -> str:
    """Return a comparison for people: measured first, predicted in brackets."""
    rate, stale = found.samples_per_s, found.staleness
    lines = [
        f"{label}: {rate.measured:.2f} samples/s measured, {rate.predicted:.2f} predicted ({found.error:+.1%}); "
        f"staleness {stale.measured:.2f}, {stale.predicted:.2f} predicted"
    ]
    for node, pairs in found.shares.items():
        told = [(cause, pair) for cause, pair in pairs.items() if max(pair.measured, pair.predicted) > SHOWN]
        told_words = ", ".join(f"{words(cause)} {p.measured:.0%} ({p.predicted:.0%})" for cause, p in told)
        lines.append(f"    {node:<10} {told_words}")
    lines.append(f"    greatest difference of a share: {found.worst_share:.0%} of the time")
    return "\n".join(lines)
