"""Mathematical answers checked for equality of meaning by the package math-verify: 1.0 for right, 0.0 for wrong.

    --set reward.function=flowrl.rewards.math:math_answer

"\\frac{1}{2}", "0.5" and "1/2" are the same answer; so are "A" and "(A)". math-verify hands parts of the completion to
sympy's evaluating parser and ends what takes too long by a signal. Both are reasons why this runs in a worker process
and in its main thread (`isolation=process`, the default).

Invariants:
- what is marked as the final answer is read as the data's answer is;
- what `exact_answer` takes is right here too;
- an `answer` in the data that is none is an error, never a wrong completion.

Tests: tests/contracts/test_reward_workers.py
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from flowrl.rewards.verify import accepted, choice, is_right, marked_answer, plain, said_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.rewards.verify import Completion

LIMIT_S = 3  # whole seconds for parsing an answer, and for comparing two; the package's alarm takes no fractions

_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d{1,3}")  # math-verify reads the e as Euler's number
# What is set off as mathematics already; `\$` is money, and a matrix that is not set off is read as its last number.
_SET_OFF = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_MATRIX = re.compile(r"\\begin\{([a-z]*matrix)\}.*?\\end\{\1\}", re.DOTALL)
_DISPLAYED = re.compile(r"\\(?:begin|end)\{(?:equation|align|gather|math|displaymath)\*?\}")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")  # math-verify takes it for a product: "pairs" would equal "Paris"
_SENTENCE = re.compile(r"[A-Za-z]{2,}\W+[A-Za-z]{2,}")
_NAMES = frozenset({"pi", "tau", "phi", "alpha", "beta", "theta", "oo", "infty"})
_LONG = 3  # letters; two are a product, "ab" or "xy"


def math_answer(
    completions: Sequence[Completion], answer: Sequence[object], answer_prefix: Sequence[str | None] = (), **_: object
) -> list[float]:
    """Score 1.0 where the final answer means the same as the column `answer`, or one of several.

    The final answer is the last that is marked (`flowrl.rewards.verify`), else the last expression of the text.

    Raises:
        ValueError: the data's answer is no mathematical expression.
    """
    golds: dict[str, list[list[Any]]] = {}
    scores: list[float] = []
    for text, wanted in zip(said_in(completions, answer_prefix), answer, strict=True):
        key, texts = repr(wanted), accepted(wanted)
        if key not in golds:
            golds[key] = [_parsed_gold(each) for each in texts]
        is_same = is_right(text, [plain(each) for each in texts])
        scores.append(float(is_same or _is_equal(golds[key], text)))
    return scores


def _is_equal(golds: list[list[Any]], text: str) -> bool:
    from math_verify import parse, verify

    marked = marked_answer(text)
    said = text if marked is None else marked
    if not _SET_OFF.search(said):
        said = _MATRIX.sub(r"$\g<0>$", said)
    found = parse(said, parsing_timeout=LIMIT_S) if marked is None or _SENTENCE.search(marked) else []
    if not found and (marked is not None or choice(said) or _WORD.fullmatch(said.strip())):
        found = _parsed(said)
    return any(verify(gold, found, timeout_seconds=LIMIT_S) for gold in golds)


def _parsed_gold(text: str) -> list[Any]:
    found = _parsed(text)
    if all(isinstance(each, str) for each in found):
        raise ValueError(f"the data's answer {text!r} is no mathematical expression")
    return found


def _parsed(answer: str) -> list[Any]:
    """Return what an answer that stands alone means, a choice or a word as a name of its own."""
    from math_verify import parse

    text = choice(answer) or _DISPLAYED.sub("", answer).strip().removesuffix(".")
    if _SCIENTIFIC.fullmatch(text):
        text = f"{Decimal(text):f}"
    elif _WORD.fullmatch(text) and len(text) >= _LONG and text not in _NAMES:
        text = rf"\text{{{text.casefold()}}}"
    return parse(text if _SET_OFF.search(text) else f"${text}$", parsing_timeout=LIMIT_S)
