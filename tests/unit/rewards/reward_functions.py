"""Reward functions that the tests name by import path."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

release = threading.Event()  # ends `hangs`


def length(completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


def everything(**arguments: Any) -> list[float]:
    seen.append(arguments)
    return [0.0] * len(arguments["completions"])


seen: list[dict[str, Any]] = []


def with_default(completions: list[str], answer: list[str], missing: str = "default") -> list[float]:
    return [float(missing == "default" and text == right) for text, right in zip(completions, answer, strict=True)]


async def slowly(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [2.0] * len(completions)


async def never(completions: list[str]) -> list[float]:
    await asyncio.Event().wait()
    return []


def hangs(completions: list[str]) -> list[float]:
    release.wait(10)
    return []


def partly(completions: list[str]) -> list[float | None]:
    return [None, 1.5]


def raises(completions: list[str]) -> list[float]:
    raise KeyError("gone")


def stops(completions: list[str]) -> list[float]:
    raise StopIteration


def exits(completions: list[str]) -> list[float]:
    raise SystemExit(3)


def times_out(completions: list[str]) -> list[float]:
    raise TimeoutError("its own")


def needs_column(completions: list[str], anser: list[str]) -> list[float]:
    return []


def not_a_number(completions: list[str]) -> list[float]:
    return [1.0, float("nan")]


def too_many(completions: list[str]) -> list[float]:
    return [1.0, 2.0, 3.0]


def words(completions: list[str]) -> list[Any]:
    return [1.0, "good"]


def digits(completions: list[str]) -> list[Any]:
    return ["1", "2"]


def mapping(completions: list[str]) -> Any:
    return {0: 1.0, 1: 2.0}


def huge(completions: list[str]) -> list[int]:
    return [1, 10**400]


def long_winded(completions: list[str]) -> list[float]:
    raise ValueError("x" * 100_000)


def single(completions: list[str]) -> Any:
    return 3.0


class Scorer:
    """Called like a function, as an instance."""

    async def __call__(self, completions: list[str]) -> list[float]:
        return [4.0] * len(completions)


scorer = Scorer()
constant = 3
