"""The data that `flowrl bench peers` gives to both sides: one JSONL file, and the reward function for GRPO.

Questions are made by rule, from tasks whose questions and answers differ in length as real data do; prompts are
written out with the model's chat template, so that both sides tokenize the same strings. Invariant: the file depends
on method, number, seed and tokenizer alone. Called by perf/peers.py; `contains_answer` also by both sides' processes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from flowrl.data.prompts import DEFAULT_TASKS, PromptData, load_tokenizer, prompt_of
from flowrl.data.rendering import Renderer
from flowrl.data.tasks import Task, make_rows

if TYPE_CHECKING:
    from pathlib import Path

Method = Literal["grpo", "sft", "dpo"]
METHODS: tuple[Method, ...] = ("grpo", "sft", "dpo")
# From 50 to some hundred tokens a question, from 2 to a hundred an answer.
VARIED = (
    *DEFAULT_TASKS,
    Task(name="word_sorting", weight=4),
    Task(name="number_sorting", weight=4),
    Task(name="sentence_reordering", weight=4),
    Task(name="list_functions", weight=4),
)


def write_data(path: Path, method: Method, *, model: Path, num_rows: int, seed: int, is_varied: bool) -> None:
    """Write the rows: prompt and answer; prompt and completion; or prompt, chosen and rejected."""
    renderer = Renderer(load_tokenizer(model))
    rows = make_rows(VARIED if is_varied else DEFAULT_TASKS, num_rows=num_rows, seed=seed)
    rows = [rows[place] for place in _mixed(len(rows))]
    with path.open("w") as file:
        for number, row in enumerate(rows):
            answer, other = (str(rows[place % len(rows)].columns["answer"]) for place in (number, number + 1))
            text = renderer.prompt_text(prompt_of(PromptData(), row), prefix=row.columns["answer_prefix"])
            line: dict[str, Any] = {"prompt": text}
            if method == "grpo":
                line["answer"] = answer
            elif method == "sft":
                line["completion"] = f" {answer}."
            else:
                line |= {"chosen": f" {answer}.", "rejected": f" {other if other != answer else other + '0'}."}
            file.write(json.dumps(line) + "\n")


def _mixed(count: int) -> list[int]:
    """Return places that take turns through the tasks, which follow each other in the rows made."""
    stride = next(step for step in range(count // 3 + 1, count + 2) if _is_coprime(step, count))
    return [place * stride % count for place in range(count)]


def _is_coprime(one: int, other: int) -> bool:
    while other:
        one, other = other, one % other
    return one == 1


def contains_answer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return 1 for each completion that has its answer in it, else 0; TRL's signature, which flowrl shares."""
    return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]
