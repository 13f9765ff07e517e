"""Replicas that join and leave while a run goes on, among deaths and bad links: nothing lost, twice or too stale."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.errors import ConfigError
from flowrl.graph.program import load_program, plan_of
from flowrl.runtime.fleet import room_for
from flowrl.runtime.launch import RunCompanion, placed_on
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.runtime.nodes import RayNode
from flowrl.runtime.placement import places, places_of
from flowrl.runtime.rundir import Claim
from flowrl.runtime.scaling import FILE, MOST_REPLICAS, check_most, scale
from flowrl.simulation.clock import run_virtual
from flowrl.telemetry.events import Notice
from tests.support.chaos import Chaos
from tests.support.command import ROOT
from tests.support.flows import FlowSettings, flow
from tests.support.recovery import FULL, SHARES, check_share, run_faulty

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.runtime.local import LocalWorkers
    from flowrl.runtime.supervisor import Scaling

SETTINGS = FlowSettings(
    seed=0, steps=40, groups_per_step=4, window=2, max_staleness=2, generators=2, scorers=1, depth=4, token_s=0.05,
    sigma=0.5, update_s=0.01, score_s=0.01, train_s=0.01, filter_every=5, initial=8, save_every=4,
)  # fmt: skip


@dataclass
class Fleeting(Chaos):
    """Faults, and a fleet that is asked to grow and to shrink."""

    scalings: int = 6

    async def strike(self, workers: LocalWorkers) -> None:
        async with asyncio.TaskGroup() as both:
            both.create_task(super().strike(workers))
            both.create_task(self._scale(workers._options.scaling))

    async def _scale(self, scaling: Scaling) -> None:
        while self.scalings > 0:
            await asyncio.sleep(self._draw.expovariate(1 / self.mean_s))
            self.scalings -= 1
            node, count = self._draw.choice(["generator", "scorer"]), self._draw.randint(1, 5)
            self.struck.append(f"{node}={count}")
            scaling.ask(node, count)


def in_a_fleet(seed: int, run_dir: Path) -> None:
    run_faulty(seed, run_dir, chaos=Fleeting(seed, deaths=seed % 4))


@pytest.mark.parametrize("first", range(0, 60, 6))
def test_random_schedules_of_joins_leaves_and_deaths_keep_the_laws(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 6):
        in_a_fleet(seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 1000 + FULL, FULL // SHARES))
def test_ten_thousand_schedules_of_joins_leaves_and_deaths_keep_the_laws(first: int) -> None:
    check_share(first, in_a_fleet)


def test_a_fleet_of_two_becomes_four_one_and_three(tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    told: list[Any] = []

    async def change(workers: LocalWorkers) -> None:
        await asyncio.sleep(0.5)
        for count in (4, 1, 3):
            workers._options.scaling.ask("generator", count)
            await asyncio.sleep(0.5)
            counts.append((count, sum(name.startswith("generator.") for name in workers.replicas)))

    async def body() -> Any:
        options = LocalOptions(run_dir=tmp_path, is_virtual=True, chaos=change, consume=told.extend,
                               status_interval_s=50.0)  # fmt: skip
        return await run_local(flow(SETTINGS), options)

    outcome = run_virtual(body())
    assert counts == [(4, 4), (1, 1), (3, 3)]
    assert outcome.totals["learned"] == 160
    said = [f"{event.where} {event.text}" for event in told if isinstance(event, Notice)]
    assert next(line for line in said if line.startswith("generator.3")) == "generator.3 joins"
    assert any(line.startswith("generator.1 has left") for line in said)


def test_who_was_let_go_is_not_waited_for_after_a_rollback(tmp_path: Path) -> None:
    """The graph still has it, and a flow that begins anew would wait for its acknowledgement for ever."""

    async def shrink_and_fall(workers: LocalWorkers) -> None:
        if not workers._options.scaling.wanted:
            await asyncio.sleep(0.5)
            workers._options.scaling.ask("generator", 1)
            await asyncio.sleep(0.5)
            workers.lose_host()

    async def body() -> Any:
        options = LocalOptions(run_dir=tmp_path, is_virtual=True, chaos=shrink_and_fall, stall_timeout_s=1000.0,
                               status_interval_s=50.0)  # fmt: skip
        return await run_local(flow(SETTINGS), options)

    outcome = run_virtual(body())
    assert outcome.recoveries["rollback"] == 1
    assert outcome.totals["learned"] == 160


def test_a_replica_that_joins_reserves_what_its_siblings_do() -> None:
    graph = flow(SETTINGS)
    (first,), (fifth,) = places_of(graph, "generator.0"), places_of(graph, "generator.4")
    assert fifth == msgspec.structs.replace(first, replica=4)
    assert graph.nodes["generator"].config.replicas == 2


def test_a_range_takes_what_room_there_is_and_never_less_than_its_least() -> None:
    graph = flow(SETTINGS)
    for name, cpus in {"generator": 2.0, "scorer": 1.0}.items():
        config = graph.nodes[name].config
        graph.nodes[name].config = msgspec.structs.replace(config, cpus=cpus)
    others = sum(p.cpus for p in places(graph) if p.node != "generator")

    def room(*cpus: float) -> dict[str, int]:
        nodes = [RayNode(id=str(k), address=str(k), is_alive=True, cpus=each, gpus=0) for k, each in enumerate(cpus)]
        return room_for(graph, {"generator": 5}, nodes)

    assert room(others, 4.0) == {"generator": 2}
    assert room(others, 4.0, 3.0) == {"generator": 3}, "one has room on the node that joined, its last core is left"
    assert room(others, 40.0) == {"generator": 5}
    assert room(1.0) == {"generator": 2}


@pytest.mark.parametrize(
    ("most", "words"),
    [({"generator": 1}, "is 1, but generator.replicas=2"), ({"learner": 2}, "one replica only"), ({"x": 2}, "no node")],
)
def test_a_range_that_cannot_be_is_refused(most: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_most(flow(SETTINGS), most)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("generator", "is not NODE=N"),
        ("generator=0", "is not NODE=N"),
        ("generator=x", "is not NODE=N"),
        ("generator=²", "is not NODE=N"),
        ("generator=1000000000", "is not NODE=N with N of 1 to 99999"),
        ("generater=2", "did you mean 'generator'"),
        ("learner=2", "can have one replica only"),
        ("generator=2", "no process drives it"),
    ],
)
def test_what_cannot_be_scaled_is_refused(tmp_path: Path, asked: str, words: str) -> None:
    (tmp_path / "graph.json").write_bytes(msgspec.json.encode(plan_of(flow(SETTINGS))))
    (tmp_path / "settings.yaml").write_text("steps: 2\n")
    with pytest.raises(ConfigError, match=words):
        scale(tmp_path, [asked])
    assert not (tmp_path / FILE).exists()


def test_what_is_asked_of_a_run_that_goes_on_is_written_for_its_driver(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_bytes(msgspec.json.encode(plan_of(flow(SETTINGS))))
    (tmp_path / "settings.yaml").write_text("steps: 2\n")
    with contextlib.closing(Claim(tmp_path)):
        scale(tmp_path, ["generator=4"])
        scale(tmp_path, ["scorer=2", "generator=3"])
    assert json.loads((tmp_path / FILE).read_text()) == {"generator": 3, "scorer": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "most"),
    [
        (["generator.replicas=auto"], {"generator": MOST_REPLICAS}),
        (["generator.replicas=auto", "cluster.most.generator=3"], {"generator": 3}),
        (["generator.replicas=2", "learner.ranks=auto"], {}),
        (["learner.replicas=auto", "reward={replicas: auto}"], {"reward": MOST_REPLICAS}),
    ],
)
def test_replicas_left_to_auto_are_as_many_as_a_cluster_has_room_for(given: list[str], most: dict[str, int]) -> None:
    program = load_program(ROOT / "graphs" / "group_async.py", overrides=given)
    program = placed_on(program, None, config=None, overrides=given, companion=RunCompanion(), say=pytest.fail)
    assert program.settings.cluster.most == most
    check_most(program.graph, most)
