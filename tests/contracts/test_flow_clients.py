"""What a stage may rely on at its ports, on both runtimes: order, fairness, bound, closing, cancellation.

The local client is the flow itself; the Ray client calls it in the hub's actor, over the wire; others through proxies.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.errors import ChannelClosed
from flowrl.graph.program import plan_of
from flowrl.messages import Credit, encode
from flowrl.runtime.calls import Call, CallClient, CallGate
from flowrl.runtime.flow import Flow
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.proxy import Proxy
from flowrl.runtime.wire import Address, Connection, Listener
from flowrl.telemetry import clock
from tests.support.flows import FlowSettings, flow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from flowrl.runtime.local import Carry

pytestmark = pytest.mark.slow

SETTINGS = FlowSettings(
    seed=0, steps=2, groups_per_step=2, window=1, max_staleness=1, generators=2, scorers=2, depth=2, token_s=0.01,
    sigma=0.0, update_s=0.0, score_s=0.01, train_s=0.01, filter_every=0, initial=4, is_finite=False,
)  # fmt: skip


class Clients:
    """The flow as each replica of the test sees it, and the list of who waits for what."""

    def __init__(self, carry: Carry, waits: Callable[[], Awaitable[list[str]]]) -> None:
        self.waits = waits
        self.prompts = CallClient(carry, "prompts.0", 0)
        self.generators = [CallClient(carry, f"generator.{i}", 0) for i in range(2)]
        self.learner = CallClient(carry, "learner.0", 0)


SOON_S = 60.0  # far above a call's time; nothing waits for it unless the contract is broken
Body = Any


@pytest.fixture(scope="module")
def started_ray() -> Iterator[None]:
    from flowrl.runtime.cluster import Cluster

    with Cluster(flow(SETTINGS), None):
        yield


@pytest.fixture(params=["local", "proxies", "ray"])
def on_runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Body], None]:
    """Run a test's body with a client of the runtime and a way to close its edges."""
    if request.param == "ray":
        request.getfixturevalue("started_ray")

    async def local(body: Body) -> None:
        f = Flow(flow(SETTINGS), Ledger(None))

        async def close() -> None:
            f.close()

        async def waits() -> list[str]:
            return f.waits()

        await body(Clients(CallGate(f).call, waits), close)

    async def through_proxies(body: Body) -> None:
        """Generator 0 and the learner call one proxy, the others a second one."""
        f = Flow(flow(SETTINGS), Ledger(None))
        hub = Listener(CallGate(f))
        address = await hub.open("127.0.0.1")
        links = [await Connection.open(address) for _ in range(2)]
        proxies = [Listener(Proxy(link)) for link in links]
        wires = [await Connection.open(await proxy.open("127.0.0.1")) for proxy in proxies]

        async def carry(call: Call) -> Any:
            return await wires[call.replica in ("generator.0", "learner.0")].carry(call)

        async def close() -> None:
            f.close()

        async def waits() -> list[str]:
            return f.waits()

        try:
            await body(Clients(carry, waits), close)
        finally:
            for each in (*wires, *links):
                await each.close()
            for listener in (*proxies, hub):
                listener.close()

    async def on_ray(body: Body) -> None:
        from flowrl.runtime.actors import HubActor, ray

        class Hub(HubActor):
            async def waits(self) -> list[str]:
                return self._flow.waits()

        actor: Any = ray.remote(num_cpus=0, max_concurrency=1000)(Hub)
        epoch = msgspec.json.encode(clock.epoch())
        hub = actor.remote(msgspec.json.encode(plan_of(flow(SETTINGS))), str(tmp_path), b"null", 0, 0, epoch)
        wire = await Connection.open(Address(*await hub.open.remote(60.0)))
        try:
            await body(Clients(wire.carry, hub.waits.remote), lambda: hub.close.remote())
        finally:
            await wire.close()
            ray.kill(hub)

    def run(body: Body) -> None:
        runtimes = {"local": local, "proxies": through_proxies, "ray": on_ray}
        asyncio.run(asyncio.wait_for(runtimes[request.param](body), 2 * SOON_S))

    return run


def test_a_ray_of_this_machine_alone_listens_on_the_loopback_interface_only(started_ray: None) -> None:
    import psutil

    listening: dict[str, set[str]] = {}
    for process in psutil.Process().children(recursive=True):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                listening.setdefault(connection.laddr.ip, set()).add(process.name())
    assert any("raylet" in names for names in listening.values()), listening
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


async def admit(client: Clients, *keys: int) -> None:
    for key in keys:
        await client.prompts.acquire("prompts.credits")
        await client.prompts.put("prompts.prompts", key, b"%d" % key)


async def is_waiting(client: Clients, work: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start something and return when the flow knows that it waits."""
    before = len(await client.waits())
    task = asyncio.ensure_future(work)
    while len(await client.waits()) == before:
        assert not task.done(), "it did not wait"
        await asyncio.sleep(0.001)
    return task


def test_messages_arrive_in_order_and_once(on_runtime: Callable[[Body], None]) -> None:
    async def body(client: Clients, close: Any) -> None:
        await admit(client, 0, 1)
        assert await client.generators[0].get("generator.prompts", 5) == [b"0", b"1"]
        await is_waiting(client, client.generators[1].get("generator.prompts", 1))

    on_runtime(body)


def test_a_full_queue_makes_the_sender_wait_until_there_is_room(on_runtime: Callable[[Body], None]) -> None:
    async def body(client: Clients, close: Any) -> None:
        await admit(client, 0, 1)
        third = await is_waiting(client, admit(client, 2))
        assert await client.generators[0].get("generator.prompts", 1) == [b"0"]
        await asyncio.wait_for(third, SOON_S)

    on_runtime(body)


def test_no_more_groups_are_out_than_there_are_credits(on_runtime: Callable[[Body], None]) -> None:
    async def body(client: Clients, close: Any) -> None:
        for key in range(4):
            await admit(client, key)
            await client.generators[0].get("generator.prompts", 1)
        fifth = await is_waiting(client, client.prompts.acquire("prompts.credits"))
        await client.learner.give_back("learner.released", encode(Credit(groups=[0])))
        await asyncio.wait_for(fifth, SOON_S)

    on_runtime(body)


def test_receivers_that_wait_are_served_in_the_order_they_came(on_runtime: Callable[[Body], None]) -> None:
    async def body(client: Clients, close: Any) -> None:
        first = await is_waiting(client, client.generators[0].get("generator.prompts", 1))
        second = await is_waiting(client, client.generators[1].get("generator.prompts", 1))
        await admit(client, 0, 1)
        assert [await first, await second] == [[b"0"], [b"1"]]

    on_runtime(body)


def test_a_cancelled_receiver_loses_no_message(on_runtime: Callable[[Body], None]) -> None:
    async def body(client: Clients, close: Any) -> None:
        waiting = await is_waiting(client, client.generators[0].get("generator.prompts", 1))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        while await client.waits():  # noqa: ASYNC110  until the cancellation has reached the flow
            await asyncio.sleep(0.001)
        await admit(client, 0)
        assert await asyncio.wait_for(client.generators[1].get("generator.prompts", 1), SOON_S) == [b"0"]

    on_runtime(body)


def test_closing_wakes_whoever_waits(on_runtime: Callable[[Body], None]) -> None:
    async def body(client: Clients, close: Any) -> None:
        reading = asyncio.ensure_future(client.generators[0].read("generator.weights", -1))  # nothing lists who reads
        getting = await is_waiting(client, client.generators[0].get("generator.prompts", 1))
        await close()
        for wait in (reading, getting):
            with pytest.raises(ChannelClosed):
                await asyncio.wait_for(wait, SOON_S)

    on_runtime(body)


def test_a_writer_waits_for_every_reader(on_runtime: Callable[[Body], None]) -> None:
    async def body(client: Clients, close: Any) -> None:
        writer = await is_waiting(client, client.learner.publish("learner.weights", 1, b"one"))
        assert list(await client.generators[0].read("generator.weights", -1)) == [1, b"one"]
        await client.generators[0].confirm("generator.weights", 1)
        assert not writer.done()
        await client.generators[1].confirm("generator.weights", 1)
        await asyncio.wait_for(writer, SOON_S)

    on_runtime(body)
