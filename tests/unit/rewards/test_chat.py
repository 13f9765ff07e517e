"""A judge's answer counts for its text, in whatever form a server tells what else it knows."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from flowrl.errors import RewardError
from flowrl.rewards.chat import Chat, ChatServer, Spoken
from flowrl.rewards.http import ServerReply


def said(body: bytes) -> tuple[Spoken, int, int]:
    async def post(request: bytes) -> ServerReply:
        return ServerReply(status=200, retry_after=None, body=body)

    async def ask() -> tuple[Spoken, int, int]:
        server = ChatServer(url="http://127.0.0.1:1/v1", model="m", retries=0)
        chat = Chat(server, post, "judge", now=lambda: 0.0)
        return await chat.say([{"role": "user", "content": "?"}]), chat.prompt_tokens, chat.completion_tokens

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
