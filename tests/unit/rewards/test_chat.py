"""A judge's answer counts for its text, in whatever form a server tells what else it knows; and what limits asking."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest

from flowrl.errors import ConfigError, LastingError, RewardError
from flowrl.rewards.chat import Chat, ChatServer, Spoken, check_chat
from flowrl.rewards.http import ServerReply
from flowrl.simulation.clock import run_virtual


def said(body: bytes) -> tuple[Spoken, int, int]:
    async def post(request: bytes) -> ServerReply:
        return ServerReply(status=200, retry_after=None, body=body)

    async def ask() -> tuple[Spoken, int, int]:
        server = ChatServer(url="http://127.0.0.1:1/v1", model="m", retries=0)
        chat = Chat(server, post, "judge", now=lambda: 0.0)
        return await chat.say([{"role": "user", "content": "?"}]), chat.paid.read, chat.paid.written

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 2}, (3, 2)), (None, (0, 0)), ([], (0, 0)),
        ({"prompt_tokens": None, "completion_tokens": "7"}, (0, 0)), ({"prompt_tokens": -4}, (0, 0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("logprobs", "likeliest"),
    [
        ({"content": [{"top_logprobs": [{"token": "a", "logprob": -1}]}]}, [{"a": -1.0}]), (None, []), ([], []),
        ({"content": [{"top_logprobs": None}]}, [{}]), ({"tokens": ["a"]}, []),
        ({"content": [{"top_logprobs": [{"token": "a", "logprob": None}]}]}, []),
    ],
)  # fmt: skip
def test_what_a_server_counts_in_another_form_costs_no_verdict(
    usage: Any, counted: tuple[int, int], logprobs: Any, likeliest: Any
) -> None:
    choice = {"message": {"content": "[[7]]"}, "logprobs": logprobs}
    spoken, *tokens = said(json.dumps({"choices": [choice], "usage": usage}).encode())
    assert (spoken.text, spoken.likeliest, tuple(tokens)) == ("[[7]]", likeliest, counted)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"{}", b"\xff", b"[" * 5000,
     b'{"choices": [{"text": "[[7]]"}]}', b'{"choices": [{"message": null}]}',
     b'{"choices": [{"message": {"content": ["[[7]]"]}}]}', b'{"choices": [{"message": {"content": NaN}}]}',
     b'{"choices": [{"message": {"content": null, "reasoning_content": "[[7]]"}}]}'],
)  # fmt: skip
def test_what_is_no_answer_is_one_line_and_no_verdict(body: bytes) -> None:
    with pytest.raises(RewardError) as caught:
        said(body)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def answered(**usage: int) -> ServerReply:
    body = json.dumps({"choices": [{"message": {"content": "[[7]]"}}], "usage": usage}).encode()
    return ServerReply(status=200, retry_after=None, body=body)


def test_what_is_tried_again_waits_for_its_turn_in_the_minute() -> None:
    begun: list[float] = []

    async def post(request: bytes) -> ServerReply:
        begun.append(asyncio.get_running_loop().time())
        return ServerReply(status=429, retry_after="0", body=b"") if len(begun) in (1, 2) else answered()

    async def ask() -> None:
        server = ChatServer(url="http://127.0.0.1:1/v1", model="m", retries=2, per_minute=2, timeout_s=1.0)
        chat = Chat(server, post, "judge", now=asyncio.get_running_loop().time)
        await asyncio.gather(*(chat([{"role": "user", "content": str(k)}]) for k in range(2)))

    run_virtual(ask())
    assert [after - before for before, after in pairwise(begun)] == [30.0] * 3


def test_nothing_is_asked_once_the_most_is_spent_or_cannot_be_known() -> None:
    priced = ChatServer(url="http://127.0.0.1:1/v1", model="m", price_read=2.0, price_written=10.0, most_cost=3.0)

    async def ask(usage: dict[str, int]) -> list[str]:
        async def post(request: bytes) -> ServerReply:
            return answered(**usage)

        chat = Chat(priced, post, "judge", now=lambda: 0.0)
        return [await chat([{"role": "user", "content": str(k)}]) for k in range(3)]

    with pytest.raises(LastingError, match=r"4 is spent, of most_cost=3: 1000000 tokens read and 200000 written"):
        asyncio.run(ask({"prompt_tokens": 500_000, "completion_tokens": 100_000}))  # 2 each: two are asked
    with pytest.raises(LastingError, match="does not say how many tokens it counts"):
        asyncio.run(ask({}))
    with pytest.raises(ConfigError, match="tokens have no price"):
        check_chat(ChatServer(url="http://127.0.0.1:1/v1", model="m", most_cost=1.0), "judge")
