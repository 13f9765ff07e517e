"""Rewards that check an answer by rule: 1.0 for right, 0.0 for wrong, nothing between.

The final answer of a completion is the last thing in it that is marked as such, by \\boxed{...}, <answer>...</answer>
or ####, else the whole text; so a completion that was asked for only the answer and says more is wrong, which is what
keeps answers short. What is thought before `</think>` is not said, also where the prompt opened the thinking
(`answer_prefix` has what a prompt ends with of the answer). Partial credit is deliberately not given: it would
reward long or hedging answers. A column `answer` holds a text (marked or not), a number, a list of texts of which
each is right, or an object with one of them (`FIELDS`); what is no answer is an error, never a wrong completion.
Called by `RewardFunction` under their import paths.

Tests: tests/unit/rewards/test_verify.py
"""

from __future__ import annotations

import functools
import re
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from flowrl.ending import CLOSERS, THINKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Completion = str | list[dict[str, Any]]  # a message list where the prompt is a conversation

FIELDS = ("ground_truth", "answer", "text", "value")  # of an object that is an answer (verl, SQuAD, TriviaQA)
_TYPED = {0x2212: "-", **{0xFF01 + place: 0x21 + place for place in range(94)}}  # the minus sign, and wide letters
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([^\s{}$\\]+)")
_OPENED = re.compile(rf"\s*(?:{THINKS})")  # what is not ended is not said
_ANSWER, _ANSWERED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL), "</answer>"
_HASHES = re.compile(r"####(.*)")
_BOX = r"\\(?:boxed|fbox)\s*\{"
_BRACE = re.compile(rf"(?P<box>{_BOX})|\\(?!{_BOX}).|[{{}}]", re.DOTALL)  # an escaped one is no brace
_SPACE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|~|\s")
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([a-z])[).:]{0,2}", re.IGNORECASE)
_WHOLE = r"\d{1,3}(?:,\d{3})+|\d+"  # a comma stands before each three digits, or "1,2" would be 12
_NUMBER = re.compile(rf"([-+]?)\\?\$?({_WHOLE})?(\.\d*)?(?:e([-+]?\d{{1,3}}))?")
_GAP = re.compile(r"(?<=\d)(?:\{,\}|\\[!,;: ]|[~\s])(?=\d{3}(?!\d))")  # between thousands
_FRACTION = re.compile(r"\\[cdt]?frac(?:\{([-+]?\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
_NO_GAP = re.compile(r" (?!\d)|(?<![\d,]) ")  # "1 2" and "1, 200" are two numbers
_RATIO = re.compile(r"([-+]?)(?:(\d+) )?(\d+)/(\d+)")  # "1 1/2" is 3/2
_SET_OFF = re.compile(r"\\\(\s*(.*?)\s*\\\)|\\\[\s*(.*?)\s*\\\]", re.DOTALL)  # \(7\) and \[7\] are 7
_GROUPED = re.compile(r"\{+([^{}]*)\}+")
_ESCAPED = re.compile(r"\\([%$#&_{}])")  # what LaTeX writes of these signs
_MOST_DIGITS = 4000  # Python reads integers of up to 4300
_UNIT = re.compile(
    r"(.*?[\d}.])((?:\\[!,;: ]|[~\s])*)(?:\\?%|\^?\\circ|\^\{\\circ\}|°|([^\W\d_]+))"
)  # a number and one word, or a sign
# Units of two letters and more; other words so short are variables, and one letter may always be one.
_SYMBOL = re.compile("cm|mm|km|ft|in|yd|mi|kg|mg|lbs?|oz|ml|hrs?|ms|[mk]ph|[kmg]b|k?hz|kw|mol|usd|eur|gbp")
_UPRIGHT = re.compile(rf"{_SYMBOL.pattern}|[acfghjklmnstvw]")  # a variable is not set in \text
# Words behind a number that change or deny it.
_NO_UNIT = re.compile(
    "not|maybe|perhaps|possibly|probably|wrong|incorrect|never|none|and|sqrt|log|sin|cos|tan|exp|mod|dozen|hundred|"
    "thousand|million|billion|trillion|half|halves|thirds?|quarters?|tenths|hundredths"
)


def exact_answer(
    completions: Sequence[Completion], answer: Sequence[object], answer_prefix: Sequence[str | None] = (), **_: object
) -> list[float]:
    """Score 1.0 where the final answer equals the column `answer`.

    Letter case and how a number or a choice is written do not count: "7.0" is 7, "\\\\frac{1}{2}" is 0.5, "(A)" is A.
    A marked number may have a unit where the data's answer has none.

    Raises:
        ValueError: a row has no answer, or an object, or several numbers.
    """
    wanted = [[plain(each) for each in accepted(value)] for value in answer]
    said = said_in(completions, answer_prefix)
    return [float(is_right(text, golds)) for text, golds in zip(said, wanted, strict=True)]


def reasoning_gym_score(
    completions: Sequence[Completion],
    task: Sequence[str],
    entry: Sequence[dict[str, Any]],
    answer_prefix: Sequence[str | None] = (),
    **_: object,
) -> list[float]:
    """Score 1.0 where reasoning-gym's own verifier of `task` gives the final answer full marks."""
    said = said_in(completions, answer_prefix)
    return [float(_scorer(t)(final_answer(text), e) >= 1.0) for text, t, e in zip(said, task, entry, strict=True)]


def final_answer(text: str) -> str:
    """Return the final answer; "The sum is \\\\boxed{12}." gives "12", " 12.\\n" gives "12"."""
    found = marked_answer(text)
    return text.strip().removesuffix(".").rstrip() if found is None else found


def said_in(found: Sequence[Completion], begun: Sequence[str | None] = ()) -> list[str]:
    """Return what completions say behind their thinking, of a conversation its last message.

    `begun` has what the prompt of each ends with of the answer, or is empty. What is thought and not ended says
    nothing.
    """
    return [_said(each, mouth or "") for each, mouth in zip(found, begun or [""] * len(found), strict=True)]


def _said(completion: Completion, begun: str) -> str:
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    *thoughts, said = CLOSERS.split(text)
    is_open = _OPENED.match(said if thoughts else begun + said)
    return "" if is_open else said.translate(_TYPED)


def marked_answer(text: str) -> str | None:
    """Return what is marked as the answer, of several marks the last; "\\\\boxed{x^{2}} is it" has "x^{2}"."""
    closed = text[: text.rfind(_ANSWERED) + len(_ANSWERED)] if _ANSWERED in text else ""
    found = chain(_ANSWER.finditer(closed), _HASHES.finditer(text))
    marked = [(each.start(), each[1]) for each in found]
    _, answer = max([*marked, *_boxes(text)], default=(0, None))
    return None if answer is None else answer.strip()


def accepted(answer: object) -> list[str]:
    """Return the texts that the data take for right; 7.0 is ["7"], ["a", "b"] is itself.

    Raises:
        ValueError: there is none, or it cannot be told what is.
    """
    if isinstance(answer, dict):
        fields = cast("dict[str, object]", answer)
        named = [name for name in FIELDS if name in fields]
        if len(named) != 1:
            raise ValueError(f"the data's answer is an object with {', '.join(fields) or 'nothing'}: none is its text")
        aliases = cast("list[object]", fields.get("aliases") or [])
        return [text for each in (fields[named[0]], *aliases) for text in accepted(each)]
    if isinstance(answer, list | tuple):
        each = cast("Sequence[object]", answer)
        if len(each) != 1 and not (each and all(isinstance(one, str) for one in each)):
            raise ValueError(f"the data's answer is {answer!r}: give one, or a list of texts of which each is right")
        return [text for one in each for text in accepted(one)]
    if answer is None or answer != answer:  # nan, as tables have what is missing
        raise ValueError("a row of the data has no answer")
    if isinstance(answer, float):
        return [f"{Decimal(repr(answer)).normalize():f}"]
    text = str(answer).translate(_TYPED)
    if not text.strip():
        raise ValueError("a row of the data has no answer")
    found = marked_answer(text)
    return [text if found is None else found]


def choice(answer: str) -> str:
    """Return the letter of a choice however it is written, else ""; "(A)", "A." and "\\\\text{A}" are "A"."""
    found = _CHOICE.fullmatch(_WORDS.sub(r"\1", answer).strip().strip("$"))
    return found[1] if found else ""


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    """Yield where each box begins and what stands in it, braces and all; one that is not closed is none."""
    yield from ((box.start(), box[1]) for box in _BARE_BOX.finditer(text))
    opened: list[re.Match[str]] = []
    for brace in _BRACE.finditer(text):
        if brace[0].endswith("{") and brace[0] != "\\{":
            opened.append(brace)
        elif brace[0] == "}" and opened and (box := opened.pop())["box"]:
            yield box.start(), text[box.end() : brace.start()]


def is_right(text: str, golds: Sequence[str | Fraction]) -> bool:
    """Say whether the final answer in a text is one of those that are right, each as `plain` has it."""
    final = final_answer(text)
    if plain(final) in golds:
        return True
    unit = _UNIT.fullmatch(_WORDS.sub(r" \1", final).strip("$ ."))
    if unit is None or marked_answer(text) is None:
        return False
    number, gap, word = plain(unit[1]), unit[2], (unit[3] or "").casefold()
    symbol = _UPRIGHT if _WORDS.search(final) else _SYMBOL
    is_unit = not word or symbol.fullmatch(word) or (gap and len(word) > 2 and not _NO_UNIT.fullmatch(word))
    return bool(is_unit) and isinstance(number, Fraction) and number in golds


def plain(answer: str) -> str | Fraction:
    """Return an answer as it is compared: "$1,200" and "1200.0" are one number, "Paris" and "paris" one text."""
    text = answer.strip().removesuffix(".").strip()
    text = text.strip("$") if text.startswith("$") and text.endswith("$") else text
    text = found[1] or found[2] or "" if (found := _SET_OFF.fullmatch(text)) else text
    grouped = _GROUPED.fullmatch(text)
    number = _number(grouped[1] if grouped else text)
    if number is not None:
        return number
    text = _ESCAPED.sub(r"\1", choice(text) or _WORDS.sub(r"\1", text))
    text = re.sub(r"\\[dt]frac", r"\\frac", " ".join(_SPACE.sub(" ", text).split()))
    return re.sub(r"(?<=[,(\[]) | (?=[,)\]])", "", text).casefold()


def _number(text: str) -> Fraction | None:
    if len(text) > _MOST_DIGITS:
        return None
    text = _FRACTION.sub(lambda found: f" {found[1] or found[2]}/{found[3] or found[4]}", _GAP.sub(",", text))
    text = _NO_GAP.sub("", " ".join(_SPACE.sub(" ", text).split()))
    if (found := _RATIO.fullmatch(text)) and int(found[4]) and not (found[2] and int(found[3]) >= int(found[4])):
        value = int(found[2] or 0) + Fraction(int(found[3]), int(found[4]))
    elif (found := _NUMBER.fullmatch(text)) and (found[2] or len(found[3] or "") > 1):
        digits = (found[2] or "0").replace(",", "") + (found[3] or "").removesuffix(".")
        value = Fraction(f"{digits}e{found[4] or 0}")  # of any length; decimal's arithmetic rounds to 28 digits
    else:
        return None
    return -value if found[1] == "-" else value


@functools.lru_cache(maxsize=64)
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    return cast("Callable[[str, dict[str, Any]], float]", get_score_answer_fn(task))
