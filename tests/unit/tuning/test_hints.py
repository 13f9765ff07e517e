"""Hints: what they advise at costs that a reader can add up, and that the process behind them harms nobody."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.errors import ConfigError
from flowrl.runtime.placement import num_cores
from flowrl.simulation.costs import load_profile
from flowrl.simulation.run import simulate
from flowrl.tuning import companion
from flowrl.tuning.advisor import adjacent, hint
from flowrl.tuning.companion import FIRST_S, FIRST_STEPS, Hints, changes_in
from flowrl.tuning.knobs import Knob, Option
from tests.support.command import GRAPH, ROOT
from tests.support.timed_past import ppo, ppo_costs, timed_past
from tests.unit.telemetry.streams import status, step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WAIT_S = 200.0  # for a process at the lowest priority on a machine that is busy with other tests
FIGURES = (
    r"learner starved (\d+)%, generator's decode slots (\d+)% filled: "
    r"(.+?) is worth \+(\d+)%.*?\(((?:--set \S+=\S+ ?)+)\).*"
)
BLOCKING = """
import fcntl, os, signal
held = open({lock!r}, "w")
fcntl.flock(held, fcntl.LOCK_EX)
with open({ready!r}, "w") as out:
    out.write(f"{{os.sched_getscheduler(0)}} {{os.nice(0)}}")
signal.pause()
"""
DRIVER = """
import signal
from pathlib import Path
from tests.unit.tuning.test_hints import begin
begun = begin(Path({run_dir!r}), Path({graph!r}), print)
signal.pause()
"""


def begin(run_dir: Path, graph: Path, tell: Callable[[str], None]) -> Hints:
    """Open the sink and have it start its process."""
    now_s = 0.0
    sink = Hints(run_dir, msgspec.structs.replace(ppo(), path=graph), tell=tell, now=lambda: now_s)
    sink.consume([step(1, at=0.0)])
    now_s = FIRST_S
    sink.consume([step(version, at=now_s) for version in range(2, FIRST_STEPS + 1)])
    assert sink.pid is not None
    return sink


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process have a processor: at the lowest priority it gets none while other tests run."""
    boot = companion.BOOT.replace("os.nice(19); ", "").replace("companion.main", "companion.answer")
    monkeypatch.setattr(companion, "BOOT", boot)


def hinted(run_dir: Path) -> str:
    return hint(run_dir, GRAPH, run_dir / "settings.yaml")


def ended(child: Hints) -> None:
    """Wait until the process has ended, without reaping it, and let the sink hear of it."""
    pid = child.pid
    assert pid is not None
    within(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT))
    child.consume([status(at=0.0)])
    assert child.pid is None


def within(function: Callable[[], Any]) -> Any:
    """Return what a blocking function returns, within a time."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert found, "took too long"
    return found[0]


def blocking_graph(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a graph file that blocks whoever loads it, the lock it holds, and the pipe on which it says so."""
    path, lock, ready = tmp_path / "graph.py", tmp_path / "lock", tmp_path / "ready"
    os.mkfifo(ready)
    path.write_text(BLOCKING.format(lock=str(lock), ready=str(ready)))
    return path, lock, ready


def taken(lock: Path) -> bool:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return True


@pytest.mark.slow
def test_a_run_that_waits_for_its_generator_is_told_what_would_make_that_quicker(tmp_path: Path) -> None:
    run_dir = timed_past(tmp_path / "run", ppo_costs(), is_fitted=True)
    told, costs = hinted(run_dir), load_profile(run_dir)
    found = re.fullmatch(FIGURES, told)
    assert found, told
    assert "generator" in found[3]
    assert "more" not in told, "no core is left on the machine of the profile, which `flowrl check` knows as well"
    now, then = (
        simulate(ppo(*setting).graph, costs, steps=24) for setting in ((), found[5].replace("--set ", "").split())
    )
    assert float(found[1]) / 100 == pytest.approx(now.shares["learner"]["waiting_for_input"], abs=0.06)
    assert float(found[2]) / 100 == pytest.approx(now.slots["generator"], abs=0.06)
    assert float(found[4]) / 100 == pytest.approx(then.samples_per_s / now.samples_per_s - 1, abs=0.03)


@pytest.mark.slow
@pytest.mark.skipif(num_cores() < 2, reason="on one core more threads are no help")
def test_a_run_whose_learner_is_never_idle_is_told_of_its_threads(tmp_path: Path) -> None:
    told = hinted(timed_past(tmp_path / "run", ppo_costs(train_s=10.0)))
    assert told.startswith("learner busy 100%: learner.threads 2 instead of 1 is worth +")


def test_of_ordered_positions_the_next_are_tried_of_others_all_and_of_the_batch_none() -> None:
    def knob(name: str, now: Any, *others: Any) -> Knob:
        return Knob(name, [Option(str(value), {name: value}) for value in (now, *others)])

    def tried(each: Knob) -> list[Any]:
        return [option.changes[each.name] for option in adjacent(each)]

    assert tried(knob("generator.replicas", 4, 1, 2, 8, 6)) == [2, 6]
    assert tried(knob("max_staleness", 0, 1, 2)) == [1]
    assert tried(knob("critic.share", "", "learner", "reference")) == ["learner", "reference"]
    assert tried(knob("generator.group_size", 4, 2, 8)) == []


def test_a_short_run_starts_no_process(tmp_path: Path) -> None:
    now_s = 0.0
    sink = Hints(tmp_path, ppo(), tell=print, now=lambda: now_s)
    sink.consume([step(version, at=0.0) for version in range(1, 10 * FIRST_STEPS)])
    assert sink.pid is None, "it is as long in steps but not in seconds"
    now_s = 2 * FIRST_S
    sink.consume([step(10 * FIRST_STEPS, at=now_s, of=10 * FIRST_STEPS)])
    assert sink.pid is None, "that was the last step"
    sink = Hints(tmp_path, ppo(), tell=print, now=lambda: now_s)
    sink.consume([step(1, at=now_s)])
    now_s = 4 * FIRST_S
    sink.consume([status(at=now_s), step(FIRST_STEPS - 1, at=now_s)])
    assert sink.pid is None, "it is long enough in seconds but not in steps"
    sink.close()


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_the_sink_tells_what_its_process_found_and_asks_again_later(tmp_path: Path) -> None:
    told: list[str] = []
    sink = begin(timed_past(tmp_path / "run", ppo_costs()), GRAPH, told.append)
    ended(sink)
    assert len(told) == 1
    assert "generator" in told[0]
    sink.consume([step(version, at=FIRST_S) for version in range(FIRST_STEPS + 1, 2 * FIRST_STEPS)])
    assert sink.pid is None, "not yet twice as many steps"
    sink.consume([step(2 * FIRST_STEPS, at=FIRST_S)])
    assert sink.pid is not None
    sink.close()


def test_the_same_advice_with_other_figures_is_no_news() -> None:
    first = "learner starved 38%: a second generator is worth +31%, for 1 core more; max_staleness 2 is worth +9%"
    again = "learner starved 41%: max_staleness 2 is worth +12%; a second generator is worth +11%, for 1 core more"
    assert changes_in(first) == changes_in(again) == {"a second generator", "max_staleness 2"}
    assert changes_in(first) != changes_in("learner starved 41%: a second generator is worth +11%")


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_a_process_that_fails_is_no_hint_and_a_line_in_the_log(tmp_path: Path) -> None:
    told: list[str] = []
    run_dir = timed_past(tmp_path / "run", ppo_costs())
    sink = begin(run_dir, tmp_path / "nowhere.py", told.append)
    ended(sink)
    assert told == []
    assert "no such graph file" in (run_dir / "logs" / "hints.log").read_text()


@pytest.mark.slow
def test_the_process_has_the_lowest_priority_and_ends_with_the_run(tmp_path: Path) -> None:
    graph, lock, ready = blocking_graph(tmp_path)
    sink = begin(timed_past(tmp_path / "run", ppo_costs()), graph, print)
    assert within(ready.read_text) == f"{os.SCHED_IDLE} 19"
    sink.close()
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where the process still holds it
    assert sink.pid is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_process_ends_with_a_driver_that_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    graph, lock, ready = blocking_graph(tmp_path)
    run_dir = timed_past(tmp_path / "run", ppo_costs())
    code = DRIVER.format(run_dir=str(run_dir), graph=str(graph))
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as driver:
        within(ready.read_text)
        driver.send_signal(number)
    assert within(lambda: taken(lock))


@pytest.mark.slow
def test_a_graph_without_costs_is_refused_by_name(tmp_path: Path) -> None:
    run_dir = timed_past(tmp_path / "run", ppo_costs())
    (run_dir / "timeline.json").write_text("[\n")
    with pytest.raises(ConfigError, match="no costs of node"):
        hinted(run_dir)


def test_a_run_with_no_run_beside_it_is_told_an_estimate_or_why_there_is_none(tmp_path: Path) -> None:
    (line,) = companion.Advised().foretell(ppo("model=/nowhere"), tmp_path)
    assert line.startswith("how long it will take cannot be said before a first run")
