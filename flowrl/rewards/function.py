"""Reward functions by import path, with TRL's signature.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

Every argument is a list with one entry for each sample: `prompts` as they stood in the data, `completions` as strings
(as one assistant message each where the prompt is a conversation), `completion_ids` as lists of token ids, and every
column of the data. A function takes those it names, or all with **kwargs; it may be `async`. None in the result means
"does not apply" and counts as 0, because a group's rewards are the sum of all named scores. Functions written for
OpenRLHF or verifiers are called through flowrl.rewards.adapters.

Invariant: a call returns one finite number for each sample or raises RewardError; it never invents one. Called by the
reward worker process, and in the stage's own process where `isolation` is "thread".
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import inspect
import math
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from flowrl.config import load_object
from flowrl.errors import RewardError
from flowrl.rewards.adapters import Adapter, adapted

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.messages import Rollouts

SHOWN_CHARS = 500  # of what user code says or returns: an error is one line
MEND = "mend the reward function"


class RewardFunction:
    """A reward function, loaded and checked; safe to call for several groups at a time if the function is."""

    def __init__(
        self,
        path: str,
        where: str,
        *,
        adapter: Adapter = "trl",
        label_column: str = "answer",
        timeout_s: float = 60.0,
    ) -> None:
        """Import `path` ("module:name").

        Raises:
            ConfigError: it does not import or is not what the adapter takes.
        """
        self.path = path
        self._where = where
        self._timeout_s = timeout_s
        found = load_object(path, where)
        self._function = adapted(found, adapter, label_column=label_column, path=path, where=where)
        is_plain = inspect.isroutine(self._function)
        self._is_async = inspect.iscoroutinefunction(self._function if is_plain else self._function.__call__)
        parameters = inspect.signature(self._function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._names = {p.name for p in named}
        self._required = [p.name for p in named if p.default is p.empty]

    async def __call__(self, group: Rollouts) -> list[float]:
        """Score every sample of the group, in order; waits for the function, at most `timeout_s`.

        A plain function runs in a thread of its own, which goes on after a timeout (Python cannot end it) but holds
        up neither the loop nor the end of the process.

        Raises:
            RewardError: the function raised, took too long, or returned something else than one number per sample.
        """
        arguments, where = self._arguments(group), self._place(group)
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                if self._is_async:
                    result = await self._function(**arguments)
                else:
                    result = await in_thread(partial(self._function, **arguments))
        except RewardError:
            raise
        except Exception as error:
            if deadline.expired():
                raise overdue(where, self._timeout_s) from error
            raise raised(where, error, MEND) from error
        return checked(result, len(group.samples), where)

    def call_here(self, group: Rollouts, runner: asyncio.Runner) -> list[float]:
        """Score every sample of the group in this thread, an async function on `runner`; has no time limit.

        Raises:
            RewardError: the function raised, or returned something else than one number per sample.
        """
        arguments, where = self._arguments(group), self._place(group)
        try:
            result = self._function(**arguments)
            if self._is_async:
                result = runner.run(result)
            return checked(result, len(group.samples), where)
        except RewardError:
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise raised(where, error, MEND) from error

    def _place(self, group: Rollouts) -> str:
        return f"{self._where} ({self.path}), group {group.group_id}"

    def _arguments(self, group: Rollouts) -> dict[str, Any]:
        known = text_columns(group)
        if self._takes_all or "completion_ids" in self._names:
            known["completion_ids"] = [sample.token_ids.tolist() for sample in group.samples]
        for name in self._required:
            if name not in known:
                raise missing_column(name, known, f"{self._where} ({self.path})")
        return known if self._takes_all else {name: value for name, value in known.items() if name in self._names}


def text_columns(group: Rollouts) -> dict[str, list[Any]]:
    """Return prompts, completions and the data's columns, each a list with one entry for each sample."""
    prompt = group.columns.get("prompt", "")
    texts: list[Any] = [sample.text for sample in group.samples]
    known = {name: [value] * len(texts) for name, value in group.columns.items() if name != "prompt"}
    known["prompts"] = [prompt] * len(texts)
    is_conversation = isinstance(prompt, list)
    known["completions"] = [[{"role": "assistant", "content": t}] for t in texts] if is_conversation else texts
    return known


def missing_column(name: str, known: dict[str, list[Any]], where: str) -> RewardError:
    """Return the error for a column that is asked for and that the data lacks."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the data has {', '.join(sorted(known))}"
    return RewardError(where, f"needs a column {name!r} that the data lacks", hint)


def overdue(where: str, timeout_s: float) -> RewardError:
    """Return the error for a function that took too long."""
    return RewardError(where, f"no result after {timeout_s:g} s", "make it faster or raise timeout_s")


def raised(where: str, error: BaseException, remedy: str) -> RewardError:
    """Return the error for user code that raised, of a group of exceptions the first; a RewardError is kept."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, RewardError):
        return error
    said = f"raised {type(error).__name__}: {str(error)[:SHOWN_CHARS]}"
    return RewardError(where, said, remedy)


def checked(result: Any, num_samples: int, where: str) -> list[float]:
    """Return the scores as floats, None as 0, or refuse them."""
    remedy = f"return a list of {num_samples} numbers, one per completion"
    if isinstance(result, str | bytes | dict | set | frozenset):  # iterable, and none of them a list of scores
        raise RewardError(where, f"returned a {type(result).__name__}", remedy)
    try:
        values = list(result)
    except TypeError as error:
        raise RewardError(where, f"returned a {type(result).__name__}", remedy) from error
    if len(values) != num_samples:
        raise RewardError(where, f"returned {len(values)} scores for {num_samples} completions", remedy)
    return [finite(value, f"score {place} of {num_samples}", where, remedy) for place, value in enumerate(values)]


def finite(value: Any, place: str, where: str, remedy: str) -> float:
    """Return a number as user code gives it as a float, None as 0, or refuse it."""
    if value is None:
        return 0.0
    try:
        if isinstance(value, str | bytes):
            raise TypeError("a text is no number")
        score = float(value)  # numpy's and torch's scalars too
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        found = f"{place} is {_shown(value)}, a {type(value).__name__}"
        raise RewardError(where, found, remedy) from error
    if not math.isfinite(score):
        raise RewardError(where, f"{place} is {score}", "return None where it does not apply")
    return score


def _shown(value: Any) -> str:
    try:
        return repr(value)[:SHOWN_CHARS]
    except Exception as error:  # its own __repr__, or an integer of too many digits
        return f"what cannot be shown ({type(error).__name__})"


async def in_thread(function: Callable[[], Any]) -> Any:
    """Run a blocking function in a daemon thread: one that hangs must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():  # timed out or cancelled meanwhile
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def body() -> None:
        result, failure = None, None
        try:
            result = function()
        except (StopIteration, SystemExit) as error:  # a future refuses the one, the other would end the loop
            failure = RuntimeError(repr(error))
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for the result
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=body, name="reward", daemon=True).start()
    return await done
