"""Examples made on the spot: reasoning-gym's tasks with their answers, for a first offline run without a file.

`reasoning-gym` gives demonstrations (prompt-completion), `reasoning-gym:preference` the right answer against another
question's, `reasoning-gym:unpaired-preference` a right and a wrong answer in turn.

Invariant: rows depend on the kind, the number and the seed alone.

Called by `load_examples`.

Tests: tests/unit/data/test_examples.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowrl.data.prompts import DEFAULT_TASKS, REASONING_GYM
from flowrl.data.sources import RawRow
from flowrl.data.tasks import make_rows
from flowrl.errors import DataError

if TYPE_CHECKING:
    from flowrl.data.formats import Conversation

MADE_KINDS = ("prompt-completion", "preference", "unpaired-preference")


def is_made(source: str) -> bool:
    """Say whether a source names examples that are made here."""
    return source.partition(":")[0] == REASONING_GYM


def made_examples(source: str, *, num_rows: int, seed: int) -> list[RawRow]:
    """Return different conversational examples of the kind that the source names.

    Raises:
        DataError: the kind is unknown, or there are not that many different questions.
    """
    kind = source.partition(":")[2] or MADE_KINDS[0]
    if kind not in MADE_KINDS:
        raise DataError(f"data {source}", f"no {kind!r} can be made", f"one of {', '.join(MADE_KINDS)}")
    rows = make_rows(DEFAULT_TASKS, num_rows=num_rows, seed=seed)
    right = [_answer(row, row.columns["answer"]) for row in rows]
    wrong = [_answer(row, _another_answer(rows, number)) for number, row in enumerate(rows)]
    made: list[RawRow] = []
    for number, row in enumerate(rows):
        columns: dict[str, Any] = {"prompt": [{"role": "user", "content": row.columns["prompt"]}]}
        if kind == "preference":
            columns |= {"chosen": right[number], "rejected": wrong[number]}
        elif kind == "unpaired-preference":
            is_right = number % 2 == 0
            columns |= {"completion": (right if is_right else wrong)[number], "label": is_right}
        else:
            columns["completion"] = right[number]
        made.append(RawRow(row.place, columns))
    return made


def _answer(row: RawRow, answer: str) -> Conversation:
    return [{"role": "assistant", "content": f"{row.columns['answer_prefix']} {answer}."}]


def _another_answer(rows: list[RawRow], number: int) -> str:
    """Return the next row's answer that differs from this one's; the made tasks have hundreds of answers."""
    answer = rows[number].columns["answer"]
    following = (row.columns["answer"] for row in rows[number + 1 :] + rows[:number])
    return next((other for other in following if other != answer), f"{answer}0")
