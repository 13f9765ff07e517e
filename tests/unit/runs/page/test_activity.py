"""Time in bins: nothing is lost however often they are widened, and strips show what was added."""

from __future__ import annotations

import random

import pytest

from flowrl.runs.page.activity import Activity, Bins, node_strips, queue_strips
from flowrl.telemetry.events import Cause
from flowrl.telemetry.timeline import Happened
from tests.unit.telemetry.streams import EDGE, edge, span, status


@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_what_was_added_and_never_grow_in_number(seed: int) -> None:
    draw = random.Random(seed)
    bins = Bins(most=16)
    added = {"a": 0.0, "b": 0.0}
    for _ in range(200):
        key, start_s = draw.choice("ab"), draw.expovariate(1 / 20)
        amount = draw.random()
        bins.add("row", key, start_s, start_s + draw.choice([0.0, draw.random(), 30 * draw.random()]), amount)
        added[key] += amount
    row = bins.row("row")
    assert max(row) < 16
    for key, amount in added.items():
        assert sum(amounts.get(key, 0.0) for amounts in row.values()) == pytest.approx(amount)


def test_an_amount_lies_where_its_time_was() -> None:
    bins = Bins(most=4)
    bins.add("row", "x", 0.0, 0.5, 2.0)
    assert bins.row("row") == {0: {"x": 1.0}, 1: {"x": 1.0}}
    bins.add("row", "x", 1.5, 2.0, 4.0)  # beyond 1 s: bins of half a second now
    assert (bins.width_s, bins.row("row")) == (0.5, {0: {"x": 2.0}, 3: {"x": 4.0}})


def activity_of(*happened: Happened) -> Activity:
    activity = Activity()
    for each in happened:
        activity.consume(each)
    activity.close()
    return activity


def test_a_node_s_strip_stacks_its_shares() -> None:
    activity = activity_of(
        Happened(0, status(at=100.0)),
        Happened(0, status(at=101.0, computing=0.25, waiting_for_input=0.75)),
        Happened(0, status(at=102.0, computing=1.25, waiting_for_input=0.75)),
    )
    (strip,) = node_strips(activity, ["generator"], list(Cause))
    assert strip.about == "computing 62%, waiting for input 38%"
    assert strip.labels[0] == "computing 25%, waiting for input 75%"
    assert strip.labels[-1] == "computing 100%"
    paths = {band.kind: band.path for band in strip.bands}
    assert paths == {"computing": "M0 75h4v25h-4zM4 0h4v100h-4z", "waiting_for_input": "M0 0h4v75h-4z"}


def test_a_queue_s_strip_holds_its_fill_until_it_changes() -> None:
    activity = activity_of(
        Happened(0, edge(5, at=100.0)), Happened(0, edge(0, at=102.0)), Happened(0, status(at=104.0))
    )
    (strip,) = queue_strips(activity, [EDGE])
    assert strip.about == "mean 2.5, greatest 5, of 10"
    assert strip.bands[0].path == "M0 50h8v50h-8z"


def test_the_time_between_two_starts_is_left_out() -> None:
    activity = activity_of(
        Happened(0, status(at=100.0)),
        Happened(0, status(at=110.0, computing=10.0)),
        Happened(1, status(at=9000.0)),
        Happened(1, status(at=9005.0, computing=5.0)),
    )
    assert (activity.starts_s, activity.end_s) == ([0.0, 10.0], 15.0)
    assert sum(sum(row.values()) for row in activity.nodes.row("generator").values()) == pytest.approx(15.0)


def test_the_longest_pause_of_a_version_is_kept() -> None:
    updates = [span("generator", "weight update v3", 100.0, 101.0, replica=replica) for replica in range(3)]
    for update, pause_s in zip(updates, (0.2, 0.7, 0.4), strict=True):
        update.args.update(pause_s=pause_s, transfer_s=2 * pause_s)
    published = span("learner", "publish v3", 99.0, 101.5)
    activity = activity_of(*(Happened(0, each) for each in [*updates, published]))
    assert activity.pauses == {3: ("generator.1", 0.7, 1.4)}
    assert activity.published_s == {3: 2.5}
