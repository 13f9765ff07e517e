"""Environments for tests: by import path, also in worker processes."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

calls: list[tuple[Any, ...]] = []  # of the environments that run in the tests' own process


class Echo:
    """Says what it heard; over after `turns`."""

    def __init__(self, turns: int = 2, reward: float = 0.5) -> None:
        self._left = turns
        self._reward = reward

    def reset(self, task: dict[str, Any], seed: int) -> str:
        calls.append(("reset", seed))
        return f"play {task.get('position', task.get('prompt'))}"

    def step(self, action: str) -> tuple[str, float, bool]:
        calls.append(("step", action))
        self._left -= 1
        return f"you said {action}", self._reward, self._left == 0

    def close(self) -> None:
        calls.append(("close",))


class AsyncEcho(Echo):
    """The same, on the event loop; takes `delay_s` for a step, `slow_s` where the task's position is 0."""

    def __init__(self, delay_s: float = 0.0, slow_s: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self._delay_s = delay_s
        self._slow_s = slow_s
        self._task: dict[str, Any] = {}

    async def reset(self, task: dict[str, Any], seed: int) -> str:
        self._task = task
        return super().reset(task, seed)

    async def step(self, action: str) -> tuple[str, float, bool]:
        await asyncio.sleep(self._slow_s if self._task.get("position") == 0 and self._slow_s else self._delay_s)
        return super().step(action)

    async def close(self) -> None:
        super().close()


class Messages(Echo):
    """Begins with a conversation."""

    def reset(self, task: dict[str, Any], seed: int) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}]


class Returns(Echo):
    """Returns what it is told to."""

    def __init__(self, first: Any = "go", result: Any = ("", 0.0, False)) -> None:
        self._first = first
        self._result = tuple(result) if isinstance(result, list) else result

    def reset(self, task: dict[str, Any], seed: int) -> Any:
        return self._first

    def step(self, action: str) -> Any:
        return self._result


class Moody(AsyncEcho):
    """Begins differently each time."""

    count = 0

    async def reset(self, task: dict[str, Any], seed: int) -> str:
        Moody.count += 1
        return f"round {Moody.count}"

    async def step(self, action: str) -> tuple[str, float, bool]:
        return "", 0.0, True


class Fails(AsyncEcho):
    """Raises at the first `times` steps of tasks whose position is in `positions`."""

    failures = 0

    def __init__(self, positions: list[int] | None = None, times: int = 1_000_000, **options: Any) -> None:
        super().__init__(**options)
        self._positions = positions or []
        self._times = times

    async def step(self, action: str) -> tuple[str, float, bool]:
        if self._task["position"] in self._positions and Fails.failures < self._times:
            Fails.failures += 1
            raise OSError("the board fell off the table")
        return await super().step(action)


class Trouble(Echo):
    """Does to its process what it is told to; says its process's id."""

    def step(self, action: str) -> tuple[str, float, bool]:
        match action:
            case "die":
                os._exit(7)
            case "hang":
                while True:
                    time.monotonic()
            case "raise":
                raise KeyError("gone")
            case "leave":
                raise SystemExit(3)
        return str(os.getpid()), 1.0, False


class NoStep:
    """Cannot be played."""

    def reset(self, task: dict[str, Any], seed: int) -> str:
        return ""
