"""Figures of perf.prediction against arithmetic, and every setting it tries against the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flowrl.graph.program import load_program
from flowrl.telemetry.events import Cause
from flowrl.tuning.verification import Accuracy, Pair
from perf.prediction import TRIES, idle_errors, main, setting_of, table
from tests.support.command import GRAPH
from tests.support.timed_past import ppo_costs, timed_past

if TYPE_CHECKING:
    from pathlib import Path


def found(measured: float, predicted: float, **idle: tuple[float, float]) -> Accuracy:
    def shares(waits: tuple[float, float]) -> dict[str, Pair]:
        rest = dict.fromkeys(Cause, Pair(0.0, 0.0))
        return {**rest, Cause.WAIT_INPUT: Pair(*waits), Cause.COMPUTE: Pair(*(1 - part for part in waits))}

    nodes = {node: shares(waits) for node, waits in idle.items()}
    return Accuracy(samples_per_s=Pair(measured, predicted), staleness=Pair(0.5, 0.6), shares=nodes)


def test_the_table_ends_with_the_medians_over_settings_and_over_their_nodes() -> None:
    tries = [
        ("max_staleness=0", found(10.0, 11.0, generator=(0.5, 0.46), learner=(0.2, 0.2))),  # +10 %; 4 and 0 points
        ("generator.replicas=2", found(10.0, 8.0, generator=(0.1, 0.25), learner=(0.6, 0.5))),  # -20 %; 15 and 10
        ("max_staleness=4", found(4.0, 4.04, generator=(0.3, 0.29), learner=(0.4, 0.38))),  # +1 %; 1 and 2 points
    ]
    assert idle_errors(tries[1][1]) == pytest.approx([0.15, 0.1])
    header, *rows, last = table(tries).splitlines()
    assert [row.split() for row in rows] == [
        ["max_staleness=0", "10.00", "11.00", "+10.0%", "0.50", "0.60", "2.0%", "4.0%"],
        ["generator.replicas=2", "10.00", "8.00", "-20.0%", "0.50", "0.60", "12.5%", "15.0%"],
        ["max_staleness=4", "4.00", "4.04", "+1.0%", "0.50", "0.60", "1.5%", "2.0%"],
    ]
    assert {len(row) for row in rows} == {len(header)}, "columns stand below their heads"
    assert last == (
        "3 settings not used for the profile: throughput off by 10.0% in the median, 20.0% at most; "
        "idle shares of 6 nodes by 3.0 points, 15.0 at most"
    )


def test_what_is_tried_are_settings_that_the_graph_takes_and_that_differ_from_it() -> None:
    default = load_program(GRAPH).settings
    assert len(set(TRIES)) == len(TRIES) >= 8
    for text in TRIES:
        assert load_program(GRAPH, overrides=text.split()).settings != default
    kinds = {kind for kind in ("staleness", "replicas", "depths") for text in TRIES if kind in text}
    assert kinds == {"staleness", "replicas", "depths"}


def test_a_try_is_read_as_paths_and_values() -> None:
    assert setting_of("max_staleness=0 data.source=a=b") == {"max_staleness": "0", "data.source": "a=b"}


@pytest.mark.slow
def test_runs_that_exist_are_held_against_another_s_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = ppo_costs(train_s=0.3)
    profiled = timed_past(tmp_path / "profiled", costs)
    runs = [timed_past(tmp_path / f"stale-{stale}", costs, f"max_staleness={stale}") for stale in (0, 2)]
    assert main(["--profile", str(profiled), "--against", *map(str, runs)]) == 0
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert (first.split()[0], second.split()[0]) == ("stale-0", "stale-2")
    assert last.startswith("2 settings not used for the profile: throughput off by ")
    assert float(last.split("off by ")[1].partition("%")[0]) < 1
