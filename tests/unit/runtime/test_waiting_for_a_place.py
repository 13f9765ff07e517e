"""A stop that is asked for while something has no place on any machine: it ends the run, whoever waits for what."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from flowrl.runtime.local import LocalOptions, LocalWorkers, run_local
from flowrl.runtime.supervisor import Outcome, Start, Supervisor
from flowrl.simulation.clock import run_virtual
from tests.support.flows import FlowSettings, flow

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.telemetry.events import Event

SETTINGS = FlowSettings(
    seed=0, steps=100_000, groups_per_step=2, window=1, max_staleness=1, generators=1, scorers=1, depth=4,
    token_s=0.01, sigma=0.0, update_s=0.01, score_s=0.01, train_s=0.01, filter_every=0, initial=4, save_every=2,
    is_finite=False,
)  # fmt: skip


async def stop_after(options: LocalOptions, seconds: float) -> None:
    await asyncio.sleep(seconds)
    options.stopping.set()


def stopped(kind: type[LocalWorkers], run_dir: Path) -> tuple[Outcome, float]:
    """Return how a run on such workers ends that is stopped after five seconds, and when."""

    async def body() -> tuple[Outcome, float]:
        options = LocalOptions(run_dir=run_dir, is_virtual=True, now=asyncio.get_running_loop().time)
        graph: Graph = flow(SETTINGS)
        stopping = asyncio.ensure_future(stop_after(options, 5.0))
        outcome = await Supervisor(graph, kind(graph, options), options).run()
        await stopping
        return outcome, asyncio.get_running_loop().time()

    return run_virtual(body())


def test_a_stop_is_heard_while_devices_are_waited_for(tmp_path: Path) -> None:
    class Full(LocalWorkers):
        async def open(self, start: Start) -> None:
            await asyncio.get_running_loop().create_future()  # no device is ever free

    outcome, took_s = stopped(Full, tmp_path)
    assert outcome.was_stopped
    assert outcome.totals["unfinished"] == 0
    assert took_s < 6.0


def test_a_stop_while_replicas_start_waits_for_none_of_them(tmp_path: Path) -> None:
    class Slow(LocalWorkers):
        async def run(self, replica: str, incarnation: int, start: Start) -> None:
            await asyncio.sleep(600.0 if replica == "generator.0" else 0.0)  # it loads a large model
            await super().run(replica, incarnation, start)

    outcome, took_s = stopped(Slow, tmp_path)
    assert outcome.was_stopped
    assert outcome.totals["admitted"] == 0, "what was admitted and given to nobody is admitted again"
    assert took_s < 20.0


def test_after_a_stop_is_asked_for_nothing_starts_again(tmp_path: Path) -> None:
    starts = 0

    class Lost(LocalWorkers):
        async def open(self, start: Start) -> None:
            nonlocal starts
            starts += 1
            await super().open(start)

    async def body() -> Outcome:
        options = LocalOptions(run_dir=tmp_path, is_virtual=True, now=asyncio.get_running_loop().time)
        graph: Graph = flow(SETTINGS)
        workers = Lost(graph, options)

        async def lose() -> None:
            await asyncio.sleep(5.0)
            options.stopping.set()
            workers.lose_host()

        losing = asyncio.ensure_future(lose())
        outcome = await Supervisor(graph, workers, options).run()
        await losing
        return outcome

    outcome = run_virtual(body())
    assert outcome.was_stopped
    assert outcome.totals["learned"] > 0, "its newest checkpoint's"
    assert starts == 1


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_generator_that_has_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    waiting: set[str] = set()
    monkeypatch.setattr(LocalWorkers, "unplaced", property(lambda workers: waiting))
    run = LocalWorkers.run

    async def run_but_once(workers: LocalWorkers, replica: str, incarnation: int, start: Start) -> None:
        if replica == "generator.0" and incarnation:
            waiting.add(replica)
            await asyncio.get_running_loop().create_future()  # its machine is gone, and there is no other
        await run(workers, replica, incarnation, start)

    monkeypatch.setattr(LocalWorkers, "run", run_but_once)

    async def strike(workers: LocalWorkers) -> None:
        await asyncio.sleep(0.5)
        await workers.kill("generator.0")

    async def body() -> tuple[Outcome, float]:
        options = LocalOptions(run_dir=tmp_path, is_virtual=True, consume=events.extend, chaos=strike,
                               status_interval_s=50.0)  # fmt: skip
        stopping = asyncio.ensure_future(stop_after(options, 4.0))
        outcome = await run_local(flow(SETTINGS), options)
        await stopping
        return outcome, asyncio.get_running_loop().time()

    outcome, took_s = run_virtual(body())
    assert outcome.was_stopped
    assert took_s < 7.0
    assert outcome.totals["learned"] > 0, "what the newest checkpoint holds"
    assert any("generator: has no process" in str(event) or "has no process, so" in str(event) for event in events)
