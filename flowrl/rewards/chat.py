"""A judge behind an OpenAI-compatible server: one POST to URL/chat/completions for each question.

    {"model": ..., "messages": [...], "max_tokens": ..., "temperature": ..., "seed": ...}
    -> {"choices": [{"message": {"content": "..."}}], "usage": {"prompt_tokens": ..., "completion_tokens": ...}}

Whatever speaks it can judge: vLLM, SGLang, llama.cpp, and the services that sell it. What is tried again, and after
which wait, is as in flowrl.rewards.http.

Invariants: at most `concurrency` requests are under way and at most `per_minute` begin in a minute; tokens are counted
as the server counts them; an answer without text is an error. Called by the Judge stage and `flowrl judge`.

Tests: tests/contracts/test_judges.py
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from flowrl.config import Meta
from flowrl.errors import ConfigError, RewardError
from flowrl.rewards.function import SHOWN_CHARS
from flowrl.rewards.http import Asker, Server, check_server, connected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from flowrl.rewards.http import Post
    from flowrl.rewards.judging import Messages

PATH = "/chat/completions"
MINUTE_S = 60.0


class ChatServer(Server):
    """A server that continues conversations."""

    url: str = ""  # https://host/v1; http:// only on this machine, or with allow_plain_http
    model: str = ""  # as the server names it
    max_tokens: Annotated[int, Meta(ge=1)] = 512  # of one answer
    temperature: Annotated[float, Meta(ge=0)] = 0.0  # 0: the likeliest answer
    concurrency: Annotated[int, Meta(ge=1)] = 16  # requests under way
    per_minute: Annotated[int, Meta(ge=0)] = 0  # requests begun in a minute at most; 0: no limit


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], Meta(min_length=1)]
    usage: _Usage | None = None


class Chat:
    """Continues conversations by asking a server; safe to call for several at a time."""

    def __init__(self, server: ChatServer, post: Post, where: str, *, now: Callable[[], float], seed: int = 0) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._server = server
        self._seed = seed
        self._ask = Asker(server, post, where, seed=seed)
        self._room = asyncio.Semaphore(server.concurrency)
        self._now = now
        self._next_s = 0.0  # when the next request may begin

    async def __call__(self, messages: Messages) -> str:
        """Return what comes next; waits for room, and for its turn in the minute.

        Raises:
            Unreachable: no attempt was answered.
            RewardError: the server refused the request, or answered no text.
        """
        server = self._server
        request: dict[str, Any] = {"model": server.model, "messages": messages, "max_tokens": server.max_tokens,
                                   "temperature": server.temperature, "seed": self._seed}  # fmt: skip
        async with self._room:
            await self._turn()
            body = await self._ask(msgspec.json.encode(request))
        try:
            completion = msgspec.json.decode(body, type=_Completion)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            shown = body[:SHOWN_CHARS].decode(errors="replace")
            what = f"answered {shown!r}, which is no chat completion ({error})"
            raise RewardError(self._ask.where, what, f"give the url that {PATH} follows") from error
        if completion.usage is not None:
            self.prompt_tokens += completion.usage.prompt_tokens
            self.completion_tokens += completion.usage.completion_tokens
        message = completion.choices[0].message
        text = message.content or message.refusal
        if not text:
            raise RewardError(self._ask.where, "answered no text", "see the server's log, or raise max_tokens")
        return text

    async def _turn(self) -> None:
        if not self._server.per_minute:
            return
        now_s = self._now()
        begins_s = max(now_s, self._next_s)
        self._next_s = begins_s + MINUTE_S / self._server.per_minute
        if begins_s > now_s:
            await asyncio.sleep(begins_s - now_s)


def check_chat(server: ChatServer, where: str) -> None:
    """Check the settings, without a connection.

    Raises:
        ConfigError: as `check_server`, or no model is named.
    """
    check_server(server, where)
    if not server.model:
        raise ConfigError(f"{where}.model", "is empty", "name the model as the server does")


@asynccontextmanager
async def chatting(server: ChatServer, where: str, *, now: Callable[[], float], seed: int = 0) -> AsyncIterator[Chat]:
    """Yield a voice over kept connections; they are closed with the block.

    Raises:
        ConfigError: as `check_chat`.
    """
    check_chat(server, where)
    url = server.url.rstrip("/")
    endpoint = msgspec.structs.replace(server, url=url if url.endswith(PATH) else url + PATH)
    async with connected(endpoint, where, num_connections=server.concurrency) as post:
        yield Chat(endpoint, post, where, now=now, seed=seed)
