"""The node for the flow and the learner: the one that is named, and another only where that was lost meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import ResourceError, RunError
from flowrl.graph.graph import ClusterConfig
from flowrl.runtime import cluster as module
from flowrl.runtime.cluster import Cluster, Unanswered
from flowrl.runtime.fleet import Fleet
from flowrl.runtime.nodes import RayNode
from tests.support.flows import ENDLESS, flow

if TYPE_CHECKING:
    from collections.abc import Callable


def node(number: int, *, is_alive: bool = True) -> RayNode:
    return RayNode(id=f"n{number}", address=f"10.0.0.{number}", is_alive=is_alive, cpus=1, gpus=0)


def test_a_home_node_that_is_lost_is_replaced_and_one_that_never_was_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive, told = [node(1), node(2)], list[tuple[str, str, str]]()

    async def own(function: Callable[[], Any], **limits: Any) -> str:
        return "n1"

    async def nodes() -> list[RayNode]:
        return alive

    monkeypatch.setattr(module, "in_thread", own)
    cluster = Cluster(None, "10.0.0.1:6379")
    monkeypatch.setattr(cluster, "nodes", nodes)
    config = ClusterConfig(home="10.0.0.2")
    fleet = Fleet(flow(ENDLESS), cluster, config, lambda *said: told.append(said))
    for is_first in (True, False):
        assert asyncio.run(fleet._find_home(is_first=is_first)) == node(2)
    alive[1] = node(2, is_alive=False)
    assert asyncio.run(fleet._find_home(is_first=False)) == node(1)
    assert told == [("warning", "node 10.0.0.2", "is gone, and was the home node: that is 10.0.0.1 now")]
    with pytest.raises(ResourceError, match=r"no node 10\.0\.0\.2 is there, but 10\.0\.0\.1"):
        asyncio.run(fleet._find_home(is_first=True))


def test_a_place_on_a_home_node_that_is_lost_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may have taken the node for alive when the place was asked for: it comes back as another."""
    cluster = Cluster(None, "10.0.0.1:6379")
    seen = iter([[node(1), node(2)], [node(1), node(2)], [node(1), node(2, is_alive=False)]])

    async def nodes() -> list[RayNode]:
        return next(seen)

    async def never(group: Any, **limits: Any) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(cluster, "nodes", nodes)
    monkeypatch.setattr("flowrl.runtime.fleet.answer_of", never)
    monkeypatch.setattr("flowrl.runtime.fleet.TELL_S", 0.001)
    monkeypatch.setattr("flowrl.runtime.fleet.LOOK_S", 0.0)
    fleet = Fleet(flow(ENDLESS), cluster, ClusterConfig(home="10.0.0.2"), lambda *said: None)

    async def body() -> bool:
        await fleet.look(is_due=True)
        fleet._home = node(2)
        return await fleet._granted(SimpleNamespace(ready=lambda: None), [("learner.0", {"CPU": 1.0})])

    assert asyncio.run(body()) is False


def test_a_head_that_was_not_asked_for_long_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the flow's host is waited for, nobody asks it; what the attempt reserved is given back all the same."""
    cluster, answers, now_s = Cluster(None, "10.0.0.1:6379"), [True], [0.0]

    async def nodes() -> list[RayNode]:
        if not answers[0]:
            raise Unanswered("ray", "not heard from for 20 s", within_s=20.0)
        return [node(1)]

    monkeypatch.setattr(cluster, "nodes", nodes)
    monkeypatch.setattr("flowrl.runtime.fleet.time.monotonic", lambda: now_s[0])
    fleet = Fleet(flow(ENDLESS), cluster, ClusterConfig(), lambda *said: None)

    async def body() -> None:
        await fleet.look(is_due=True)
        now_s[0] = 1000.0
        assert await fleet.has_head()
        answers[0] = False
        assert not await fleet.has_head()
        for now_s[0] in (1000.0, 1030.0):
            assert await fleet.look() is False
        now_s[0] = 1033.0
        with pytest.raises(RunError, match="its head has not answered for 33 s"):
            await fleet.look()

    asyncio.run(body())


def test_ray_is_started_once_more_where_a_busy_machine_kept_it_from_showing_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[int] = []

    def start(address: str | None, *, num_gpus: int) -> None:
        tries.append(num_gpus)
        if len(tries) < 2:  # as Ray raises it
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(module, "_start_ray", start)
    Cluster(None, None)._start()
    assert tries == [0, 0]


def test_whatever_ray_raises_at_its_start_is_one_line() -> None:
    refused = Cluster(None, None)._refusal(Exception("The current node timed out\nduring startup."))
    assert isinstance(refused, ResourceError)
    assert str(refused).startswith("ray: cannot start or reach Ray (The current node timed out during startup.)")
