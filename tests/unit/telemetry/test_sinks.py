"""All sinks together: order, failure of one, what a closing one still has to say."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

from rich.console import Console

from flowrl.graph.graph import RunSettings
from flowrl.telemetry.events import HINT
from flowrl.telemetry.sinks import Sinks, open_sinks
from flowrl.telemetry.view import RunView
from tests.unit.telemetry.streams import evaluation, random_run, status, step

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from flowrl.telemetry.events import Event


class Memory:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_closed = False

    def consume(self, events: list[Event]) -> None:
        self.events += events

    def close(self) -> None:
        self.is_closed = True

    @property
    def texts(self) -> list[str]:
        return [text for event in self.events if (text := getattr(event, "text", ""))]


class Broken(Memory):
    def consume(self, events: list[Event]) -> None:
        raise OSError(28, "No space left on device")


class Talkative(Memory):
    def __init__(self, sinks: Sinks) -> None:
        super().__init__()
        self._sinks = sinks

    def close(self) -> None:
        self._sinks.warn("timeline", "80 left out")


def test_a_failing_sink_is_left_out_with_one_notice_and_the_others_go_on() -> None:
    sinks, memory, broken = Sinks(RunView(), now=lambda: 5.0), Memory(), Broken()
    sinks.add("metrics", lambda: broken)
    sinks.add("memory", lambda: memory)
    sinks.consume([status(at=1.0)])
    sinks.consume([status(at=2.0)])
    assert memory.texts == ["failed (OSError: [Errno 28] No space left on device); the run goes on without it"]
    assert broken.is_closed
    assert len(memory.events) == 3


def test_a_sink_that_cannot_be_opened_is_a_notice() -> None:
    def refuse() -> Memory:
        raise RuntimeError("no network")

    sinks, memory = Sinks(RunView()), Memory()
    sinks.add("wandb", refuse)
    sinks.add("memory", lambda: memory)
    sinks.consume([])
    sinks.consume([status(at=1.0)])
    assert memory.texts == ["failed (RuntimeError: no network); the run goes on without it"]


def test_a_note_reaches_every_sink_and_warns_of_nothing() -> None:
    sinks, memory = Sinks(RunView()), Memory()
    sinks.add("memory", lambda: memory)
    sinks.note(HINT, "a second generator is worth +31%")
    sinks.consume([])
    assert memory.texts == [sinks.view.hint] == ["a second generator is worth +31%"]
    assert sinks.view.num_warnings == 0


def test_what_a_sink_says_at_its_close_reaches_those_still_open() -> None:
    sinks, memory = Sinks(RunView()), Memory()
    sinks.add("timeline", lambda: Talkative(sinks))
    sinks.add("memory", lambda: memory)
    sinks.close()
    assert memory.texts == ["80 left out"]
    assert memory.is_closed


def test_what_the_last_sink_says_at_its_close_is_said() -> None:
    said: list[str] = []
    sinks = Sinks(RunView(), say=said.append)
    sinks.add("timeline", lambda: Talkative(sinks))
    sinks.close()
    assert said == ["warning: timeline: 80 left out"]


def test_a_run_leaves_metrics_timeline_and_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_sinks(tmp_path, RunSettings(), title="ppo-1") as sinks:
        sinks.consume(random_run(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "state.json", "timeline.json"]
    json.loads((tmp_path / "timeline.json").read_text())
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == [f"{version}/6" for version in range(1, 7)]


def test_a_resumed_run_remembers_its_evaluations_and_has_a_timeline_of_its_own(tmp_path: Path) -> None:
    with open_sinks(tmp_path, RunSettings(), title="ppo-1") as sinks:
        sinks.consume([evaluation(0, [[0.5]]), step(1, at=1.0)])
    with open_sinks(tmp_path, RunSettings(), title="ppo-1") as sinks:
        sinks.consume([evaluation(2, [[1.0]]), step(2, at=100.0)])
    assert list(sinks.view.evaluations) == [0, 2]
    assert (tmp_path / "timeline-2.json").exists()


def test_a_console_gets_the_live_view(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_sinks(tmp_path, RunSettings(), title="ppo-1", console=Console(file=out, force_terminal=True)) as sinks:
        sinks.consume(random_run(0))
        sinks.say("stopping")
    assert "stopping" in out.getvalue()
    assert "step 6/6" in out.getvalue()
