"""What a run keeps in memory does not grow with its length."""

from __future__ import annotations

import asyncio
import gc
import sys
import types
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.runtime.local import LocalOptions, run_local
from flowrl.simulation import profiler
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.profiler import Profiler
from flowrl.stages.learner import Learner
from flowrl.telemetry import symptoms, timeline, view
from flowrl.telemetry.events import Status
from flowrl.telemetry.metrics import MetricsFile, StateFile
from flowrl.telemetry.sinks import Sinks
from flowrl.telemetry.symptoms import Symptoms
from flowrl.telemetry.timeline import Timeline
from flowrl.telemetry.view import RunView
from tests.support.flows import FlowSettings, flow
from tests.unit.telemetry.streams import edge, evaluation, span, status, step

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.runtime.local import LocalWorkers
    from flowrl.telemetry.events import Event

DAY_S = 24 * 3600.0
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


def held(*things: Any) -> tuple[int, int]:
    """Return how many objects are reachable from some, and their bytes."""
    seen, rest, size_bytes = set(map(id, things)), deque(things), 0
    while rest:
        thing = rest.popleft()
        size_bytes += sys.getsizeof(thing, 0)
        for each in gc.get_referents(thing):
            if id(each) not in seen and not isinstance(each, OUTSIDE):
                seen.add(id(each))
                rest.append(each)
    return len(seen), size_bytes


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever keeps the newest thousands keep a few."""
    for module, names in (
        (profiler, ("MAX_SPANS", "MAX_STATUSES", "MAX_STEPS", "MAX_GROUPS")),
        (timeline, ("MAX_OPEN_GROUPS",)),
        (view, ("MOST_REPEATED",)),
        (symptoms, ("NEWEST_STEPS",)),
    ):
        for name in names:
            assert getattr(module, name) > NEWEST
            monkeypatch.setattr(module, name, NEWEST)


def open_sinks(run_dir: Path, now: Any) -> dict[str, Any]:
    sinks = Sinks(RunView(), now=now)
    return {
        "sinks": sinks, "symptoms": Symptoms(sinks.warn), "metrics": MetricsFile(run_dir / "metrics.jsonl"),
        "timeline": Timeline(run_dir / "timeline.json", say=print, max_records=500),
        "state": StateFile(run_dir, sinks.view, now=now), "profiler": Profiler(),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("short_memory")
def test_a_week_of_a_run_is_held_in_the_memory_of_its_second_day(tmp_path: Path) -> None:
    """A step takes four minutes, every tenth version is evaluated: flow, replicas, driver and all its sinks."""
    minutes = FlowSettings(
        seed=7, steps=7 * 365, groups_per_step=4, window=2, max_staleness=1, generators=2, scorers=1, depth=8,
        token_s=5.0, sigma=0.5, update_s=5.0, score_s=1.0, train_s=58.0, filter_every=9, initial=6, save_every=100,
        evaluate_every=10,
    )  # fmt: skip
    sizes: list[tuple[int, int]] = []
    kept: dict[str, Any] = {}

    async def look(workers: LocalWorkers) -> None:
        while True:
            await asyncio.sleep(DAY_S)
            gc.collect()
            sizes.append(held(workers, *kept.values()))

    def consume(events: list[Event]) -> None:
        for sink in kept.values():
            sink.consume(events)

    async def week() -> None:
        kept.update(open_sinks(tmp_path, asyncio.get_running_loop().time))
        options = LocalOptions(run_dir=tmp_path, is_virtual=True, consume=consume, status_interval_s=60.0,
                               stall_timeout_s=1e5, chaos=look)  # fmt: skip
        await run_local(flow(minutes, Learner), options)

    run_virtual(week())
    assert len(sizes) >= 6, sizes
    for early, late in ((max(of[:2]), max(of[2:])) for of in zip(*sizes, strict=True)):
        assert late <= 1.1 * early, f"objects and bytes after each day: {sizes}"  # what is in flight is never the same


@pytest.mark.slow
@pytest.mark.usefixtures("short_memory")
def test_what_the_driver_keeps_is_flat(tmp_path: Path) -> None:
    now_s = 0.0
    kept = open_sinks(tmp_path, lambda: now_s)
    sizes: list[dict[str, int]] = []
    for turn in range(3):
        for first in range(turn * 300, (turn + 1) * 300, 50):
            events = hour(first, 50)
            now_s = 10.0 * first
            for sink in kept.values():
                sink.consume(events)
        sizes.append({name: held(sink)[0] for name, sink in kept.items()})
    for name in kept:
        after, before = sizes[2][name], sizes[1][name]
        assert after <= before + 20, f"{name}: {[size[name] for size in sizes]} objects after 300, 600, 900 steps"
    assert kept["profiler"].num_steps == NEWEST


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
