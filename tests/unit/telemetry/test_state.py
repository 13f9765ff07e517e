"""state.json is whole, keeps pace, and says when the run has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.telemetry.metrics import StateFile, read_state, state_path
from flowrl.telemetry.view import RunView
from tests.unit.telemetry.streams import edge, status

if TYPE_CHECKING:
    from pathlib import Path


def test_the_state_keeps_pace_and_ends(tmp_path: Path) -> None:
    times = [100.0]
    view = RunView(expected=("prompts", "generator"))
    file = StateFile(tmp_path, view, now=lambda: times[0])
    first = read_state(tmp_path)
    assert first is not None
    assert (first.started_s, first.nodes, first.is_ended) == (100.0, ["prompts", "generator"], False)
    for times[0], items in ((100.5, 1), (101.0, 2), (101.9, 3)):
        events = [status(at=times[0], computing=times[0] - 99.0, done=items), edge(items, at=times[0])]
        view.fold(events)
        file.consume(events)
    now = read_state(tmp_path)
    assert now is not None
    assert (now.time_s, now.edges[0].items, now.statuses[0].done) == (101.0, 2, 2), "written at most once a second"
    file.close()
    last = read_state(tmp_path)
    assert last is not None
    assert (last.is_ended, last.edges[0].items, last.started_s) == (True, 3, 100.0)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_the_lives_of_a_replica_before_its_restart_are_in_its_state(tmp_path: Path) -> None:
    view = RunView()
    view.fold([status(at=1.0, done=5, computing=8.0), status(at=2.0, done=2, computing=1.0)])
    StateFile(tmp_path, view, now=lambda: 2.0)
    state = read_state(tmp_path)
    assert state is not None
    assert (state.statuses[0].done, state.statuses[0].seconds["computing"]) == (7, 9.0)


def test_a_state_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    state_path(tmp_path).write_text('{"started_s": 1.0, "time')
    assert read_state(tmp_path) is None
