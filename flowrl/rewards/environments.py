"""Environments: what a policy plays with over several turns, a Python class by import path.

    class Environment:
        def __init__(self, **options): ...                       # may be left out; the node's `environment_options`
        def reset(self, task, seed): return observation          # begin an episode
        def step(self, action): return observation, reward, done
        def close(self): ...                                     # may be left out; the episode is over

Any of the three may be `async`. `task` is a row of the data (its columns as a dict), `seed` the group's. An environment
that draws anything draws it from there, so that all samples of a group begin alike. An observation is a text; that of
`reset` may also be a list of messages. `action` is the text of the policy's turn. A reward is a finite number, None for
none.

Invariants:
- each episode has an instance of its own, which sees one call at a time;
- what a call returns is checked, and a call that raises ends the episode.

Called by the worker process (flowrl.rewards.worker) and, where the isolation is "thread", in the stage's own;
flowrl.rewards.sessions is the other side.

Tests: tests/unit/rewards/test_environments.py
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import load_class
from flowrl.errors import ConfigError, RewardError
from flowrl.rewards.function import finite, raised

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Run = Callable[[Callable[[], Any]], Awaitable[Any]]

MEND = "mend the environment"
TRIPLE = "return (observation, reward, done)"


class Reset(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Begin an episode."""

    episode: int  # one number for each episode of a stage's replica
    name: str  # named in errors
    task: dict[str, Any]
    seed: int


class StepRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Act in an episode."""

    episode: int
    action: str


class Close(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End an episode before the environment does."""

    episode: int


Request = Reset | StepRequest | Close


class Observed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What came of a call; a reset's reward is 0."""

    observation: str = ""
    messages: list[dict[str, Any]] = []  # of a reset that returned them instead of a text
    reward: float = 0.0
    done: bool = False


class Environments:
    """The instances of one environment class in this process, one for each episode under way."""

    def __init__(self, path: str, where: str, *, options: dict[str, Any], run: Run) -> None:
        """Import the class; `run` calls what is not async.

        Raises:
            ConfigError: it does not import, lacks a method, or does not take the options.
        """
        self._kind = load_class(path, where)
        self._where = f"{where} ({path})"
        self._options = options
        self._run = run
        self._playing: dict[int, tuple[Any, str]] = {}
        for name in ("reset", "step"):
            if not callable(getattr(self._kind, name, None)):
                raise ConfigError(where, f"{path} has no method {name!r}", "see flowrl.rewards.environments")
        try:
            inspect.signature(self._kind).bind(**options)
        except TypeError as error:
            what = f"{path} does not take the options {options} ({error})"
            raise ConfigError(where, what, "mend environment_options") from error

    async def answer(self, request: Request) -> Observed:
        """Carry out a request; returns what the environment says.

        Raises:
            RewardError: it raised, or returned something else than it should; the episode is over.
        """
        name = request.name if isinstance(request, Reset) else self._playing[request.episode][1]
        where = f"{self._where}, {name}"
        is_over = True
        try:
            observed = await self._carry_out(request, where)
            is_over = observed.done or isinstance(request, Close)
        except (Exception, SystemExit) as error:
            raise raised(where, error, MEND) from error
        finally:
            if is_over:
                self._playing.pop(request.episode, None)
        return observed

    async def _carry_out(self, request: Request, where: str) -> Observed:
        if isinstance(request, Reset):
            environment = self._kind(**self._options)
            self._playing[request.episode] = environment, request.name
            first = await self._call(environment.reset, request.task, request.seed)
            return _first(first, where)
        environment, _ = self._playing[request.episode]
        if isinstance(request, StepRequest):
            observed = _checked(await self._call(environment.step, request.action), where)
            if not observed.done:
                return observed
        else:
            observed = Observed()
        if hasattr(environment, "close"):
            await self._call(environment.close)
        return observed

    async def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if inspect.iscoroutinefunction(method):
            return await method(*arguments)
        return await self._run(partial(method, *arguments))


async def run_here(function: Callable[[], Any]) -> Any:
    """Call a function in this thread: a worker process has nothing else to do."""
    return function()


def _first(observation: Any, where: str) -> Observed:
    """Return a first observation, or refuse it."""
    if isinstance(observation, str):
        return Observed(observation=observation)
    messages = cast("list[Any]", observation) if isinstance(observation, list) else []
    if messages and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in messages):
        return Observed(messages=cast("list[dict[str, Any]]", messages))
    what = f"reset returned {_named(observation)}"
    raise RewardError(where, what, "return a text, or a list of messages with role and content")


def _checked(result: Any, where: str) -> Observed:
    """Return what a step gave, or refuse it."""
    if not isinstance(result, tuple) or len(cast("tuple[Any, ...]", result)) != 3:
        raise RewardError(where, f"step returned {_named(result)}", TRIPLE)
    observation, reward, done = cast("tuple[Any, Any, Any]", result)
    if not isinstance(observation, str):
        raise RewardError(where, f"step returned {_named(observation)} as the observation", f"{TRIPLE}, the first text")
    if isinstance(done, str):
        raise RewardError(where, f"step returned {done!r} for done", f"{TRIPLE}, the last True or False")
    return Observed(observation=observation, reward=finite(reward, "the reward", where, TRIPLE), done=bool(done))


def _named(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
