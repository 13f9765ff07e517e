"""Queue, register and credits: order, fairness, bounds, closing, and that a cancelled wait loses nothing."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from flowrl.errors import ChannelClosed, RunError
from flowrl.runtime.channels import CreditsChannel, RegisterChannel
from flowrl.runtime.queue import QueueChannel
from flowrl.simulation.clock import run_virtual

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any


def queue(depth: int = 4, max_bytes: int = 1000, window: int | None = None) -> QueueChannel:
    return QueueChannel("q", depth=depth, max_bytes=max_bytes, window=window)


async def settle() -> None:
    """Let everything that is ready run."""
    for _ in range(20):
        await asyncio.sleep(0)


def check(body: Coroutine[Any, Any, None]) -> None:
    run_virtual(body)


def test_the_oldest_group_leaves_first_whatever_the_order_of_arrival() -> None:
    async def body() -> None:
        q = queue()
        for key in (5, 3, 9):
            await q.put(key, b"x")
        assert [item.key for item in await q.get("a", 2)] == [3, 5]
        await q.put(4, b"x")
        q.release("a")
        assert [item.key for item in await q.get("b", 10)] == [3, 4, 5, 9]
        assert q.size_bytes == 0

    check(body())


def test_a_full_queue_makes_the_sender_wait_and_never_drops() -> None:
    async def body() -> None:
        q = queue(depth=2)
        senders = [asyncio.create_task(q.put(key, b"x")) for key in range(5)]
        await settle()
        assert len(q) == 2
        assert [s.done() for s in senders] == [True, True, False, False, False]
        assert [(await q.get("a", 1))[0].key for _ in range(5)] == [0, 1, 2, 3, 4]
        await asyncio.gather(*senders)

    check(body())


def test_the_byte_bound_holds_and_one_larger_item_passes_alone() -> None:
    async def body() -> None:
        q = queue(depth=10, max_bytes=10)
        await q.put(0, b"x" * 25)
        second = asyncio.create_task(q.put(1, b"x" * 6))
        await settle()
        assert not second.done()
        assert (await q.get("a", 1))[0].key == 0
        await second
        assert q.size_bytes == 6

    check(body())


def test_receivers_are_served_first_come_first_served() -> None:
    async def body() -> None:
        q = queue()
        receivers = [asyncio.create_task(q.get(f"r{i}", 1)) for i in range(3)]
        await settle()
        for key in range(3):
            await q.put(key, b"x")
        assert [(await r)[0].key for r in receivers] == [0, 1, 2]

    check(body())


def test_a_key_put_twice_is_accepted_once() -> None:
    async def body() -> None:
        q = queue()
        assert await q.put(1, b"x")
        assert not await q.put(1, b"x")
        assert len(await q.get("a", 10)) == 1
        q.settle(1)
        assert not await q.put(1, b"x")

    check(body())


def test_an_ordered_queue_delivers_by_key_whatever_the_order_of_arrival() -> None:
    async def body() -> None:
        q = queue(depth=6, window=1)
        for key in (4, 2, 0, 3, 1):
            await q.put(key, b"x")
        assert [item.key for item in await q.get("a", 10)] == [0, 1, 2, 3, 4]

    check(body())


def test_an_ordered_queue_waits_for_the_oldest_group_still_out() -> None:
    async def body() -> None:
        q = queue(depth=6, window=2)
        await q.put(1, b"x")
        await q.put(2, b"x")
        assert [item.key for item in await q.get("a", 10)] == [1]
        waiting = asyncio.create_task(q.get("a", 10))
        await settle()
        assert not waiting.done()  # group 2 is outside the window until group 0 is delivered
        await q.put(0, b"x")
        assert [item.key for item in await waiting] == [0, 2]

    check(body())


def test_an_ordered_queue_that_is_full_still_takes_the_group_it_waits_for() -> None:
    async def body() -> None:
        q = queue(depth=2, window=1)
        await q.put(1, b"x")
        await q.put(2, b"x")
        late = asyncio.create_task(q.put(3, b"x"))
        await settle()
        await q.put(0, b"x")
        assert [item.key for item in await q.get("a", 10)] == [0, 1, 2]
        await late

    check(body())


def test_a_tombstone_lets_the_order_go_on() -> None:
    async def body() -> None:
        q = queue(depth=4, window=1)
        await q.put(1, b"x")
        waiting = asyncio.create_task(q.get("a", 1))
        await settle()
        q.skip(0)
        assert (await waiting)[0].key == 1

    check(body())


def test_a_receiver_cancelled_before_or_after_its_grant_loses_no_item() -> None:
    async def body() -> None:
        q = queue()
        early = asyncio.create_task(q.get("a", 1))
        await settle()
        early.cancel()
        await settle()
        granted = asyncio.create_task(q.get("a", 1))
        await settle()
        await q.put(7, b"x")  # grants the wait; the task has not run yet
        granted.cancel()
        await settle()
        assert granted.cancelled()
        assert (await q.get("b", 1))[0].key == 7

    check(body())


def test_a_sender_cancelled_while_it_waits_for_room_leaves_nothing_behind() -> None:
    async def body() -> None:
        q = queue(depth=1)
        await q.put(0, b"x")
        sender = asyncio.create_task(q.put(1, b"x"))
        await settle()
        sender.cancel()
        await settle()
        assert (await q.get("a", 5))[0].key == 0
        assert len(q) == 0
        assert await q.put(1, b"x")  # it may be sent again

    check(body())


def test_closing_lets_receivers_have_what_is_left_and_refuses_senders() -> None:
    async def body() -> None:
        q = queue(depth=1)
        await q.put(0, b"x")
        sender = asyncio.create_task(q.put(1, b"x"))
        await settle()
        q.close()
        with pytest.raises(ChannelClosed):
            await sender
        assert (await q.get("a", 1))[0].key == 0
        with pytest.raises(ChannelClosed):
            await q.get("a", 1)

    check(body())


def test_what_a_dead_consumer_held_goes_to_another_in_order() -> None:
    async def body() -> None:
        q = queue(depth=4, window=1)
        for key in range(3):
            await q.put(key, b"x")
        assert len(await q.get("dead", 2)) == 2
        assert q.release("dead") == [0, 1]
        assert [item.key for item in await q.get("alive", 5)] == [0, 1, 2]

    check(body())


@pytest.mark.parametrize("seed", range(200))
def test_random_schedules_deliver_each_item_once_within_the_bounds(seed: int) -> None:
    """Random senders, receivers, deaths and cancellations; the seed in the test's name reproduces it."""
    draw = random.Random(seed)
    window = draw.choice([None, 1, 2, 3])
    q = queue(depth=draw.randint(1, 5) if window is None else 12, max_bytes=draw.randint(1, 40), window=window)
    if window is not None:
        q.max_bytes = 10_000
    keys = list(range(12))
    draw.shuffle(keys)
    delivered: list[int] = []

    async def send(key: int) -> None:
        body = b"x" * draw.randint(1, 9)
        while True:
            task = asyncio.create_task(q.put(key, body))
            if draw.random() < 0.3:
                await asyncio.sleep(draw.random())
                if not task.done() and task.cancel():
                    await asyncio.gather(task, return_exceptions=True)
                    continue
            await task
            return

    async def receive(name: str) -> None:
        while len(delivered) < len(keys):
            task = asyncio.create_task(q.get(name, draw.randint(1, 3)))
            try:
                if draw.random() < 0.3:
                    async with asyncio.timeout(draw.random()):
                        items = await task
                else:
                    items = await task
            except TimeoutError:
                continue
            except ChannelClosed:
                return
            if draw.random() < 0.2:
                q.release(name)
                continue
            assert window is None or all(item.key < q.head + window for item in items)
            for item in items:
                delivered.append(item.key)
                q.settle(item.key)
            await asyncio.sleep(draw.random())
        q.close()

    async def body() -> None:
        async with asyncio.TaskGroup() as tasks:
            for key in keys:
                tasks.create_task(send(key))
            for name in ("a", "b") if window is None else ("a",):
                tasks.create_task(receive(name))
        assert len(q) <= q.depth

    run_virtual(body())
    assert sorted(delivered) == list(range(12))
    if window == 1:
        assert delivered == sorted(delivered)


def test_a_register_gives_the_newest_value_and_waits_for_newer_ones() -> None:
    async def body() -> None:
        r = RegisterChannel("r", [])
        await r.put(1, b"one")
        await r.put(3, b"three")
        assert await r.get("g", -1) == (3, b"three")
        waiting = asyncio.create_task(r.get("g", 3))
        await settle()
        assert not waiting.done()
        writer = asyncio.create_task(r.put(4, b"four"))
        assert await waiting == (4, b"four")
        await settle()
        assert not writer.done()  # who reads is waited for
        r.confirm("g", 4)
        await writer

    check(body())


def test_a_register_refuses_an_older_version() -> None:
    async def body() -> None:
        r = RegisterChannel("r", [])
        await r.put(2, b"two")
        await r.put(2, b"two")  # of a writer that was restarted
        for version, body in ((1, b"two"), (2, b"other")):
            with pytest.raises(RunError, match="not newer"):
                await r.put(version, body)

    check(body())


def test_a_writer_waits_until_every_live_reader_has_confirmed() -> None:
    async def body() -> None:
        r = RegisterChannel("r", ["g.0", "g.1", "g.2"])
        writer = asyncio.create_task(r.put(1, b""))
        await settle()
        r.confirm("g.0", 1)
        await settle()
        assert not writer.done()
        r.release("g.1")
        await settle()
        assert not writer.done()
        r.confirm("g.2", 1)
        await writer

    check(body())


def test_a_credit_returns_once() -> None:
    async def body() -> None:
        c = CreditsChannel("c", initial=1)
        assert await c.get("p") == 0
        c.admit(0)
        c.give_back([0], are_learned=True)
        with pytest.raises(RunError, match="twice"):
            c.give_back([0], are_learned=True)

    check(body())


def test_no_group_is_admitted_without_a_credit() -> None:
    c = CreditsChannel("c", initial=1)
    with pytest.raises(RunError, match="without a credit"):
        c.admit(0)


def test_a_cancelled_taker_loses_no_credit() -> None:
    async def body() -> None:
        c = CreditsChannel("c", initial=1)
        await c.get("p")
        c.admit(0)
        taker = asyncio.create_task(c.get("p"))
        await settle()
        c.give_back([0], are_learned=True)
        taker.cancel()
        await settle()
        assert c.available == 1
        assert await c.get("q") == 1  # the id that the cancelled taker would have had

    check(body())


def test_a_dead_takers_groups_are_given_out_again_before_new_ones() -> None:
    async def body() -> None:
        c = CreditsChannel("c", initial=3)
        assert [await c.get("dead"), await c.get("dead"), await c.get("p")] == [0, 1, 2]
        c.admit(1)
        c.release("dead")
        assert await c.get("p") == 0

    check(body())


def test_no_more_groups_are_admitted_than_the_run_will_learn() -> None:
    async def body() -> None:
        c = CreditsChannel("c", initial=4, total=2)
        for group in (await c.get("p"), await c.get("p")):
            c.admit(group)
        third = asyncio.create_task(c.get("p"))
        await settle()
        assert not third.done()
        c.give_back([0], are_learned=True)
        await settle()
        assert not third.done()
        c.give_back([1], are_learned=False)  # filtered: another takes its place
        assert await third == 2

    check(body())


def test_a_resumed_order_passes_over_groups_that_have_ended() -> None:
    async def body() -> None:
        c = CreditsChannel("c", initial=4, first_group=5, ended=[6, 7])
        assert [await c.get("p"), await c.get("p")] == [5, 8]
        q = QueueChannel("q", depth=4, max_bytes=100, window=1, first_key=5, settled=[6, 7])
        await q.put(8, b"x")
        await q.put(5, b"x")
        assert [item.key for item in await q.get("a", 4)] == [5, 8]

    check(body())


def test_a_suspect_is_held_alone() -> None:
    async def body() -> None:
        q = queue()
        for key in range(3):
            await q.put(key, b"x")
        q.suspect(0)
        assert [item.key for item in await q.get("a", 1)] == [0]  # it held nothing
        waiting = asyncio.create_task(q.get("a", 1))
        assert [item.key for item in await q.get("b", 1)] == [1]
        await settle()
        assert not waiting.done()
        q.settle(0)
        assert [item.key for item in await waiting] == [2]

    check(body())


def test_whoever_holds_something_is_not_given_a_suspect() -> None:
    async def body() -> None:
        q = queue()
        for key in range(3):
            await q.put(key, b"x")
        await q.get("a", 1)
        q.suspect(1)
        assert [item.key for item in await q.get("a", 5)] == [2]

    check(body())


def test_keys_that_have_ended_are_refused_without_being_remembered() -> None:
    async def body() -> None:
        q = queue()
        for key in range(3):
            await q.put(key, b"x")
            await q.get("a", 1)
            q.settle(key)
        q.ended_below(2)
        assert q._accepted == {2}
        assert [await q.put(key, b"x") for key in range(4)] == [False, False, False, True]
        q.ended_below(1)
        assert not await q.put(1, b"x")

    check(body())


def test_a_forgotten_key_may_be_sent_again() -> None:
    async def body() -> None:
        q = queue()
        await q.put(1, b"old")
        q.forget(1)
        assert await q.put(1, b"new")
        assert [item.body for item in await q.get("a", 5)] == [b"new"]

    check(body())
