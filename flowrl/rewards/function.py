"""Reward functions by import path, with TRL's signature.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

Every argument is a list with one entry for each sample: `prompts` as they stood in the data, `completions` as strings
(as one assistant message each where the prompt is a conversation), `completion_ids` as lists of token ids, and every
column of the data. A function takes those it names, or all with **kwargs; it may be `async`. None in the result means
"does not apply" and counts as 0, because a group's rewards are the sum of all named scores.

Invariant: a call returns one finite number for each sample or raises RewardError; it never invents one. Called by the
reward and evaluator stages.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import inspect
import math
import threading
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import load_object
from flowrl.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flowrl.messages import Rollouts


class RewardFunction:
    """A reward function, loaded and checked; safe to call for several groups at a time if the function is."""

    def __init__(self, path: str, where: str, *, timeout_s: float = 60.0) -> None:
        """Import `path` ("module:function").

        Raises:
            ConfigError: it does not import or is not a function.
        """
        found = load_object(path, where)
        if isinstance(found, type) or not callable(found):
            raise ConfigError(where, f"{path} is a {type(found).__name__}, not a function", "name a function")
        self.path = path
        self._where = where
        self._timeout_s = timeout_s
        self._function = cast("Callable[..., Any]", found)
        call = found if inspect.isroutine(found) else found.__call__
        self._is_async = inspect.iscoroutinefunction(call)
        parameters = inspect.signature(found).parameters.values()
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
        arguments = self._arguments(group)
        where = f"{self._where} ({self.path}), group {group.group_id}"
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                if self._is_async:
                    result = await self._function(**arguments)
                else:
                    result = await _in_thread(self._function, arguments)
        except Exception as error:
            if deadline.expired():
                remedy = "make it faster or raise timeout_s"
                raise RewardError(where, f"no result after {self._timeout_s:g} s", remedy) from error
            raise RewardError(where, f"raised {type(error).__name__}: {error}", "mend the reward function") from error
        return _checked(result, len(group.samples), where)

    def _arguments(self, group: Rollouts) -> dict[str, Any]:
        prompt = group.columns.get("prompt", "")
        texts = [sample.text for sample in group.samples]
        is_conversation = isinstance(prompt, list)
        num_samples = len(texts)
        known: dict[str, Any] = {
            name: [value] * num_samples for name, value in group.columns.items() if name != "prompt"
        }
        known["prompts"] = [prompt] * num_samples
        known["completions"] = [[{"role": "assistant", "content": t}] for t in texts] if is_conversation else texts
        known["completion_ids"] = [sample.token_ids.tolist() for sample in group.samples]
        for name in self._required:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the data has {', '.join(sorted(known))}"
                raise RewardError(f"{self._where} ({self.path})", f"needs a column {name!r} that the data lacks", hint)
        return known if self._takes_all else {name: value for name, value in known.items() if name in self._names}


def quarantine(directory: Path, group: Rollouts, error: Exception) -> Path:
    """Write a group and the error that it met as JSON, named by group id, and return the file."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "group_id": group.group_id,
        "error": str(error),
        "generator": group.generator,
        "columns": group.columns,
        "prompt_token_ids": group.token_ids.tolist(),
        "samples": [
            {"text": s.text, "finish": s.finish, "versions": s.versions, "token_ids": s.token_ids.tolist()}
            for s in group.samples
        ],
    }
    path = directory / f"group-{group.group_id}.json"
    aside = path.with_suffix(".json.part")  # renamed when whole: a reader never meets half a record
    aside.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    aside.replace(path)
    return path


async def _in_thread(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
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
            result = function(**arguments)
        except (StopIteration, SystemExit) as error:  # a future refuses the one, the other would end the loop
            failure = RuntimeError(repr(error))
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for the result
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=body, name="reward", daemon=True).start()
    return await done


def _checked(result: Any, num_samples: int, where: str) -> list[float]:
    """Return the scores as floats, None as 0, or refuse them."""
    remedy = f"return a list of {num_samples} numbers, one per completion"
    try:
        values = list(result)
    except TypeError as error:
        raise RewardError(where, f"returned a {type(result).__name__}", remedy) from error
    if len(values) != num_samples:
        raise RewardError(where, f"returned {len(values)} scores for {num_samples} completions", remedy)
    scores: list[float] = []
    for place, value in enumerate(values):
        try:
            score = 0.0 if value is None else float(value)
        except (TypeError, ValueError) as error:
            found = f"score {place} of {num_samples} is {value!r}, a {type(value).__name__}"
            raise RewardError(where, found, remedy) from error
        if not math.isfinite(score):
            raise RewardError(
                where, f"score {place} of {num_samples} is {score}", "return None where it does not apply"
            )
        scores.append(score)
    return scores
