"""Mathematical answers checked for equality of meaning by the package math-verify: 1.0 for right, 0.0 for wrong.

    --set reward.function=flowrl.rewards.math:math_answer

"\\frac{1}{2}", "0.5" and "1/2" are the same answer. math-verify hands parts of the completion to sympy's evaluating
parser and ends what takes too long by a signal: both are reasons why this runs in a worker process and in its main
thread (`isolation=process`, the default). Invariant: an `answer` in the data that is no mathematical expression is an
error, never a wrong completion.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    Completion = str | list[dict[str, Any]]  # a message list where the prompt is a conversation

LIMIT_S = 3  # whole seconds for parsing an answer, and for comparing two; the package's alarm takes no fractions

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKED = re.compile(r"####(.*)")
_LATEX = ("$", "\\(", "\\[", "\\boxed", "\\begin")


def math_answer(completions: Sequence[Completion], answer: Sequence[object], **_: object) -> list[float]:
    """Score 1.0 where the final answer means the same as the column `answer`.

    The final answer is looked for in the last <answer>...</answer>, else after the last "####", else in the whole
    text; there math-verify takes what is boxed, else the last expression.

    Raises:
        ValueError: the data's answer is no mathematical expression.
    """
    golds: dict[str, list[Any]] = {}
    scores: list[float] = []
    for completion, wanted in zip(completions, answer, strict=True):
        text = str(wanted)
        if text not in golds:
            golds[text] = _parsed_gold(text)
        scores.append(_is_equal(golds[text], completion))
    return scores


def _is_equal(gold: list[Any], completion: Completion) -> float:
    from math_verify import parse, verify

    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    return float(verify(gold, parse(_final(text), parsing_timeout=LIMIT_S), timeout_seconds=LIMIT_S))


def _parsed_gold(text: str) -> list[Any]:
    from math_verify import parse

    final = _final(text).strip()
    found = parse(final if any(mark in final for mark in _LATEX) else f"${final}$", parsing_timeout=LIMIT_S)
    if not any(not isinstance(each, str) for each in found):
        raise ValueError(f"the data's answer {text!r} is no mathematical expression")
    return found


def _final(text: str) -> str:
    for pattern in (_TAGGED, _MARKED):
        marked = pattern.findall(text)
        if marked:
            return str(marked[-1])
    return text
