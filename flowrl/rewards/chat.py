"""A judge behind an OpenAI-compatible server: one POST to URL/chat/completions for each question.

    {"model": ..., "messages": [...], "max_tokens": ..., "temperature": ..., "seed": ...}
    -> {"choices": [{"message": {"content": "..."}}], "usage": {"prompt_tokens": ..., "completion_tokens": ...}}

Whatever speaks it can judge: vLLM, SGLang, llama.cpp, and the services that sell it. What is tried again, and after
which wait, is as in flowrl.rewards.http.

Invariants:
- at most `concurrency` requests are under way and at most `per_minute` begin in a minute, those tried again included;
- tokens are counted as the server counts them, and when they have cost `most_cost` nothing more is asked;
- an answer without text is an error, and so is one of more than 2 MiB.

Called by the Judge stage, `flowrl judge` and `flowrl eval`.

Tests: tests/contracts/test_judges.py
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from flowrl.config import Meta
from flowrl.errors import ConfigError, LastingError, RewardError
from flowrl.rewards.function import SHOWN_CHARS
from flowrl.rewards.http import Asker, Server, check_server, connected
from flowrl.rewards.verdicts import Paid

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from flowrl.rewards.http import Post
    from flowrl.rewards.judging import Messages

PATH = "/chat/completions"
MINUTE_S = 60.0
MOST_BYTES = 2 << 20  # of one answer; what is longer is none


class ChatServer(Server):
    """A server that continues conversations."""

    url: str = ""  # https://host/v1; http:// only on this machine, or with allow_plain_http
    model: str = ""  # as the server names it
    max_tokens: Annotated[int, Meta(ge=1)] = 512  # of one answer
    temperature: Annotated[float, Meta(ge=0)] = 0.0  # 0: the likeliest answer
    concurrency: Annotated[int, Meta(ge=1)] = 16  # requests under way
    per_minute: Annotated[int, Meta(ge=0)] = 0  # requests begun in a minute at most; 0: no limit
    price_read: Annotated[float, Meta(ge=0)] = 0.0  # of a million tokens that the server reads
    price_written: Annotated[float, Meta(ge=0)] = 0.0  # and of a million that it writes
    most_cost: Annotated[float, Meta(ge=0)] = 0.0  # from which on a replica asks no more, resumed or not; 0: no limit


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Likely(msgspec.Struct):
    token: str
    logprob: float


class _Token(msgspec.Struct):
    top_logprobs: list[_Likely] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: Any = None  # of whatever form: an answer counts without them


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], Meta(min_length=1)]
    usage: Any = None


class Spoken(msgspec.Struct, frozen=True, kw_only=True):
    """What a server answered."""

    text: str
    is_refusal: bool = False  # it says that it does not answer
    likeliest: list[dict[str, float]] = []  # log-probs of the likeliest tokens at each place, where asked for


class Chat:
    """Continues conversations by asking a server; safe to call for several at a time."""

    def __init__(
        self, server: ChatServer, post: Post, where: str, *, now: Callable[[], float], seed: int = 0,
        paid: Paid | None = None,
    ) -> None:  # fmt: skip
        """Count on in what is `paid`."""
        self.paid = Paid() if paid is None else paid
        self._server = server
        self._seed = seed
        self._ask = Asker(server, post, where, turn=self._turn, seed=seed)
        self._room = asyncio.Semaphore(server.concurrency)
        self._now = now
        self._next_s = 0.0  # when the next request may begin

    @property
    def cost(self) -> float:
        """Return what was paid, in whichever money prices are in."""
        return (self.paid.read * self._server.price_read + self.paid.written * self._server.price_written) / 1e6

    def said(self) -> str:
        """Return what was read and written, and its price where one is set."""
        price = f" at a price of {self.cost:.4g}" if self.cost else ""
        return f"{self.paid.read} tokens read and {self.paid.written} written{price}"

    async def __call__(self, messages: Messages) -> str:
        """Return what comes next; for the rest see `say`."""
        return (await self.say(messages)).text

    async def say(self, messages: Messages, **asked: Any) -> Spoken:
        """Return what comes next; `asked` goes into the request; waits for room, and for its turn in the minute.

        Raises:
            Unreachable: no attempt was answered.
            RewardError: the server refused the request, or answered no text.
            LastingError: `most_cost` is spent, or the server does not say what it counts towards it.
        """
        server = self._server
        told = {"model": server.model, "max_tokens": server.max_tokens, "temperature": server.temperature}
        request: dict[str, Any] = {**told, "messages": messages, "seed": self._seed, **asked}
        async with self._room:
            if server.most_cost and self.cost >= server.most_cost:
                what = f"{self.cost:.4g} is spent, of most_cost={server.most_cost:g}: {self.said()}"
                raise LastingError(self._ask.where, what, "raise most_cost to go on")
            body = await self._ask(msgspec.json.encode(request))
        try:
            completion = msgspec.json.decode(body, type=_Completion)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            shown = body[:SHOWN_CHARS].decode(errors="replace")
            what = f"answered {shown!r}, not a chat completion ({error})"
            raise RewardError(self._ask.where, what, f"give the url that {PATH} follows") from error
        read, written = (_count(completion.usage, name) for name in ("prompt_tokens", "completion_tokens"))
        self.paid.read += read
        self.paid.written += written
        if server.most_cost and not read + written:
            what = "does not say how many tokens it counts, so that most_cost cannot be held"
            raise LastingError(self._ask.where, what, "set most_cost=0, or take a server that tells `usage`")
        choice = completion.choices[0]
        text = choice.message.content or choice.message.refusal
        if not text:
            raise RewardError(self._ask.where, "answered no text", "see the server's log, or raise max_tokens")
        is_refusal = not choice.message.content or choice.finish_reason == "content_filter"
        return Spoken(text=text, is_refusal=is_refusal, likeliest=_likeliest(choice.logprobs))

    async def _turn(self) -> None:
        if not self._server.per_minute:
            return
        now_s = self._now()
        begins_s = max(now_s, self._next_s)
        self._next_s = begins_s + MINUTE_S / self._server.per_minute
        if begins_s > now_s:
            await asyncio.sleep(begins_s - now_s)


def _count(usage: Any, name: str) -> int:
    """Return how many tokens a server says that it counted; 0 where it says it in another form."""
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if isinstance(found, int) and found > 0 else 0


def _likeliest(logprobs: Any) -> list[dict[str, float]]:
    """Return the log-probs of the likeliest tokens at each place; none where they have another form."""
    try:
        tokens = msgspec.convert(logprobs, _Logprobs | None)
    except msgspec.ValidationError:
        return []
    found = (tokens.content if tokens is not None else None) or []
    return [{each.token: each.logprob for each in token.top_logprobs or []} for token in found]


def check_chat(server: ChatServer, where: str, say: Callable[[str], None] | None = None) -> None:
    """Check the settings, as `check_server`.

    Raises:
        ConfigError: as `check_server`, or no model is named.
    """
    check_server(server, where, say)
    if not server.model:
        raise ConfigError(f"{where}.model", "is empty", "name the model as the server does")
    if server.most_cost and not server.price_read + server.price_written:
        what = f"is {server.most_cost:g}, but tokens have no price"
        raise ConfigError(f"{where}.most_cost", what, "set price_read and price_written, of a million tokens")


@asynccontextmanager
async def chatting(
    server: ChatServer, where: str, *, now: Callable[[], float], seed: int = 0, paid: Paid | None = None
) -> AsyncIterator[Chat]:
    """Yield a voice over kept connections, which are closed with the block; it counts on in what is `paid`.

    Raises:
        ConfigError: as `check_chat`.
    """
    check_chat(server, where)
    url = server.url.rstrip("/")
    endpoint = msgspec.structs.replace(server, url=url if url.endswith(PATH) else url + PATH)
    async with connected(endpoint, where, num_connections=server.concurrency, most_bytes=MOST_BYTES) as post:
        yield Chat(endpoint, post, where, now=now, seed=seed, paid=paid)
