"""Rewards that check an answer by rule: 1.0 for right, 0.0 for wrong, nothing between.

The final answer of a completion is what stands in its last \\boxed{...}, else in its last <answer>...</answer>, else
after its last "####", else the whole text; so a completion that was asked for only the answer and says more is wrong,
which is what keeps answers short. Partial credit is deliberately not given: it would reward long or hedging answers.
Called by `RewardFunction` under their import paths.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Completion = str | list[dict[str, Any]]  # a message list where the prompt is a conversation

_MARKED = (
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
    re.compile(r"####(.*)"),
)
_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(\.\d+)?")


def exact_answer(completions: Sequence[Completion], answer: Sequence[object], **_: object) -> list[float]:
    """Score 1.0 where the final answer equals the column `answer`; letter case and a number's commas do not count."""
    return [
        float(_plain(final_answer(c)) == _plain(final_answer(str(a)))) for c, a in zip(completions, answer, strict=True)
    ]


def reasoning_gym_score(
    completions: Sequence[Completion], task: Sequence[str], entry: Sequence[dict[str, Any]], **_: object
) -> list[float]:
    """Score 1.0 where reasoning-gym's own verifier of `task` gives the final answer full marks."""
    return [float(_scorer(t)(final_answer(c), e) >= 1.0) for c, t, e in zip(completions, task, entry, strict=True)]


def final_answer(completion: Completion) -> str:
    """Return the final answer; "The sum is \\\\boxed{12}." gives "12", " 12.\\n" gives "12"."""
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    for pattern in _MARKED:
        found = pattern.findall(text)
        if found:
            return cast("str", found[-1]).strip()
    return text.strip().removesuffix(".").rstrip()


def _plain(answer: str) -> str:
    """Return an answer as it is compared: "$1,200" and "1200" are the same, "Paris" and "paris" too."""
    if _NUMBER.fullmatch(answer):
        answer = answer.replace(",", "").replace("$", "").removeprefix("+")
    return answer.casefold()


@functools.lru_cache(maxsize=64)
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    return cast("Callable[[str, dict[str, Any]], float]", get_score_answer_fn(task))
