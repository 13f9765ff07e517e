"""The wire on its own: both sides in this process, over a real socket."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
import uvloop

from flowrl.errors import ChannelClosed, LastingError, RunError
from flowrl.runtime.calls import CallClient, CallGate
from flowrl.runtime.flow import Flow
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.proxy import Proxy
from flowrl.runtime.wire import Address, Connection, Listener
from tests.contracts.test_flow_clients import SETTINGS, SOON_S
from tests.support.flows import flow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

pytestmark = pytest.mark.slow


@asynccontextmanager
async def listening(*, by_proxy: bool = False) -> AsyncIterator[tuple[Flow, Address]]:
    f = Flow(flow(SETTINGS), Ledger(None))
    listener = Listener(CallGate(f))
    address = await listener.open("127.0.0.1")
    if by_proxy:
        link = await Connection.open(address)
        proxy = Listener(Proxy(link))
        yield f, await proxy.open("127.0.0.1")
        proxy.close()
        await link.close()
    else:
        yield f, address
    listener.close()


def check(body: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(300.0):
            await body

    uvloop.run(within())


async def only_these_wait(f: Flow, *replicas: str) -> None:
    """Wait until these and no others wait for something."""
    while {line.split()[0] for line in f.waits()} != set(replicas):  # noqa: ASYNC110  a flow tells nobody who waits
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("by_proxy", [False, True])
def test_a_message_or_credit_given_to_a_caller_that_gave_up_goes_to_the_next(by_proxy: bool) -> None:
    async def body() -> None:
        given_up = 0
        async with listening(by_proxy=by_proxy) as (_, address):
            wire = await Connection.open(address)
            prompts, first, second = (
                CallClient(wire.carry, name, 0) for name in ("prompts.0", "generator.0", "scorer.0")
            )
            for key in range(60):
                later_s = 0.00005 * max(0, key % 20 - 4)  # then the answer is not asked for yet, under way, or there
                gives_up = key % 5 < 4
                acquiring = asyncio.ensure_future(prompts.acquire("prompts.credits"))
                await asyncio.sleep(later_s)
                if gives_up and acquiring.cancel():
                    given_up += 1
                    acquiring = asyncio.ensure_future(prompts.acquire("prompts.credits"))
                assert await asyncio.wait_for(acquiring, SOON_S) == key
                await prompts.put("prompts.prompts", key, b"%d" % key)
                getting = asyncio.ensure_future(first.get("generator.prompts", 1))
                await asyncio.sleep(later_s)
                holder = first
                if gives_up and getting.cancel():
                    holder = second
                    getting = asyncio.ensure_future(second.get("generator.prompts", 1))
                assert await asyncio.wait_for(getting, SOON_S) == [b"%d" % key]
                await holder.reject("generator.prompts", key, "filtered", "seen")
            await wire.close()
        assert 10 < given_up < 60, "some calls were given up and some were not"

    check(body())


def test_large_messages_pass_whole_and_small_ones_pass_by_them() -> None:
    async def body() -> None:
        large = bytes(range(256)) * (1 << 16)  # 16 MiB
        async with listening() as (_, address):
            wire = await Connection.open(address)
            prompts, generator = CallClient(wire.carry, "prompts.0", 0), CallClient(wire.carry, "generator.0", 0)
            waiting = asyncio.ensure_future(generator.get("generator.prompts", 2))
            for key, sent in enumerate((large, b"small")):
                assert await prompts.acquire("prompts.credits") == key
                await prompts.put("prompts.prompts", key, sent)
            assert await waiting == [large]
            assert await generator.get("generator.prompts", 2) == [b"small"]
            await wire.close()

    check(body())


def test_who_does_not_know_the_secret_is_not_heard() -> None:
    async def body() -> None:
        async with listening() as (f, address):
            wire = await Connection.open(address._replace(secret="00" * 32))
            with pytest.raises(RunError, match="host is gone"):
                await CallClient(wire.carry, "prompts.0", 0).acquire("prompts.credits")
            assert not f.ledger.num_open
            assert "prompts.0" not in " ".join(f.waits())
            await wire.close()

    check(body())


def test_a_failure_or_closed_edge_arrives_as_what_it_is() -> None:
    async def lasting(replica: str, text: str) -> None:
        raise LastingError("learner", "is too old", "learn in order")

    async def body() -> None:
        async with listening() as (f, address):
            wire = await Connection.open(address)
            prompts = CallClient(wire.carry, "prompts.0", 0)
            with pytest.raises(RunError, match="group 7 was admitted without a credit"):
                await prompts.put("prompts.prompts", 7, b"")
            with pytest.raises(RunError, match="KeyError"):
                await prompts.get("nowhere.at_all", 1)
            f.note_wait = lasting
            with pytest.raises(LastingError, match="learner: is too old; learn in order"):
                await prompts.note_wait("a disk")
            f.close()
            with pytest.raises(ChannelClosed):
                await prompts.acquire("prompts.credits")
            await wire.close()

    check(body())


def test_waits_end_when_the_other_side_is_gone() -> None:
    async def body() -> None:
        async with listening() as (f, address):
            wire, other = await Connection.open(address), await Connection.open(address)
            waiting = asyncio.ensure_future(CallClient(wire.carry, "generator.0", 0).get("generator.prompts", 1))
            staying = asyncio.ensure_future(CallClient(other.carry, "generator.1", 0).get("generator.prompts", 1))
            await only_these_wait(f, "generator.0", "generator.1")
            await wire.close()
            waiting.cancel()
            await only_these_wait(f, "generator.1")
            cast("asyncio.Transport", other._transport).abort()
            with pytest.raises(RunError, match="host is gone"):
                await staying
            with pytest.raises(RunError, match="host is gone"):
                await CallClient(other.carry, "generator.1", 0).get("generator.prompts", 1)
            await only_these_wait(f)
            await other.close()

    check(body())
