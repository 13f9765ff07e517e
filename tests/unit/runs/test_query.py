"""The language of `--where`: the same rows as Python's own evaluation gives, and nothing but what it knows."""

from __future__ import annotations

import random
import re
from typing import Any

import pyarrow as pa
import pytest

from flowrl.errors import ConfigError
from flowrl.runs.query import parse

KINDS = {"reward": "number", "staleness": "number", "score.exact": "number", "response": "text", "finish": "text",
         "token_ids": "list", "prompt_token_ids": "list"}  # fmt: skip


def table(seed: int = 0, *, rows: int = 60) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "reward": draw.choice([-1.0, 0.0, 0.5, 1.0]),
            "staleness": draw.randrange(4),
            "score.exact": draw.choice([0.0, 1.0]),
            "response": draw.choice(["sorry, 12", "the answer is 7", "Ähm", ""]),
            "finish": draw.choice(["stop", "length", "abort"]),
            "token_ids": list(range(draw.randrange(6))),
            "prompt_token_ids": [1],
        }
        for _ in range(rows)
    ]


class Row:
    """A row as Python sees it: `score.exact` is an attribute."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.exact = row["score.exact"]


def slowly(text: str, rows: list[dict[str, Any]]) -> list[int]:
    """Which rows Python's own `eval` says the expression is true of."""
    found: list[int] = []
    for place, row in enumerate(rows):
        names = {**row, "score": Row(row), "tokens": len(row["token_ids"]), "prompt_tokens": 1,
                 "matches": lambda subject, pattern: re.search(pattern, subject) is not None}  # fmt: skip
        if eval(text, {}, names):  # our own expressions, in a test
            found.append(place)
    return found


def chosen(text: str, rows: list[dict[str, Any]]) -> list[int]:
    places = pa.array(range(len(rows)))
    return pa.Table.from_pylist(rows).append_column("place", places).filter(parse(text, KINDS))["place"].to_pylist()


@pytest.mark.parametrize(
    "text",
    [
        "reward < 0 and staleness > 0",
        "reward < 0 or not staleness >= 2 and finish == 'stop'",
        "0 < reward <= 1 != staleness",
        "score.exact == 1",
        "finish in ('stop', 'abort') and staleness not in [0, 3]",
        "reward in (-1, 0.5)",
        "'sorry' in response or 'swer' in response",
        "'sorry' not in response",
        "matches(response, '[0-9]+$')",
        "tokens > 2 and len(token_ids) < 5 and prompt_tokens == 1",
        "len(response) == 3",
        "abs(reward) * 2 - staleness / 4 > 0.5",
        "-reward > 0",
        "reward is not None and response is None or reward > 0",
        "not (reward > 0 and staleness > 0)",
    ],
)
def test_an_expression_chooses_what_python_would(text: str) -> None:
    rows = table()
    assert chosen(text, rows) == slowly(text, rows)
    assert 0 < len(chosen(text, rows)) < len(rows), "a case that tells something"


def test_a_comparison_with_a_missing_value_chooses_nothing() -> None:
    rows = [{**row, "reward": None if place % 2 else row["reward"]} for place, row in enumerate(table())]
    known = [place for place in range(len(rows)) if not place % 2]
    assert chosen("reward < 9", rows) == known
    assert chosen("reward is None", rows) == [place for place in range(len(rows)) if place % 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rewrd < 0", "did you mean 'reward'"),
        ("score.exat < 0", "did you mean 'score.exact'"),
        ("reward <", "is not an expression"),
        ("reward", "neither true nor false"),
        ("__import__('os').system('true')", "neither true nor false"),
        ("len(open('/etc/passwd')) > 0", "is not read here"),
        ("(lambda: 1)() == 1", "is not read here"),
        ("response.__class__ == 1", "response.__class__"),
        ("[x for x in token_ids] == 1", "is not read here"),
        ("reward < 'a'", "they cannot be compared"),
        ("token_ids == token_ids", "compare its length"),
        ("reward + finish > 1", "not a number"),
        ("len(reward) > 1", "has no length"),
        ("matches(response, '(')", "is not a pattern"),
        ("matches(reward, 'a')", "matched against text"),
        ("finish in ('stop', 3)", "is no constant text"),
        ("reward is 1", "only None can"),
        ("reward ** 999999999 > 1", "is not read here"),
        ("reward < 0 if staleness else reward", "neither true nor false"),
        ("finish in ()", "is empty"),
        ("'a' in reward", "cannot stand behind 'in'"),
        ("(" * 300 + "reward" + ")" * 300 + " < 0", "is not an expression"),
        ("not " * 700 + "reward < 0", "characters"),
        ("-" * 1000 + "reward < 0", "nested more than"),
        ("reward" + "+1" * 900 + " > 0", "nested more than"),
        ("a" + ".a" * 900 + " > 0", "nested more than"),
        ("reward > 1" + "0" * 400, "more than 64 bits"),
        ("reward > 0x" + "f" * 1800, "more than 64 bits"),
        ("staleness in (1, 99999999999999999999)", "more than 64 bits"),
        ("-99999999999999999999 < staleness", "more than 64 bits"),
        (r"response == '\ud800'", "half a character"),
        (r"matches(response, '\ud800')", "half a character"),
    ],
)
def test_what_is_not_of_the_language_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, KINDS)
    assert said in str(caught.value)
    assert str(caught.value).startswith("--where: ")


def test_whatever_is_asked_is_answered_or_refused() -> None:
    """A seeded fuzzer over words of the language and some that are not."""
    seed = 12
    draw = random.Random(seed)
    words = ["reward", "staleness", "response", "token_ids", "score.exact", "1", "'a'", "1e308", "9" * 20, "None",
             "True", "(1, 2)", "()", r"'\ud800'"]  # fmt: skip
    joins = [*"+-*/<>", "<=", "==", "**", " in ", " not in ", " is ", " and ", " or "]

    def some(depth: int) -> str:
        kind = draw.random() if depth else 0.0
        if kind < 0.2:
            return draw.choice(words)
        if kind < 0.7:
            return f"({some(depth - 1)}{draw.choice(joins)}{some(depth - 1)})"
        return f"{draw.choice(['not ', '-', 'abs', 'len', 'foo'])}({some(depth - 1)})"

    num_answered = 0
    for turn in range(250):
        text = f"{draw.choice(['reward', some(2)])} {draw.choice([*'<>', *joins])} {some(draw.randrange(3))}"
        try:
            chosen(text, table(rows=3))
            num_answered += 1
        except (ConfigError, pa.ArrowException):  # what Arrow says, `RecordedRollouts` passes on
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, turn {turn}: {text!r}") from error
    assert num_answered > 5
