"""The view of a run: rates, shares, the estimate of the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.telemetry.events import Cause
from flowrl.telemetry.view import RunView, format_duration, shares
from tests.unit.telemetry.streams import evaluation, notice, random_run, span, status, step

if TYPE_CHECKING:
    from flowrl.telemetry.events import Event


def view_of(*events: Event, expected: tuple[str, ...] = ()) -> RunView:
    view = RunView(expected=expected)
    view.fold(events)
    return view


def test_end_is_estimated_from_the_pace_of_the_recent_steps() -> None:
    view = view_of(step(10, at=100.0), step(12, at=130.0))
    assert view.step_interval_s == 15.0
    assert view.remaining_s == 28 * 15.0


def test_estimate_follows_a_change_of_pace() -> None:
    slow = [step(v, at=100.0 * v) for v in range(1, 11)]
    fast = [step(10 + v, at=1000.0 + v) for v in range(1, 12)]
    assert view_of(*slow, *fast).step_interval_s == pytest.approx(1.0)


def test_nothing_is_estimated_before_the_second_step() -> None:
    assert view_of(status(at=1.0)).remaining_s is None
    assert view_of(step(1, at=50.0)).remaining_s is None


def test_steps_done_again_after_a_crash_replace_the_old_ones_in_the_pace() -> None:
    view = view_of(step(5, at=10.0), step(6, at=20.0), step(4, at=50.0), step(5, at=62.0))
    assert view.step_interval_s == 12.0
    assert view.remaining_s == 35 * 12.0


def test_tokens_per_second_leave_out_the_step_that_opens_the_window() -> None:
    view = view_of(
        status(at=0.0), step(1, at=10.0, tokens=500), step(2, at=20.0, tokens=300), step(3, at=30.0, tokens=500)
    )
    assert view.recent_per_s("tokens") == 40.0
    assert view.steady_per_s("tokens") == 40.0
    assert view.overall_per_s("tokens") == pytest.approx(1300 / 30)


@pytest.mark.parametrize("seed", range(3))
def test_shares_add_up_to_one(seed: int) -> None:
    view = RunView()
    view.fold(random_run(seed))
    for node in view.nodes:
        assert sum(shares(view.node_seconds(node)).values()) == pytest.approx(1.0)
        assert sum(shares(view.steady_seconds(node)).values()) == pytest.approx(1.0)
    assert shares({}) == {}


@pytest.mark.parametrize("seed", range(3))
def test_batches_do_not_matter(seed: int) -> None:
    events = random_run(seed)
    whole, pieces = RunView(), RunView()
    whole.fold(events)
    for at in range(0, len(events), 7):
        pieces.fold(events[at : at + 7])
    assert whole.remaining_s == pieces.remaining_s
    assert whole.staleness == pieces.staleness
    assert [vars(r) for r in whole.replicas] == [vars(r) for r in pieces.replicas]


def test_busy_share_between_first_and_last_step_leaves_out_start_and_end() -> None:
    view = view_of(
        status(at=10.0, start=10.0),
        step(1, at=10.5),
        status(at=20.0, start=10.0, computing=9.0, waiting_for_input=1.0),
        step(2, at=20.5),
        status(at=40.0, start=10.0, computing=9.0, waiting_for_input=21.0),
    )
    assert {cause: share for cause, share in shares(view.steady_seconds("generator")).items() if share} == {
        "computing": 0.9,
        "waiting_for_input": 0.1,
    }


def test_a_run_of_one_step_takes_the_whole_time_but_its_start() -> None:
    view = view_of(status(at=20.0, start=10.0, computing=5.0, waiting_for_input=5.0), step(1, at=21.0))
    assert shares(view.steady_seconds("generator"))[Cause.COMPUTE] == 0.5


def test_a_restarted_replica_goes_on_counting() -> None:
    view = view_of(
        status(at=10.0, computing=10.0, done=7),
        status(at=20.0, start=2.0, done=0),
        status(at=25.0, start=2.0, computing=5.0, done=3),
    )
    (replica,) = view.replicas
    assert replica.done == 10
    assert replica.seconds == {"computing": 15.0, "start": 2.0}
    assert replica.rate_per_s == pytest.approx(3 / 5)
    assert (replica.observed_s, replica.charged_s) == (5.0, 5.0)


def test_starting_replicas_and_silent_nodes_are_named() -> None:
    view = view_of(
        status(at=12.0, cause=Cause.START, start=12.0),
        status("reward", at=12.0),
        expected=("generator", "reward", "learner"),
    )
    assert view.starting(13.0) == "generator.0 starting 13 s; not heard from yet: learner"
    view.fold([status(at=20.0, computing=8.0, start=12.0), status("learner", at=20.0)])
    assert view.starting(20.0) == ""


def test_nodes_come_in_the_expected_order_and_strangers_after() -> None:
    view = view_of(
        status("tap", at=1.0), status("b", at=1.0), status("a", 1, at=1.0), status("a", at=1.0), expected=("a", "b")
    )
    assert [replica.name for replica in view.replicas] == ["a.0", "a.1", "b.0", "tap.0"]


def test_nodes_on_the_path_are_those_that_handle_groups() -> None:
    view = view_of(span("generator", "generate", 0, 1, 4), span("learner", "publish v1", 0, 1))
    assert view.path_nodes == {"generator"}
    assert view.generator_nodes == {"generator"}


def test_recalled_evaluations_are_no_part_of_the_run_s_time() -> None:
    view = RunView()
    view.recall([evaluation(0, [[1.0]], at=5.0)])
    view.fold([status(at=100.0), notice("late", at=101.0), notice("by the way", level="info", at=101.0)])
    assert view.started_s == 100.0
    assert list(view.evaluations) == [0]
    assert view.num_warnings == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(11.6, "12 s"), (190, "3m10s"), (7500, "2h05m"), (277_200, "3d05h"), (-1, "0 s"), (59.6, "1m00s")],
)
def test_durations_read_in_one_or_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
