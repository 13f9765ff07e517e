"""Watching a run from its files: what is new is shown, and how the run ended is said."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from flowrl.errors import printable
from flowrl.runs.watch import watch
from flowrl.telemetry.events import EdgeStatus
from flowrl.telemetry.metrics import MetricsFile, StateFile
from flowrl.telemetry.view import RunView
from tests.unit.telemetry.streams import edge, evaluation, notice, status, step
from tests.unit.telemetry.test_hostile_text import HOSTILE, check_harmless, events

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flowrl.telemetry.events import Event


class Run:
    """A run that writes its files while it is watched: one batch of events at each look."""

    def __init__(self, run_dir: Path, *batches: list[Event], dies: bool = False) -> None:
        self.run_dir = run_dir
        self.now_s = 100.0
        self._view = RunView(expected=("generator", "learner"))
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._state = StateFile(run_dir, self._view, now=lambda: self.now_s)
        self._batches = list(batches)
        self._dies = dies
        self.lives = True

    def go_on(self, seconds: float) -> None:
        """Do what happens while the watcher waits."""
        self.now_s += seconds
        if self._batches:
            events = self._batches.pop(0)
            self._view.fold(events)
            self._metrics.consume(events)
            self._state.consume(events)
            return
        if not self._dies:
            self._state.close()
        self.lives = False

    def watched(
        self, *, console: Console | None = None, wait: Callable[[float], None] | None = None
    ) -> tuple[str, list[str]]:
        """Watch it to its end; returns how it ended and what was said."""
        said: list[str] = []
        try:
            end = watch(self.run_dir, is_held=lambda: self.lives, say=said.append, console=console,
                        wait=wait or self.go_on, now=lambda: self.now_s)  # fmt: skip
        finally:
            self._metrics.close()
        return end, said


def work(at: float) -> list[Event]:
    return [status(at=at, computing=at - 99.0, done=int(at), version=1), edge(3, at=at)]


def test_steps_are_said_as_they_come_until_the_run_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, [*work(101.0), step(1, at=101.0, reward__mean=0.25)], work(102.0),
              [*work(103.0), step(2, at=103.0), notice("odd", at=103.0)])  # fmt: skip
    end, said = run.watched()
    assert end == "ended"
    told = [line for line in said if not line.startswith("not heard from yet")]
    assert told[0] == "step 1/40 reward 0.250"
    assert "step 2/40" in told[1]
    assert told[2] == "warning: reward.0: odd"
    assert "has ended" in told[3]
    assert len(told) == 4, "each once"


def test_the_table_shows_replicas_and_queues_of_the_other_process(tmp_path: Path) -> None:
    out = io.StringIO()
    run = Run(tmp_path, [*work(101.0), step(3, at=101.0)], work(102.0))
    run.watched(console=Console(file=out, force_terminal=True, width=100, height=40))
    last = out.getvalue()[out.getvalue().rindex("step 3/40") :]
    assert "generator.0" in last
    assert "3/10" in last
    assert "not heard from yet: learner" in last


def test_a_run_that_was_killed_is_called_dead(tmp_path: Path) -> None:
    end, said = Run(tmp_path, work(101.0), dies=True).watched()
    assert end == "killed"
    assert "is dead: it has no process" in said[-1]


def test_a_driver_that_falls_silent_is_said_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    looks = 0

    def wait(seconds: float) -> None:
        nonlocal looks
        looks += 1
        run.now_s += 6 * seconds
        run.lives = looks < 4

    _, said = run.watched(wait=wait)
    assert [line for line in said if line.startswith("warning")] == ["warning: driver: has not been heard of for 12 s"]


def test_leaving_is_not_the_end_of_the_run(tmp_path: Path) -> None:
    def leave(seconds: float) -> None:
        raise KeyboardInterrupt

    end, said = Run(tmp_path, work(101.0)).watched(wait=leave)
    assert end == "left"
    assert "the run goes on" in said[-1]


def test_of_the_start_before_a_resumption_only_evaluations_count(tmp_path: Path) -> None:
    before = MetricsFile(tmp_path / "metrics.jsonl")
    before.consume([evaluation(0, [[0.5], [0.7]], at=50.0), step(7, at=60.0)])
    before.close()
    out = io.StringIO()
    run = Run(tmp_path, [*work(101.0), step(8, at=101.0)])
    run.watched(console=Console(file=out, force_terminal=True, width=100, height=40))
    assert "step 7" not in out.getvalue()
    frame = out.getvalue()[out.getvalue().rindex("step 8/40") :]
    assert "held-out score 0.600 +- 1.271 (2 prompts) at version 0" in frame


@pytest.mark.parametrize(("has_report", "end"), [(True, "ended"), (False, "killed")])
def test_a_run_from_before_there_was_a_state_is_judged_by_its_report(
    tmp_path: Path, has_report: bool, end: str
) -> None:
    if has_report:
        (tmp_path / "report.txt").write_text("finished")
    assert watch(tmp_path, is_held=lambda: False, say=lambda line: None) == end


@pytest.mark.parametrize("has_table", [False, True])
def test_hostile_text_in_a_runs_files_is_shown_harmless(tmp_path: Path, has_table: bool) -> None:
    named = [
        status(HOSTILE, at=101.0, computing=1.0),
        EdgeStatus(edge=HOSTILE, time_s=101.0, items=1, depth=2, size_bytes=3),
    ]
    run = Run(tmp_path, [*named, *events(HOSTILE)], work(102.0))
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False, width=200, height=50) if has_table else None
    end, said = run.watched(console=console)
    assert end == "ended"
    for line in said:
        check_harmless(printable(line))  # as `say` prints it
        assert "flowrl: all is well" not in line.splitlines()
    check_harmless(screen.getvalue())


DEEP = b"[" * 100_000
DAMAGED = [
    DEEP, b'{"kind":"step","x":' + DEEP, b"\xff\xfe", b'{"kind":"step","version":1,"metrics":{"a":1e999}}',
    b'{"kind":"notice","level":"info","where":"\xff","text":"a","time_s":1}', b"null", b"",
    b'{"kind":"step","version":1,"metrics":{},"staleness":{"x":3}}', b'{"started_s":0,"x":' + DEEP,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    run = Run(tmp_path, [*work(101.0), step(1, at=101.0)])

    def go_on(seconds: float) -> None:
        run.go_on(seconds)
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(damage + b"\n")
        (tmp_path / "state.json").write_bytes(damage)

    end, said = run.watched(wait=go_on)
    assert end == "killed", "its last state cannot be read, and it left no report"
    assert any(line.startswith("step 1/40") for line in said)
