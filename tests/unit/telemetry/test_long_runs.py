"""What the driver keeps of a run does not grow with its length."""

from __future__ import annotations

import gc
import types
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.simulation import profiler
from flowrl.simulation.profiler import Profiler
from flowrl.telemetry import symptoms, timeline, view
from flowrl.telemetry.events import Status
from flowrl.telemetry.metrics import MetricsFile, StateFile
from flowrl.telemetry.sinks import Sinks
from flowrl.telemetry.symptoms import Symptoms
from flowrl.telemetry.timeline import Timeline
from flowrl.telemetry.view import RunView
from tests.unit.telemetry.streams import edge, evaluation, span, status, step

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.telemetry.events import Event

NEWEST = 40  # instead of thousands, so that hundreds of steps are a long run
OUTSIDE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CodeType)


def hour(first: int, number: int) -> list[Event]:
    """`number` steps from the first one on, each with what comes along with it."""
    found: list[Event] = []
    for version in range(first, first + number):
        at, groups = 10.0 * version, range(2 * version, 2 * version + 2)
        for group in groups:
            args = {"tokens": 50, "prompt_tokens": 3, "samples": 4, "lengths": [12, 13, 12, 13]}
            made = span("generator", "generate", at - 9.0, at - 5.0 + group % 2, group)
            found += [msgspec.structs.replace(made, args=args), span("reward", "score", at - 4.0, at - 3.0, group)]
            found += [span("selector", "select", at - 3.0, at - 3.0, group), edge(version % 3, at=at)]
        found += [span("learner", f"step {version}", at - 2.0, at - 1.0, *groups)]
        found += [
            span("learner", f"publish {version}", at - 1.0, at),
            span("generator", f"weight update v{version}", at, at + 1),
        ]
        for node in ("generator", "reward", "learner"):
            found.append(status(node, at=at, computing=at, done=version, version=version))
        found.append(step(version, at=at, of=10**6, staleness=(0, 1), reward__mean=0.5, kl=0.1, tokens=100, samples=8))
        if version % 5 == 0:
            found.append(evaluation(version, [[1.0, 0.0]] * 20, at=at))
    return found


def num_objects(thing: Any) -> int:
    """Count what is reachable from an object."""
    seen, rest = {id(thing)}, deque([thing])
    while rest:
        for each in gc.get_referents(rest.popleft()):
            if id(each) not in seen and not isinstance(each, OUTSIDE):
                seen.add(id(each))
                rest.append(each)
    return len(seen)


@pytest.mark.slow
def test_what_the_driver_keeps_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in (
        (profiler, ("MAX_SPANS", "MAX_STATUSES", "MAX_STEPS", "MAX_GROUPS")),
        (timeline, ("MAX_OPEN_GROUPS",)), (view, ("MOST_REPEATED",)), (symptoms, ("NEWEST_STEPS",)),
    ):  # fmt: skip
        for name in names:
            assert getattr(module, name) > NEWEST
            monkeypatch.setattr(module, name, NEWEST)
    now_s = 0.0
    sinks = Sinks(RunView(), now=lambda: now_s)
    kept = {
        "symptoms": Symptoms(sinks.warn), "timeline": Timeline(tmp_path / "timeline.json", say=print, max_records=500),
        "metrics": MetricsFile(tmp_path / "metrics.jsonl"), "state": StateFile(tmp_path, sinks.view, now=lambda: now_s),
        "profiler": Profiler(), "view": sinks.view,
    }  # fmt: skip
    sizes: list[dict[str, int]] = []
    for turn in range(3):
        for first in range(turn * 300, (turn + 1) * 300, 50):
            events = hour(first, 50)
            now_s = 10.0 * first
            sinks.consume(events)
            for name, sink in kept.items():
                if name != "view":
                    sink.consume(events)  # type: ignore[union-attr]
        sizes.append({name: num_objects(sink) for name, sink in kept.items()})
    for name in kept:
        after, before = sizes[2][name], sizes[1][name]
        assert after <= before + 20, f"{name}: {[size[name] for size in sizes]} objects after 300, 600, 900 steps"
    assert kept["profiler"].num_steps == NEWEST  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("is_long", [False, True])
def test_a_profile_of_the_newest_part_is_a_profile(monkeypatch: pytest.MonkeyPatch, is_long: bool) -> None:
    """A turn of the learner takes 10 s, of which it computes 2.5: 1 in its step, 1 in a publish, 0.5 beside them."""
    if is_long:
        for name in ("MAX_SPANS", "MAX_STATUSES", "MAX_STEPS"):
            monkeypatch.setattr(profiler, name, NEWEST)
    events: list[Event] = []
    for event in hour(1, 80):
        if isinstance(event, Status) and event.node == "learner":
            events.append(status("learner", at=event.time_s, computing=event.time_s / 4))
        else:
            events.append(event)
    sink = Profiler()
    sink.consume(events)
    costs = sink.profile({}, cores=4.0, slowdown=0.0).nodes["learner"].calls
    assert costs["publish"].call_s == pytest.approx(1.5, rel=0.02)
