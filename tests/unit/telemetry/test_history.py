"""A run's past read back from its files is the run that was told to the sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.graph.graph import RunSettings
from flowrl.telemetry.events import EdgeStatus, Span, Status, Step
from flowrl.telemetry.sinks import open_sinks
from flowrl.telemetry.timeline import read_history, read_timeline, timelines
from flowrl.telemetry.view import RunView, shares
from tests.unit.telemetry.streams import random_run, status, step

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.telemetry.events import Event


def told(run_dir: Path, events: list[Event]) -> RunView:
    """Give events to the sinks of a run, as its launcher does."""
    with open_sinks(run_dir, RunSettings(), title="run") as sinks:
        sinks.say = lambda line: None
        sinks.consume(events)
    return sinks.view


def events_of(run_dir: Path, start: int = 0) -> list[Event]:
    return [happened.event for happened in read_history(run_dir) if happened.start == start]


@pytest.mark.parametrize("seed", range(3))
def test_spans_steps_and_queue_fill_come_back(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = random_run(seed)
    told(tmp_path, events)
    found = events_of(tmp_path)

    def spans(of: list[Event]) -> list[Span]:
        return sorted((e for e in of if isinstance(e, Span)), key=lambda e: (e.node, e.name, e.groups))

    for ours, theirs in zip(spans(found), spans(events), strict=True):
        assert (ours.node, ours.replica, ours.name, ours.groups) == (
            theirs.node, theirs.replica, theirs.name, theirs.groups,
        )  # fmt: skip
        assert (ours.start_s, ours.end_s) == pytest.approx((theirs.start_s, theirs.end_s), abs=2e-6)
    assert [e for e in found if isinstance(e, Step)] == [e for e in events if isinstance(e, Step)]
    fills = [e.items for e in events if isinstance(e, EdgeStatus)]
    changes = [now for before, now in zip([None, *fills], fills, strict=False) if now != before]
    assert [e.items for e in found if isinstance(e, EdgeStatus)] == changes


@pytest.mark.parametrize("seed", range(3))
def test_the_shares_of_each_node_s_time_come_back(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = told(tmp_path, random_run(seed))
    read = RunView()
    read.fold(events_of(tmp_path))
    assert read.slot_occupancy("generator") == pytest.approx(0.4, abs=0.001)
    assert read.slot_occupancy("learner") is None
    assert read.nodes == live.nodes
    for node in live.nodes:
        assert shares(read.node_seconds(node)) == pytest.approx(shares(live.node_seconds(node)), abs=0.002)


def test_the_starts_of_a_resumed_run_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(tmp_path, [status(at=10.0), step(1, at=11.0), status(at=12.0, computing=2.0)])
    told(tmp_path, [status(at=500.0), step(2, at=501.0), status(at=502.0, computing=1.0)])
    assert [path.name for path in timelines(tmp_path)] == ["timeline.json", "timeline-2.json"]
    steps = [(h.start, h.event.version) for h in read_history(tmp_path) if isinstance(h.event, Step)]
    assert steps == [(0, 1), (1, 2)]


def test_a_timeline_that_was_cut_short_gives_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(tmp_path, random_run(0))
    path = tmp_path / "timeline.json"
    whole = list(read_timeline(path))
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    part = list(read_timeline(path))
    assert 0 < len(part) < len(whole)
    assert part == whole[: len(part)]


def test_without_a_timeline_there_are_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(tmp_path, random_run(0))
    (tmp_path / "timeline.json").unlink()
    assert [type(event) for event in events_of(tmp_path)] == [Step] * 6
    assert not list(read_history(tmp_path / "nowhere"))


def test_a_replica_s_seconds_begin_with_its_first_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(tmp_path, [status(at=10.0, computing=7.0), status(at=14.0, computing=8.0, waiting_for_input=3.0)])
    found = [event for event in events_of(tmp_path) if isinstance(event, Status)]
    assert [sum(each.seconds.values()) for each in found] == [0.0, 4.0]
    assert found[1].seconds["computing"] == pytest.approx(1.0, abs=0.01)
