"""Turns on shared devices, on the virtual clock: never both sides at once, the laws as ever, whoever dies or hangs."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import ChannelClosed, ConfigError, FlowrlError, RunError
from flowrl.runtime.lease import Lease, Turns, check_turns, turns_of
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.simulation.clock import run_virtual
from flowrl.telemetry.events import Cause, Span, Status
from tests.support.chaos import Chaos
from tests.support.flows import FlowSettings, flow, random_settings, run
from tests.support.recovery import FULL, SHARES, UNLIMITED, check_share, faulty_settings, run_faulty
from tests.support.turns import Devices, SharedGeneration, SharedTraining

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flowrl.messages import Sample

TURNS = Turns(training=frozenset({"learner"}), sampling=frozenset({"generator"}), limit_s=10.0)


@pytest.fixture(autouse=True)
def devices() -> Iterator[type[Devices]]:
    Devices.clear()
    yield Devices
    Devices.clear()


def in_turns(settings: FlowSettings, limit_s: float = 900.0) -> FlowSettings:
    return replace(settings, turn_limit_s=limit_s)


def check_faulty(seed: int, directory: Path, settings: FlowSettings) -> None:
    Devices.clear()
    chaos = Chaos(seed, deaths=random.Random(seed).randint(0, 4), mean_s=1.0)
    run_faulty(seed, directory, settings=settings, chaos=chaos)
    assert not Devices.wrong, f"seed {seed}, {settings}, struck {chaos.struck}: {Devices.wrong[:3]}"


def small(seed: int) -> FlowSettings:
    """Return a faulty schedule of two steps of few groups, whose engines take time."""
    drawn = faulty_settings(seed)
    return in_turns(replace(drawn, steps=2, groups_per_step=min(2, drawn.groups_per_step), filter_every=0,
                            initial=min(drawn.initial, (drawn.max_staleness + 1) * min(2, drawn.groups_per_step)),
                            window=1, token_s=0.05))  # fmt: skip


@pytest.mark.parametrize("first", range(0, 60, 5))
def test_random_schedules_with_crashes_keep_the_laws_and_the_turns(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 5):
        check_faulty(seed, tmp_path / str(seed), small(seed))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 1000 + FULL, FULL // SHARES))
def test_ten_thousand_schedules_with_crashes_keep_the_laws_and_the_turns(first: int) -> None:
    check_share(first, lambda seed, run_dir: check_faulty(seed, run_dir, in_turns(faulty_settings(seed))))


def test_every_second_is_charged_and_waiting_for_devices_has_its_own_cause(tmp_path: Path) -> None:
    events: list[Any] = []
    options = LocalOptions(run_dir=tmp_path, is_virtual=True, consume=events.extend, status_interval_s=50.0)
    run_virtual(run_local(flow(in_turns(replace(random_settings(2), steps=4))), options))
    last = {event.node: event for event in events if isinstance(event, Status)}
    asleep = [event for event in events if isinstance(event, Span) and event.name in ("sleep", "wake")]
    moved_s = sum(event.end_s - event.start_s for event in asleep if event.node == "learner")
    assert moved_s > 0
    for node in ("generator", "learner"):
        assert last[node].seconds[Cause.WAIT_DEVICES] >= moved_s, "others move meanwhile, or it does"
        assert sum(last[node].seconds.values()) == pytest.approx(last[node].time_s)


@pytest.mark.parametrize("bug", ["both at once", "nobody sleeps"])
def test_a_planted_bug_is_seen(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "both at once":
        monkeypatch.setattr(Lease, "_may_hold", lambda self, replica: True)
    else:
        monkeypatch.setattr(SharedTraining, "sleep", lambda self: None)
    for seed in range(40):
        try:
            check_faulty(seed, tmp_path / str(seed), small(seed))
        except (AssertionError, FlowrlError):
            return
    pytest.fail("40 schedules saw nothing")


class HangingGeneration(SharedGeneration):
    has_hung = False

    async def generate(self, **request: Any) -> list[Sample]:
        if not HangingGeneration.has_hung and self.version > 0:
            HangingGeneration.has_hung = True
            await asyncio.sleep(1e6)
        return await super().generate(**request)


class HangingTraining(SharedTraining):
    has_hung = False

    def accumulate(self, *arguments: Any) -> dict[str, float]:
        found = super().accumulate(*arguments)
        if not HangingTraining.has_hung and self.steps == 1:  # while generators wait to take version 1 in
            HangingTraining.has_hung = True
            self.last_duration_s = 1e6
        return found


@pytest.mark.parametrize("kind", [HangingGeneration, HangingTraining])
def test_who_hangs_with_the_devices_loses_them_and_costs_no_sample(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind.has_hung = False
    monkeypatch.setattr(f"tests.support.turns.{kind.__base__.__name__}", kind)
    settings = replace(faulty_settings(4), steps=4, groups_per_step=2, initial=4, max_staleness=1, window=1,
                       filter_every=0, save_every=1, on_update="keep", score_s=0.0, depth=8, generators=1)  # fmt: skip
    ran = run(flow(in_turns(settings, limit_s=100.0)), tmp_path, max_restarts=UNLIMITED)
    assert kind.has_hung
    assert not Devices.wrong
    assert ran.outcome.totals["learned"] == 8
    assert ran.outcome.recoveries == {"generator" if kind is HangingGeneration else "rollback": 1}
    assert {age for step in ran.steps for age in step.staleness} <= {0, 1}


def test_devices_go_on_only_when_the_one_that_lost_them_is_proved_dead() -> None:
    async def body() -> None:
        lease = Lease("learner", TURNS)
        turn = await lease.take("learner.0")
        waiting = asyncio.ensure_future(lease.take("generator.0"))
        await asyncio.sleep(9.0)
        assert lease.take_lost() == []
        lease.getting_on("learner.0", turn)
        await asyncio.sleep(9.0)
        assert lease.take_lost() == [], "what it ended gives it time again"
        await asyncio.sleep(1.5)
        assert lease.take_lost() == ["learner.0"]
        assert lease.take_lost() == []
        for late in (lease.getting_on, lease.give_back):
            with pytest.raises(RunError, match="was lost"):
                late("learner.0", turn)
        with pytest.raises(RunError, match="was lost"):
            await lease.take("learner.0")
        assert not waiting.done(), "it may be in the middle of a kernel"
        lease.release("learner.0")
        assert await waiting == turn + 1
        with pytest.raises(RunError, match="was lost"):
            lease.give_back("learner.0", turn)

    run_virtual(body())


def test_time_is_counted_from_the_first_who_waits_and_a_side_joins_its_own_turn() -> None:
    async def body() -> None:
        lease = Lease("learner", Turns(frozenset({"learner", "critic"}), frozenset({"generator"}), 10.0))
        early = asyncio.ensure_future(lease.take("generator.0"))
        await asyncio.sleep(0)
        assert not early.done(), "the first turn is training's"
        assert await lease.take("learner.0") == await lease.take("critic.0") == 1
        lease.give_back("learner.0", 1)
        assert await lease.take("learner.0") == 1, "its side still has the devices"
        for replica in ("learner.0", "critic.0"):
            lease.give_back(replica, 1)
        assert await early == 2
        await asyncio.sleep(500.0)
        waiting = asyncio.ensure_future(lease.take("critic.0"))
        await asyncio.sleep(9.0)
        assert lease.take_lost() == [], "nobody waited for it before"
        lease.give_back("generator.0", 2)
        assert await waiting == 3
        lease.close()
        with pytest.raises(ChannelClosed):
            await lease.take("generator.0")

    run_virtual(body())


def test_turns_need_somebody_to_take_them_with_and_engines_that_sleep() -> None:
    graph = flow(in_turns(random_settings(1)))
    assert turns_of(graph)["learner"].training == {"learner"}
    check_turns(graph)
    alone = flow(in_turns(random_settings(1)))
    config = alone.nodes["generator"].config
    alone.nodes["generator"].config = type(config)(
        **{**{f: getattr(config, f) for f in config.__struct_fields__}, "share": ""}
    )
    with pytest.raises(
        ConfigError, match=r"generator.turns: no node that trains or scores shares the devices of generator"
    ):
        turns_of(alone)
    sleepless = flow(in_turns(random_settings(1)))
    learner = sleepless.nodes["learner"]
    learner.config = type(learner.config)(engine="tests.unit.runtime.test_lease:Sleepless")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="cannot put aside what it holds"):
        check_turns(sleepless)


class Sleepless:
    """An engine that holds what it holds."""
