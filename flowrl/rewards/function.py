"""Reward functions by import path, called as their parameters say (flowrl.rewards.signatures has the signatures).

A function takes the columns it names, or all with **kwargs; it may be `async`. None in the result means "does not
apply" and counts as 0, because a group's rewards are the sum of all named scores.

Invariants:
- a call returns one finite number for each sample or raises RewardError;
- it never invents one.

Called by the reward worker process, and in the stage's own process where `isolation` is "thread".

Tests: tests/unit/rewards/test_function.py
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import threading
from itertools import islice
from typing import TYPE_CHECKING, Any

from flowrl.config import load_object
from flowrl.errors import RewardError, one_line
from flowrl.messages import Buffer, Rollouts, Sample, VersionSpan
from flowrl.rewards.signatures import Adapter, columns_for, missing_column, rewards_of, rubric_reward, style_of

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST = 1e30  # float32, in which learning sums groups and steps, ends at 3.4e38
MOST_MORE = 1000  # scores beyond those asked for that are counted
SHOWN_CHARS = 500  # of what user code says or returns: an error is one line
MEND = "mend the reward function"
MADE = ("The answer is 42.", "42")  # completions to try a function on: two, so that one score for both shows


class RewardFunction:
    """A reward function, loaded and checked; safe to call for several groups at a time if the function is."""

    def __init__(
        self,
        path: str,
        where: str,
        *,
        adapter: Adapter = "auto",
        label_column: str = "answer",
        timeout_s: float = 60.0,
    ) -> None:
        """Import `path` ("module:name" or "file.py:name").

        Raises:
            ConfigError: it does not import, or cannot be called as the adapter says.
        """
        self.path = path
        self._where = where
        self._label_column = label_column
        self._timeout_s = timeout_s
        found = load_object(path, where)
        self._style = style_of(found, adapter, path=path, where=where)
        self._function: Any = found
        if self._style.adapter == "verifiers":
            self._function = rubric_reward(found, path=path, where=where)
        self._is_async = any(map(inspect.iscoroutinefunction, (self._function, self._function.__call__)))
        parameters = inspect.signature(self._function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._names = {p.name for p in named}
        self._required = [p.name for p in named if p.default is p.empty]

    @property
    def has_labels(self) -> bool:
        """Return whether `label_column` is looked for."""
        return self._style.adapter in ("openrlhf", "verl")

    async def __call__(self, group: Rollouts) -> list[float]:
        """Score every sample of the group, in order; waits for the function, at most `timeout_s`.

        A plain function runs in a thread of its own, which goes on after a timeout (Python cannot end it). It holds up
        neither the loop nor the end of the process.

        Raises:
            RewardError: the function raised, took too long, or returned something else than one number per sample.
        """
        calls, where = self._calls(group), self._place(group)
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                results = self._begin(calls) if self._is_async else await in_thread(lambda: self._begin(calls))
                results = await _settled(results)
            return self._checked(results, len(group.samples), where)
        except RewardError:
            raise
        except Exception as error:
            if deadline.expired():
                raise overdue(where, self._timeout_s) from error
            raise raised(where, error, MEND) from error

    def call_here(self, group: Rollouts, runner: asyncio.Runner) -> list[float]:
        """Score every sample of the group in this thread, what is async on `runner`; has no time limit.

        Raises:
            RewardError: the function raised, or returned something else than one number per sample.
        """
        calls, where = self._calls(group), self._place(group)
        try:
            results = self._begin(calls)
            if any(map(inspect.isawaitable, results)):
                results = runner.run(_settled(results))
            return self._checked(results, len(group.samples), where)
        except RewardError:
            raise
        except BaseException as error:  # an interrupt that user code raises is no more than its own error
            raise raised(where, error, MEND) from error

    def _begin(self, calls: list[dict[str, Any]]) -> list[Any]:
        return [self._function(**arguments) for arguments in calls]

    def _place(self, group: Rollouts) -> str:
        return f"{self._where} ({self.path}), group {group.group_id}"

    def _calls(self, group: Rollouts) -> list[dict[str, Any]]:
        """Return the arguments of each call: one for the group, or one for each sample."""
        texts = text_columns(group)
        if self._takes_all or "completion_ids" in self._names:
            texts["completion_ids"] = [sample.token_ids.tolist() for sample in group.samples]
        where = f"{self._where} ({self.path})"
        known, offered = columns_for(self._style, texts, label_column=self._label_column, where=where)
        for name in self._required:
            if name not in known:
                raise missing_column(name, known, where)
        wanted = self._names if offered is None else {*self._required, *offered} & self._names  # other defaults stay
        if self._takes_all:
            wanted = wanted | (known.keys() if offered is None else offered)
        given = {name: value for name, value in known.items() if name in wanted}
        if self._style.is_one_by_one:
            places = range(len(group.samples))
            return [{name: value[place] for name, value in given.items()} for place in places]
        return [given]

    def _checked(self, results: list[Any], num_samples: int, where: str) -> list[float]:
        if not self._style.is_one_by_one:
            return checked(rewards_of(results[0], self._style), num_samples, where)
        scores = [rewards_of(result, self._style) for result in results]
        return checked(scores, num_samples, where, "return one number for the completion")


async def _settled(results: list[Any]) -> list[Any]:
    """Wait for those of the results that are awaitable, together."""

    async def waited(result: Any) -> Any:
        return await result if inspect.isawaitable(result) else result

    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(waited(result)) for result in results]
    return [each.result() for each in waiting]


def text_columns(group: Rollouts) -> dict[str, list[Any]]:
    """Return prompts, completions and the data's columns, each a list with one entry for each sample."""
    prompt = group.columns.get("prompt", "")
    texts: list[Any] = [sample.text for sample in group.samples]
    known = {name: [value] * len(texts) for name, value in group.columns.items() if name != "prompt"}
    known["prompts"] = [prompt] * len(texts)
    if group.begun:
        known["answer_prefix"] = [group.begun] * len(texts)
    is_conversation = isinstance(prompt, list)
    known["completions"] = [[{"role": "assistant", "content": t}] for t in texts] if is_conversation else texts
    return known


def made_group(columns: dict[str, Any]) -> Rollouts:
    """Return a row of the data with completions made up, to try user code on before a run."""
    ids, logprobs, drawn = Buffer.ints([1]), Buffer.floats([0.0]), [VersionSpan(0, 0, 1)]
    samples = [Sample(token_ids=ids, logprobs=logprobs, versions=drawn, finish="stop", text=text) for text in MADE]
    return Rollouts(group_id=0, token_ids=Buffer.ints([1]), columns=columns, num_samples=len(MADE), seed=0,
                    samples=samples, generator="check")  # fmt: skip


def overdue(where: str, timeout_s: float) -> RewardError:
    """Return the error for a function that took too long."""
    return RewardError(where, f"no result after {timeout_s:g} s", "make it faster or raise timeout_s")


def raised(where: str, error: BaseException, remedy: str) -> RewardError:
    """Return the error for user code that raised, of a group of exceptions the first; a RewardError is kept."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, RewardError):
        return error
    return RewardError(where, saying(error), remedy)


def saying(error: BaseException) -> str:
    """Return what user code raised and what that says, where it can be asked."""
    return f"raised {type(error).__name__}: {_said(error)}"


def checked(result: Any, num_samples: int, where: str, remedy: str = "") -> list[float]:
    """Return the scores as floats, None as 0, or refuse them."""
    remedy = remedy or f"return a list of {num_samples} numbers, one per completion"
    if isinstance(result, str | bytes | dict | set | frozenset):  # iterable, and none of them a list of scores
        raise RewardError(where, f"returned a {type(result).__name__}", remedy)
    try:
        scores = iter(result)
    except TypeError as error:
        raise RewardError(where, f"returned a {type(result).__name__}", remedy) from error
    values = list(islice(scores, num_samples + MOST_MORE))  # it may never end
    if len(values) != num_samples:
        most = " or more" if len(values) == num_samples + MOST_MORE else ""
        raise RewardError(where, f"returned {len(values)}{most} scores for {num_samples} completions", remedy)
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
    if abs(score) > LARGEST:
        what = f"{place} is {score}, beyond what float32 can sum, and learning uses float32"
        raise RewardError(where, what, f"return numbers between -{LARGEST:g} and {LARGEST:g}")
    return score


def _said(error: BaseException) -> str:
    try:
        return one_line(str(error)[:SHOWN_CHARS])[:SHOWN_CHARS]
    except Exception as own:  # its own __str__
        return f"what it says cannot be shown ({type(own).__name__})"


def _shown(value: Any) -> str:
    try:
        return one_line(repr(value))[:SHOWN_CHARS]
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
        except BaseException as error:  # a future refuses StopIteration, and what is no Exception would end the loop
            is_usual = isinstance(error, Exception) and not isinstance(error, StopIteration)
            failure = error if is_usual else RuntimeError(repr(error))
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for the result
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=body, name="reward", daemon=True).start()
    return await done
