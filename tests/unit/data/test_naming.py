from __future__ import annotations

import json
from typing import Any

import pytest

from flowrl.data.formats import as_chat, detect, normalise
from flowrl.data.naming import prompt_column, with_answer, with_names, with_prompt
from flowrl.data.prompts import PromptData, prompt_of
from flowrl.data.sources import RawRow
from flowrl.errors import DataError

ASK = [{"role": "user", "content": "2+2?"}]
FOUR = [{"role": "assistant", "content": "4"}]
FIVE = [{"role": "assistant", "content": "5"}]
TOLD = [{"role": "system", "content": "Be terse."}]


def named(columns: dict[str, Any], **names: str) -> RawRow:
    return with_answer(with_names(RawRow("a.jsonl:7", columns), names))


def normal(columns: dict[str, Any], **names: str):
    row = named(columns, **names)
    return normalise(row, detect(row))


@pytest.mark.parametrize(
    ("columns", "names", "same"),
    [
        ({"question": "2+2?", "chosen": "4", "rejected": "5"}, {}, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        ({"instruction": "Add", "input": "2+2", "chosen": "4", "rejected": "5"}, {},
         {"prompt": "Add\n\n2+2", "chosen": "4", "rejected": "5"}),
        ({"prompt": "", "question": "2+2?", "chosen": "4", "rejected": "5"}, {},
         {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        ({"question": "2+2?", "chosen": FOUR, "rejected": FIVE}, {}, {"prompt": ASK, "chosen": FOUR, "rejected": FIVE}),
        ({"query": "2+2?", "response": "4", "rejected_response": "5"}, {},
         {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        ({"messages": [*ASK, *FOUR], "rejected_response": "5"}, {},
         {"prompt": ASK, "chosen": FOUR, "rejected": FIVE}),
        ({"messages": [*ASK, *FOUR], "rejected_messages": [*ASK, *FIVE]}, {},
         {"prompt": ASK, "chosen": FOUR, "rejected": FIVE}),
        ({"query": "2+2?", "completion": "4", "label": True}, {}, {"prompt": "2+2?", "completion": "4", "label": True}),
        ({"instruction": "Add", "input": "2+2", "output": "4"}, {}, {"prompt": "Add\n\n2+2", "completion": "4"}),
        ({"instruction": "Who?", "context": "Ann did it.", "response": "Ann"}, {},
         {"prompt": "Who?\n\nAnn did it.", "completion": "Ann"}),
        ({"task": {"ask": "2+2?", "right": {"text": "4"}}}, {"prompt": "task.ask", "completion": "task.right.text"},
         {"prompt": "2+2?", "completion": "4"}),
        ({"instruction": "Add", "input": "2+2", "answer": "4"}, {"prompt": "instruction", "completion": "answer"},
         {"prompt": "Add\n\n2+2", "completion": "4"}),
        ({"instruction": "Add", "input": "2+2", "output": "4", "text": "### Add\n2+2\n### 4"}, {},
         {"prompt": "Add\n\n2+2", "completion": "4"}),
        ({"query": "2+2?", "response": "4"}, {}, {"prompt": "2+2?", "completion": "4"}),
        ({"input": "2+2?", "output": "4"}, {}, {"prompt": "2+2?", "completion": "4"}),
        ({"prompt": "2+2?", "response": "4", "label": 0}, {}, {"prompt": "2+2?", "completion": "4", "label": 0}),
        ({"instruction": "Add 2 and 2", "input": "", "output": "4"}, {}, {"prompt": "Add 2 and 2", "completion": "4"}),
        ({"question": "Who?", "context": "Ann did it.", "chosen": "Ann", "rejected": "I"}, {},
         {"prompt": "Who?\n\nAnn did it.", "chosen": "Ann", "rejected": "I"}),
        ({"question": "Is it?", "passage": "It is.", "options": ["it", "Is"], "completion": "yes"}, {},
         {"prompt": "Is it?\n\nIt is.", "completion": "yes"}),
        ({"prompt": "Add", "input": "2+2", "completion": "4"}, {}, {"prompt": "Add\n\n2+2", "completion": "4"}),
        ({"Question": "2+2?", "Response": "4", "Complex CoT": "..."}, {}, {"prompt": "2+2?", "completion": "4"}),
        ({"PROMPT": "2+2?", " Chosen": "4", "Rejected": "5"}, {}, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        ({"prompt": "Who?", "context": "not part of it", "image": [], "images": None, "completion": "I"}, {},
         {"prompt": "Who?", "completion": "I"}),
        ({"prompt": "2+2?", "chosen": {"role": "model", "content": "4"}, "rejected": {"from": "gpt", "value": "5"}}, {},
         {"prompt": ASK, "chosen": FOUR, "rejected": FIVE}),
        ({"messages": ASK + FIVE, "kto_tag": False}, {}, {"messages": ASK + FIVE, "label": False}),
        ({"messages": json.dumps(ASK + FOUR)}, {}, {"messages": ASK + FOUR}),
        ({"chosen": json.dumps(ASK + FOUR), "rejected": json.dumps(ASK + FIVE)}, {},
         {"chosen": ASK + FOUR, "rejected": ASK + FIVE}),
        ({"system": "Be terse.", "messages": ASK + FOUR}, {}, {"messages": TOLD + ASK + FOUR}),
        ({"system": [{"type": "text", "text": "Be terse."}], "messages": ASK + FOUR}, {},
         {"messages": TOLD + ASK + FOUR}),
        ({"system_prompt": "Be terse.", "chosen": ASK + FOUR, "rejected": ASK + FIVE}, {},
         {"chosen": TOLD + ASK + FOUR, "rejected": TOLD + ASK + FIVE}),
        ({"system": "Not this.", "messages": TOLD + ASK + FOUR}, {}, {"messages": TOLD + ASK + FOUR}),
    ],
)  # fmt: skip
def test_what_is_asked_is_found_wherever_a_common_data_set_has_it(columns, names, same):
    assert normal(columns, **names) == normal(same)


@pytest.mark.parametrize(
    "columns",
    [
        {"question": "hi", "chosen": "Human: hi\nAssistant: yes", "rejected": "Human: hi\nAssistant: no"},
        {"instruction": "2+2?", "chosen": TOLD + ASK + FOUR, "rejected": TOLD + ASK + FIVE},
    ],
)
def test_responses_that_hold_what_is_asked_are_not_given_it_twice(columns: dict[str, Any]):
    assert "prompt" not in named(columns).columns


def test_a_response_that_repeats_the_question_is_a_response():
    row = normal({"question": "2+2?", "chosen": "2+2? 4.", "rejected": "You ask 2+2? 5."})
    assert row.prompt == "2+2?"
    assert row.responses == ["2+2? 4.", "You ask 2+2? 5."]


def test_a_prompt_of_an_instruction_reads_what_it_is_about():
    row = with_names(RawRow("a.jsonl:7", {"instruction": "Add", "input": "2+2", "output": "4"}), {})
    assert with_prompt(row, prompt_column(row)).columns["prompt"] == "Add\n\n2+2"


@pytest.mark.parametrize("setting", [None, "Talk."])
def test_a_system_prompt_of_the_row_stands_before_its_prompt(setting: str | None):
    row = RawRow("a.jsonl:7", {"system_prompt": "Be terse.", "prompt": "2+2?"})
    assert prompt_of(PromptData(system_prompt=setting), row).prompt == TOLD + ASK
    with pytest.raises(DataError, match="has a system prompt in a column of its own"):
        prompt_of(PromptData(chat_template=False), row)


def test_a_system_prompt_beside_strings_goes_into_their_conversation():
    row = normal({"system": "Be terse.", "prompt": "2+2?", "completion": "4"})
    assert (row.system, row.prompt) == ("Be terse.", "2+2?")
    assert as_chat(row).prompt == TOLD + ASK


def test_what_an_instruction_is_about_is_asked_unless_it_is_said_as_words_of_its_own():
    short = normal({"instruction": "Add 10 to the number", "input": "1", "output": "11"})
    assert short.prompt == "Add 10 to the number\n\n1"
    said = normal({"instruction": "Add 10 to 1.", "input": "1", "output": "11"})
    assert said.prompt == "Add 10 to 1."


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prompt": str(ASK)}, "column 'prompt' holds messages in a text that is no JSON"),
        ({"instruction": "and?", "history": [["hi", "yo"]], "output": "x"}, "former turns in the column 'history'"),
        (
            {"question": {"full_text": "2+2?"}, "chosen": "4", "rejected": "5"},
            "column 'prompt' holds an object",
        ),
        (
            {"instruction": "Add", "input": [2, 2], "output": "4"},
            "column 'input', which belongs to 'instruction', holds a list; a string was expected",
        ),
        (
            {"question": "Which?", "choices": {"label": ["A"], "text": ["a fox"]}, "chosen": "A", "rejected": "B"},
            "column 'choices' holds 'A', which is not in 'question', so the model would not read it; write both",
        ),
        (
            {"question": "Which?", "A": "a fox", "B": "a cat", "chosen": "A", "rejected": "B"},
            "column 'A' holds 'a fox', which is not in 'question'",
        ),
        (
            {"question": "Which?", "option_a": "a fox", "option_b": "a cat", "chosen": "A", "rejected": "B"},
            "column 'option_a' holds 'a fox', which is not in 'question'",
        ),
        (
            {"messages": ASK + FOUR, "image": {"bytes": b"png", "path": None}},
            "has more than text: the column 'image' is not empty; only text can be trained on",
        ),
        ({"prompt": "<image>2+2?", "completion": "4", "images": ["a.png"]}, "the column 'images' is not empty"),
    ],
)
def test_what_would_be_left_out_is_refused(columns: dict[str, Any], says: str):
    with pytest.raises(DataError, match=says):
        normal(columns)
