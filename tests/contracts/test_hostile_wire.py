"""Whoever talks nonsense to a listener of a run is not heard, and costs the run nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import uvloop

from flowrl.engines.weights.pull import MAX_REQUEST_BYTES, PullServer
from flowrl.errors import RewardError
from flowrl.rewards.http import Remote, scores_of
from flowrl.runtime.calls import CallClient, CallGate
from flowrl.runtime.flow import Flow
from flowrl.runtime.ledger import Ledger
from flowrl.runtime.wire import MAX_FRAME_BYTES, Connection, Listener
from tests.contracts.test_flow_clients import SETTINGS
from tests.support.flows import flow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from flowrl.runtime.wire import Address

pytestmark = pytest.mark.slow

SEED = 16
DEEP = b"\x91" * 50_000  # msgpack: lists within lists
HUGE = MAX_FRAME_BYTES + 1


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Flow, Address]]:
    f = Flow(flow(SETTINGS), Ledger(None))
    listener = Listener(CallGate(f))
    yield f, await listener.open("127.0.0.1")
    assert listener._server is not None
    listener._server.close()


async def say(address: Address, *, knows: bool, said: bytes) -> bytes:
    """Say something to a listener; returns what it answers until it hangs up, or nothing for a while."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write((bytes.fromhex(address.secret) if knows else b"") + said)
    answer = b""
    try:
        if not knows:
            writer.write_eof()
        async with asyncio.timeout(0.2):
            answer = await reader.read()
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return answer


def test_no_bytes_disturb_the_flow() -> None:
    draw = random.Random(SEED)

    def nonsense() -> bytes:
        body = draw.choice([draw.randbytes(draw.randrange(200)), DEEP, b"\xc1", b"\x94\x00\x90\x00\x00"])
        length = draw.choice([len(body), HUGE, 0, len(body) + 7])
        return length.to_bytes(4, "little") + body

    async def body() -> None:
        async with listening() as (f, address):
            for turn in range(60):
                knows = draw.random() < 0.5
                answer = await say(address, knows=knows, said=nonsense())
                assert knows or answer == b"", f"seed {SEED}, turn {turn}: who does not know the secret was answered"
            assert f.waits() == []
            wire = await Connection.open(address)
            assert await CallClient(wire.carry, "prompts.0", 0).acquire("prompts.credits") == 0
            await wire.close()

    uvloop.run(asyncio.wait_for(body(), 300.0))


def test_no_request_disturbs_whoever_serves_weights() -> None:
    draw = random.Random(SEED)
    server = PullServer("127.0.0.1", lambda version: [], timeout_s=60.0)
    try:
        for _ in range(40):
            said = draw.choice([
                draw.randbytes(draw.randrange(300)), b"[" * (MAX_REQUEST_BYTES - 1), b"x" * (1 << 16),
                '{"token":"ü","version":0}'.encode(), b'{"token":"' + b"0" * 32 + b'","version":99999999999999999999}',
            ])  # fmt: skip
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            with connection, contextlib.suppress(OSError):  # it may close before it has read all, at any call
                connection.sendall(said + b"\n")
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1) == b""
    finally:
        server.close()


@pytest.mark.parametrize(
    "body",
    [
        b'{"scores": ' + b"[" * 100_000, b'{"scores": [1e999]}', b'{"scores": [' + b"9" * 5000 + b"]}",
        b"\xff\xfe", b"",
        b'{"scores": "\x1b]52;c;eA==\x07"}', b"null", b'{"scores": [NaN]}',
    ],
)  # fmt: skip
def test_a_scoring_servers_nonsense_is_refused_in_one_harmless_line(body: bytes) -> None:
    from flowrl.rewards.function import checked

    with pytest.raises(RewardError) as caught:
        checked(scores_of(body, Remote(url="http://127.0.0.1:9"), "judge.0"), 1, "judge.0")
    assert str(caught.value).isprintable()
