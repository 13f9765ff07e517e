"""Prompts made on the spot: reasoning-gym's procedural tasks, whose answers are verified by rule.

Invariant: the rows depend on the specs, the number and the seed alone, and no two have the same question.

Called by `load_prompts`; `flowrl.rewards.verify` scores the answers.

Tests: tests/unit/data/test_prompts.py
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from flowrl.config import Config, Meta
from flowrl.data.sources import RawRow
from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

# A task is refused when this many draws for each wanted question have not given enough different ones.
DRAWS_PER_QUESTION = 20


class Task(Config):
    """One reasoning-gym task and how it is asked."""

    name: str  # as reasoning-gym registers it
    weight: Annotated[float, Meta(gt=0)] = 1.0  # its share of the questions, relative to the others
    config: dict[str, Any] = {}  # the task's own options
    instruction: str = "Answer with only the final answer."  # put after the question
    answer_prefix: str = "The answer is"  # begins the policy's turn; not part of the completion


def make_rows(tasks: Sequence[Task], *, num_rows: int, seed: int) -> list[RawRow]:
    """Return `num_rows` different questions, shared among the tasks by weight.

    Columns: prompt, answer, task, entry (what reasoning-gym's scorer needs) and answer_prefix.

    Raises:
        DataError: a task or option is unknown, or a task has too few different questions.
    """
    if not tasks:
        raise DataError("data.tasks", "is empty", "name at least one reasoning-gym task")
    rows: list[RawRow] = []
    for task, count in zip(tasks, _shares([task.weight for task in tasks], num_rows), strict=True):
        rows.extend(_rows_of(task, count, seed))
    return rows


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` by weight into whole numbers that add up; [2, 1] of 10 is [7, 3]."""
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _rows_of(task: Task, count: int, seed: int) -> list[RawRow]:
    where = f"data.tasks.{task.name}"
    num_draws = DRAWS_PER_QUESTION * count + 100
    # reasoning-gym draws row i from seed + i: neighbouring seeds would share all rows but one.
    dataset = _open(task, where, seed=seed * 1_000_003, size=num_draws)
    found: dict[str, RawRow] = {}
    for draw in range(num_draws):
        if len(found) == count:
            break
        entry = dataset[draw]
        question = entry["question"].strip()
        if question not in found:
            found[question] = RawRow(f"{where} draw {draw}", _columns(task, question, entry, where))
    if len(found) < count:
        remedy = "lower data.num_train, widen the task's config or lower its weight"
        raise DataError(where, f"gives {len(found)} different questions in {num_draws} draws, {count} wanted", remedy)
    return list(found.values())


def _open(task: Task, where: str, *, seed: int, size: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task.name not in DATASETS:
        close = difflib.get_close_matches(task.name, DATASETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"reasoning-gym has {len(DATASETS)}, e.g. chain_sum, gcd"
        raise DataError(where, "reasoning-gym has no such task", hint)
    for option in ("seed", "size"):
        if option in task.config:
            raise DataError(where, f"config may not set {option!r}", "set data.seed or data.num_train")
    try:
        return reasoning_gym.create_dataset(task.name, **task.config, seed=seed, size=size)
    except (TypeError, ValueError, AssertionError) as error:  # reasoning-gym checks its options with assert
        raise DataError(
            where, f"reasoning-gym refuses config {task.config} ({error})", "mend the task's config"
        ) from error


def _columns(task: Task, question: str, entry: dict[str, Any], where: str) -> dict[str, Any]:
    prompt = f"{question}\n{task.instruction}" if task.instruction else question
    try:
        plain = msgspec.json.decode(msgspec.json.encode(entry))
    except (TypeError, msgspec.EncodeError) as error:
        raise DataError(where, f"its entries cannot be sent as JSON ({error})", "take another task") from error
    return {
        "prompt": prompt,
        "answer": str(entry["answer"]),
        "task": task.name,
        "entry": plain,
        "answer_prefix": task.answer_prefix,
    }
