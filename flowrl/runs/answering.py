"""Whoever answers a benchmark: a run (its newest checkpoint) or a model on flowrl's own vLLM, or a server by its URL.

Invariant: what a model's answers depend on (its files, the engine's settings, the seed) is in one digest. So answers
that are kept are known again and never taken for another model's.

Called by runs/evaluation.py (lm-eval), mt_bench.py and alpaca_eval.py.

Tests: tests/contracts/test_evaluation.py
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from flowrl.config import resolve, widen
from flowrl.data.formats import NormalRow
from flowrl.data.models import inspect_model, prepare_model
from flowrl.data.prompts import load_tokenizer
from flowrl.data.rendering import Renderer
from flowrl.engines.base import GenerationConfig, Serving
from flowrl.errors import ConfigError, DataError
from flowrl.rewards.chat import ChatServer, chatting
from flowrl.rewards.http import check_server, unreachable
from flowrl.runtime.devices import num_cores

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from flowrl.engines.vllm_answers import AnsweringVllm
    from flowrl.rewards.judging import Messages

T = TypeVar("T")
Say = Callable[[str], None]
Answer = Callable[..., Awaitable[str]]  # (messages, temperature=, max_tokens=, seed=)

MOST_CONTEXT = 4096  # tokens, where nothing else is set
SAY_EVERY_S = 10.0


class EvalRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for."""

    target: str  # a run, a model or a URL; of a judged benchmark also a file of answers
    tasks: list[str] = []
    mt_bench: Path | None = None  # a directory as FastChat's data/mt_bench
    alpaca_eval: Path | None = None  # reference outputs
    against: str = ""  # another; "": no comparison
    out: Path | None = None  # directory; None: evaluations/NAME
    limit: int = 0  # items of each task; 0: all
    num_fewshot: int | None = None  # None: as the task says
    seed: int = 0
    chat: bool = False  # questions go through the chat template, or a server's chat completions
    model: str = ""  # as the server names it
    tokenizer: str = ""  # of a server's model: a directory or a Hugging Face id
    unsafe_code: bool = False  # run tasks that execute what a model wrote
    overrides: Sequence[str] = ()  # of the engine, and of who judges

    @property
    def directory(self) -> Path:
        """Return where results are written."""
        return self.out or Path("evaluations") / short_name(self.target)


class Prepared(msgspec.Struct, frozen=True):
    """A model that can be asked."""

    name: str
    digest: str  # of all that its answers depend on
    directory: Path | None  # None: a server
    settings: Serving | None = None


def prepare(target: str, request: EvalRequest, say: Say, *, overrides: Sequence[str]) -> Prepared:
    """Return a target that can be asked; a server has answered a connection.

    Raises:
        ConfigError: the server is away or badly named, or a setting is wrong.
        ModelError: there is no such model.
    """
    if is_url(target):
        check_server(ChatServer(url=target), "flowrl eval")
        if not request.model:
            raise ConfigError("--model", f"is not given for {target}", "name the model as the server does")
        check_reachable(target)
        return Prepared(target, digest_of([target, request.model, request.chat, request.seed]), None)
    directory = prepare_model(target, say=say)
    card = inspect_model(directory)
    implied: dict[str, Any] = {"max_model_len": min(card.max_context or MOST_CONTEXT, MOST_CONTEXT)}
    implied["threads"] = min(8, num_cores())
    import torch

    if torch.cuda.is_available():
        implied |= {"layout": "processes", "kv_cache_bytes": 0, "max_running": 256}
    settings = resolve(Serving, overrides=overrides, implied=implied)
    if card.max_context and settings.max_model_len > card.max_context:
        what = f"{settings.max_model_len} tokens, but {target} has a context of {card.max_context}"
        raise ConfigError("max_model_len", what, f"lower it to {card.max_context} or less")
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(directory.iterdir())]
    parts = [str(directory), files, settings, request.chat, request.seed]  # a file that is written anew is another
    return Prepared(target, digest_of(parts), directory, settings)


def check_reachable(url: str) -> None:
    """See that something listens there.

    Raises:
        ConfigError: nothing does.
    """
    if why := unreachable(url):
        raise ConfigError(url, f"does not answer ({why})", "start the server, or mend the address")


@asynccontextmanager
async def engine_of(prepared: Prepared, say: Say) -> AsyncIterator[AnsweringVllm]:
    """Yield a model that is served as it is."""
    from flowrl.engines.vllm_answers import AnsweringVllm

    assert prepared.settings is not None
    config = widen(GenerationConfig, prepared.settings, model=str(prepared.directory))
    engine = AnsweringVllm(config, where="flowrl eval", **prepared.settings.engine_options)
    say(f"{prepared.name}: loading {prepared.directory}")
    await engine.open()
    try:
        await engine.serve_loaded()
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def answering(prepared: Prepared, server: ChatServer, say: Say) -> AsyncIterator[Answer]:
    """Yield what continues conversations; `server` says how a URL is asked."""
    if prepared.directory is None:
        async with chatting(server, "flowrl eval", now=time.monotonic) as chat:

            async def ask(messages: Messages, **asked: Any) -> str:
                return (await chat.say(messages, **asked)).text

            yield ask
        return
    async with engine_of(prepared, say) as engine:
        assert prepared.directory is not None
        tokenizer = load_tokenizer(prepared.directory)
        renderer = Renderer(tokenizer)

        async def write(messages: Messages, *, temperature: float, max_tokens: int, seed: int) -> str:
            text = renderer.prompt_text(NormalRow(place="flowrl eval", prompt=[*messages]))
            prompt_ids = renderer.prompt_ids(text, is_rendered=True)
            room = engine.config.max_model_len - max_tokens
            if len(prompt_ids) > room:
                what = f"a question of {len(prompt_ids)} tokens, but {max_tokens} for the answer leave room for {room}"
                raise DataError("flowrl eval", what, "raise max_model_len, or lower answer_tokens")
            ids = await engine.complete(prompt_ids, until=[], max_tokens=max_tokens, temperature=temperature, seed=seed)
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        yield write


async def for_each(items: Iterable[T], do: Callable[[T], Awaitable[None]], *, at_once: int) -> None:
    """Do it for every item, so many at a time; the first error ends it.

    Raises:
        Exception: the first that was raised.
    """
    waiting = iter(items)

    async def lane() -> None:
        for item in waiting:
            await do(item)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(lane())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


class Progress:
    """Says from time to time how many of a kind are done and how long the others will take."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say_line = what, total, say
        self._done = 0
        self._start_s = self._said_s = time.monotonic()

    def step(self) -> None:
        """Count one."""
        self._done += 1
        now_s = time.monotonic()
        if now_s - self._said_s < SAY_EVERY_S:
            return
        self._said_s = now_s
        left_s = (now_s - self._start_s) / self._done * (self._total - self._done)
        self._say_line(f"{self._done} of {self._total} {self._what}, about {left_s:,.0f} s left")


def digest_of(parts: list[Any]) -> str:
    """Return a short digest of what can be written as JSON."""
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def is_url(target: str) -> bool:
    """Return whether a target is a server's address."""
    return target.startswith(("http://", "https://"))


def short_name(target: str) -> str:
    """Return what a target's files are named by."""
    if is_url(target):
        return urlsplit(target).netloc.replace(":", "-")
    return Path(target).resolve().name
