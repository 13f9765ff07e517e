from __future__ import annotations

import json
import math
from typing import Any

import pytest

from flowrl.data.formats import as_chat, asked_in, detect, good_response, normalise
from flowrl.data.naming import with_names
from flowrl.data.sources import RawRow
from flowrl.errors import DataError

ASK = [{"role": "user", "content": "What colour is the sky?"}]
BLUE = [{"role": "assistant", "content": "Blue."}]
GREEN = [{"role": "assistant", "content": "Green."}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def raw(**columns: Any) -> RawRow:
    return RawRow("a.jsonl:7", columns)


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def normal(kind: Any = None, **columns: Any):
    row = raw(**columns)
    return normalise(row, detect(row, kind))


SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("language-modeling, standard", {"text": "The sky is blue."}),
    ("language-modeling, conversational", {"messages": ASK + BLUE}),
    ("prompt-only, standard", {"prompt": "The sky is"}),
    ("prompt-only, conversational", {"prompt": ASK}),
    ("prompt-completion, standard", {"prompt": "The sky is", "completion": " blue."}),
    ("prompt-completion, conversational", {"prompt": ASK, "completion": BLUE}),
    ("preference, standard, explicit prompt", {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}),
    ("preference, standard, implicit prompt", {"chosen": "The sky is blue.", "rejected": "The sky is green."}),
    ("preference, conversational, explicit prompt", {"prompt": ASK, "chosen": BLUE, "rejected": GREEN}),
    ("preference, conversational, implicit prompt", {"chosen": ASK + BLUE, "rejected": ASK + GREEN}),
    ("unpaired-preference, standard", {"prompt": "The sky is", "completion": " blue.", "label": True}),
    ("unpaired-preference, conversational", {"prompt": ASK, "completion": GREEN, "label": False}),
    ("stepwise-supervision, standard", {"prompt": "9.8 or 9.11?", "completions": ["a", "b"], "labels": [True, False]}),
    ("stepwise-supervision, conversational", {"prompt": ASK, "completions": ["a", "b"], "labels": [1, 0.5]}),
    ("language-modeling, conversational, tools", {"messages": ASK + BLUE, "tools": [TOOL]}),
]


@pytest.mark.parametrize(("name", "columns"), SHAPES, ids=[name for name, _ in SHAPES])
def test_format_is_told_by_columns_and_their_types_alone(name: str, columns: dict[str, Any]):
    row = raw(**columns, source="somewhere", score=3)
    format = detect(row)
    assert str(format) == name
    normalise(row, format)


@pytest.mark.parametrize(
    ("columns", "kind", "override"),
    [
        ({"prompt": "a", "messages": ASK + BLUE, "prompt_id": "1"}, "language-modeling", "prompt-only"),
        ({"prompt": "a", "chosen": ASK + BLUE, "rejected": ASK + GREEN, "messages": ASK + BLUE}, "preference",
         "language-modeling"),
        ({"prompt": "a", "completion": "b", "label": 1}, "unpaired-preference", "prompt-completion"),
    ],
)  # fmt: skip
def test_row_with_columns_of_several_formats_is_of_the_first_unless_another_is_asked_for(columns, kind, override):
    assert detect(raw(**columns)).kind == kind
    assert detect(raw(**columns), override).kind == override


def told(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


SKY = ("human", "What colour is the sky?")


@pytest.mark.parametrize(
    ("columns", "same"),
    [
        ({"conversations": told(SKY, ("gpt", "Blue."))}, {"messages": ASK + BLUE}),
        ({"conversations": ASK + BLUE}, {"messages": ASK + BLUE}),
        ({"messages": told(SKY, ("gpt", "Blue."))}, {"messages": ASK + BLUE}),
        ({"conversations": told(SKY, ("gpt", "Blue.")), "messages": None}, {"messages": ASK + BLUE}),
        (
            {"conversations": told(SKY, ("gpt", "Blue.")), "system": "Be brief."},
            {"messages": [{"role": "system", "content": "Be brief."}, *ASK, *BLUE]},
        ),
        (
            {"conversations": told(SKY), "chosen": told(("gpt", "Blue."))[0], "rejected": told(("gpt", "Green."))[0]},
            {"prompt": ASK, "chosen": BLUE, "rejected": GREEN},
        ),
        (
            {"conversations": [*told(SKY), {**told(("gpt", "Blue."))[0], "weight": 0}, *told(SKY, ("gpt", "Blue."))]},
            {"messages": [*ASK, {**BLUE[0], "weight": 0}, *ASK, *BLUE]},
        ),
        (
            {"messages": [{**ASK[0], "role": "Human"}, {**BLUE[0], "role": "model"}]},
            {"messages": [*ASK, *BLUE]},
        ),
    ],
)
def test_other_names_of_roles_are_read_as_the_usual_ones(columns: dict[str, Any], same: dict[str, Any]):
    row = with_names(raw(**columns), {})
    assert normalise(row, detect(row)) == normal(**same)


def test_a_speaker_whom_sharegpt_does_not_have_is_refused():
    with pytest.raises(DataError, match=r"a.jsonl:7: message 1 is from 'function_call'; human, gpt"):
        with_names(raw(conversations=told(SKY, ("function_call", "{}"))), {})


def test_null_column_is_as_good_as_none():
    row = raw(prompt="a", completion="b", label=None, chosen=None, rejected=None, messages=None)
    assert detect(row).kind == "prompt-completion"


def test_unknown_columns_are_refused_with_what_would_be_accepted():
    with pytest.raises(DataError) as caught:
        detect(raw(question="a", answer="b"))
    message = str(caught.value)
    assert message.startswith("a.jsonl:7: has the columns question, answer, which are those of no known format")
    for expected in ("completion + prompt", "chosen + rejected", "messages", "text", "data.columns"):
        assert expected in message


def test_format_asked_for_needs_its_columns():
    with pytest.raises(DataError, match=r"a\.jsonl:7: .*not those of preference; give chosen \+ rejected"):
        detect(raw(prompt="a", completion="b"), "preference")


def test_explicit_and_implicit_prompts_come_to_the_same():
    explicit = normal(prompt=ASK, chosen=BLUE, rejected=GREEN)
    implicit = normal(chosen=ASK + BLUE, rejected=ASK + GREEN)
    assert implicit == explicit
    assert explicit.prompt == ASK
    assert explicit.responses == [BLUE, GREEN]


def test_implicit_prompt_keeps_earlier_turns_of_the_assistant():
    more = [{"role": "user", "content": "And grass?"}]
    row = normal(chosen=ASK + BLUE + more + GREEN, rejected=ASK + BLUE + more + BLUE)
    assert row.prompt == ASK + BLUE + more
    assert row.responses == [GREEN, BLUE]


def test_prompt_repeated_at_the_head_of_its_responses_is_taken_once():
    row = normal(prompt=ASK[0]["content"], chosen=ASK + BLUE, rejected=ASK + GREEN)
    assert (row.prompt, row.responses) == (ASK, [BLUE, GREEN])


@pytest.mark.parametrize(("columns", "labels"), [({}, [0.0, 0.0]), ({"margin": 2}, [2.0, 2.0])])
def test_label_of_a_pair_is_its_margin_or_nothing(columns, labels):
    assert normal(prompt="a", chosen="b", rejected="c", **columns).labels == labels


@pytest.mark.parametrize(
    ("label", "expected"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (1.0, 1.0), ("False", 0.0)]
)
def test_unpaired_label_says_whether_the_response_is_wanted(label, expected):
    assert normal(prompt="a", completion="b", label=label).labels == [expected]


def test_step_without_a_label_has_nan():
    labels = normal(prompt="a", completions=["b", "c", "d"], labels=[True, None, 0.25]).labels
    assert labels[0] == 1.0
    assert math.isnan(labels[1])
    assert labels[2] == 0.25


def test_nulls_that_parquet_adds_are_dropped_and_those_that_are_meant_stay():
    function = {"name": "look", "arguments": {"at": "sky", "unit": None}}
    call = {"role": "assistant", "content": None, "name": None, "tool_calls": [{"function": function, "id": None}]}
    columns = {"messages": [{**ASK[0], "tool_calls": None}, call], "tools": json.dumps([TOOL])}
    for is_columnar, arguments in ((False, {"at": "sky", "unit": None}), (True, {"at": "sky"})):
        raw = RawRow("a:7", columns, is_columnar)
        found = normalise(raw, detect(raw))
        calls = [{"type": "function", "function": {"name": "look", "arguments": arguments}}]
        assert found.tools == [TOOL]
        assert found.responses == [[ASK[0], {"role": "assistant", "content": "", "tool_calls": calls}]]


@pytest.mark.parametrize(
    ("written", "content"),
    [
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}], "ab"),
        (["a", " b"], "a b"),
        ([], ""),
    ],
)
def test_content_is_text_however_it_is_written(written: Any, content: str):
    row = normal(messages=[{"role": "user", "content": written}, *BLUE])
    assert row.responses[0][0] == {"role": "user", "content": content}


@pytest.mark.parametrize("arguments", ['{"at": "sky"}', {"at": "sky"}])
def test_arguments_of_a_call_are_an_object_however_they_are_written(arguments: Any):
    call = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": arguments}]}
    found: Any = normal(messages=[*ASK, call]).responses[0][1]
    assert found["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "sky"}}


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"prompt": 7, "completion": "b"}, ["column 'prompt' holds a number", "a string or a list of messages"]),
    ({"prompt": "a", "completion": ""}, ["column 'completion' is empty"]),
    ({"prompt": "a", "completion": " \n"}, ["column 'completion': the text is blank", "nothing to learn"]),
    ({"messages": [*ASK, {"role": "assistant", "content": " "}]}, ["what the assistant says is blank"]),
    ({"messages": ["a"]}, ["column 'messages': message 0 is a string", "role and content"]),
    ({"messages": "a"}, ["column 'messages' holds a string", "a list of messages was expected"]),
    ({"text": [{"role": "user", "content": "a"}]}, ["column 'text' holds a list", "a string was expected"]),
    ({"messages": []}, ["holds no message"]),
    ({"messages": [{"from": "human", "value": "a"}]}, ["message 0 holds from, value", "role and content"]),
    ({"messages": [{"role": "user", "content": 3}]}, ["message 0 has for content a number"]),
    ({"prompt": ASK, "completion": "b"}, ["prompt is a list of objects, completion is a string"]),
    ({"prompt": ASK, "completion": ASK}, ["column 'completion': message 0", "is missing"]),
    ({"prompt": "x", "completion": ASK}, ["message 0, the first after the prompt, is the user's", "assistant"]),
    ({"chosen": "a", "rejected": BLUE}, ["chosen is a string, rejected is a list of objects"]),
    ({"chosen": BLUE, "rejected": GREEN}, ["share no message"]),
    ({"chosen": ASK + BLUE, "rejected": ASK}, ["column 'rejected': message 1", "is missing"]),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, ["chosen and rejected are the same"]),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 4.5},
        ["has score_chosen=1 and score_rejected=4.5, so that the worse one is chosen"],
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": "2", "score_rejected": "9"},
        ["has score_chosen=2 and score_rejected=9"],
    ),
    ({"text": "a", "label": 0}, ["has a label beside a text"]),
    ({"text": "a", "label": "false"}, ["has a label beside a text"]),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_rating": 2.0, "rejected_rating": 3.0},
        ["has chosen_rating=2.0 and rejected_rating=3.0"],
    ),
    ({"chosen": ASK + BLUE, "rejected": ASK + BLUE}, ["chosen and rejected are the same"]),
    (
        {"chosen": "red", "rejected": "blue", "ask": "which colour?", "chosen_by": "a human"},
        ["begin with nothing that both answer", "nothing reads the column 'ask'; set data.columns.prompt=ask"],
    ),
    ({"prompt": "a", "completion": "b", "weight": 0.5}, ["has weight=0.5 for the row", "data.mix"]),
    ({"text": "a", "loss_mask": [0, 1]}, ["has a list in the column 'loss_mask' for the row"]),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "two"}, ["column 'margin' holds a string"]),
    ({"prompt": "a", "completion": "b", "label": "good"}, ["column 'label' holds 'good'", "true or false"]),
    ({"prompt": "a", "completion": "b", "label": 4}, ["column 'label' holds 4"]),
    ({"prompt": "a", "completions": "b", "labels": [1]}, ["column 'completions' holds a string", "list of strings"]),
    ({"prompt": "a", "completions": ["b", ""], "labels": [1, 1]}, ["none of them empty"]),
    ({"prompt": "a", "completions": ["b", "c"], "labels": [1]}, ["holds 1 for 2 steps"]),
    ({"prompt": "a", "completions": ["b"], "labels": [2]}, ["step 0 is labelled 2", "0 to 1"]),
    ({"prompt": "a", "completions": ["b"], "labels": [None]}, ["no step has a label"]),
    ({"messages": [{**ASK[0], "weight": 1}, *BLUE]}, ["message 0, the user's, has weight=1", "only the assistant's"]),
    ({"messages": ASK + BLUE, "tools": "{"}, ["column 'tools' holds a string", "a list of JSON schemas"]),
    ({"messages": ASK + BLUE, "tools": [1]}, ["column 'tools' holds a list", "JSON schemas"]),
    ({"messages": ASK + BLUE, "chat_template_kwargs": "x"}, ["'chat_template_kwargs' holds a string", "an object"]),
]


@pytest.mark.parametrize(("columns", "said"), BAD)
def test_bad_row_is_refused_with_its_place_what_was_found_and_what_was_expected(columns, said):
    with pytest.raises(DataError) as caught:
        normal(**columns)
    message = str(caught.value)
    assert message.startswith("a.jsonl:7: ")
    assert [part for part in said if part not in message] == [], message


def test_rows_of_a_data_set_are_all_written_alike():
    format = detect(raw(prompt="a", completion="b"))
    with pytest.raises(DataError, match=r"is prompt-completion, conversational, the rows before it are .*standard"):
        normalise(raw(prompt=ASK, completion=BLUE), format)
    with pytest.raises(DataError, match=r"is unpaired-preference, standard, the rows before it are prompt-completion"):
        normalise(raw(prompt="a", completion="b", label=False), format)
    with pytest.raises(DataError, match=r"are not those of prompt-completion"):
        normalise(raw(text="a"), format, "prompt-completion")
    assert normalise(raw(prompt="a", completion="b", label=False), format, "prompt-completion").labels == []


@pytest.mark.parametrize("field", ["masked", "train_on", "is_learned", "loss_scale", "train_detail"])
def test_a_field_that_may_say_what_is_learned_is_read_or_refused(field: str):
    with pytest.raises(DataError, match=f"message 1 has {field}, which nothing here reads; write weight"):
        normal(messages=[said("user", "a"), {**said("assistant", "b"), field: False}])
    (found,) = normal(messages=[said("user", "a"), {**said("assistant", "b"), "training": False}]).responses
    assert found[1] == {**said("assistant", "b"), "weight": 0}


def test_tools_stand_in_their_column():
    look = {"type": "function", "function": {"name": "look"}}
    with pytest.raises(DataError, match="message 0 has tools, which nothing here reads; write the column tools"):
        normal(messages=[{**said("system", "s"), "tools": [look]}, said("user", "a"), said("assistant", "b")])
    with pytest.raises(DataError, match="has a column 'functions', which nothing here reads; call it tools"):
        normal(messages=ASK + BLUE, functions=[look["function"]])
    assert normal(messages=ASK + BLUE, functions=[], tools=json.dumps([look])).tools == [look]


def test_a_prompt_ends_with_the_one_who_asks():
    with pytest.raises(DataError, match="column 'prompt': message 1, the last, is the assistant's"):
        normal(prompt=[said("user", "a"), said("assistant", "b")], completion=[said("assistant", "c")])


def test_strings_that_say_who_speaks_become_chat():
    shared = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"
    pair = as_chat(normal(chosen=f"{shared} 4", rejected=f"{shared} 5\n\n6"))
    assert pair.prompt == [said("user", "hi"), said("assistant", "hello"), said("user", "2+2?")]
    assert pair.responses == [[said("assistant", "4")], [said("assistant", "5\n\n6")]]
    as_strings = detect(raw(chosen=f"{shared} 4", rejected=f"{shared} 5"))
    assert good_response(pair, as_strings).responses == pair.responses[:1]
    (whole,) = as_chat(normal(text="\n\nHuman: hi\n\nAssistant: yo")).responses
    assert whole == [said("user", "hi"), said("assistant", "yo")]
    apart = as_chat(normal(prompt=shared, chosen=" 4", rejected=" 5\n\n6"))
    assert apart.prompt == pair.prompt
    assert asked_in("Human: or not?") == [said("user", "Human: or not?")]
    with pytest.raises(DataError, match="nor says who speaks"):
        as_chat(normal(chosen="a b", rejected="a c"))


@pytest.mark.parametrize(
    ("written", "read"),
    [("stop", "stop"), ("end_turn", "stop"), ("LENGTH", "length"), ("FinishReason.MAX_TOKENS", "length"), (None, "")],
)
def test_what_ended_a_sample_is_read_however_it_is_written(written, read):
    assert normal(prompt="a", completion="b", finish_reason=written).finish == read
    with pytest.raises(DataError, match="column 'finish' holds 'matte'; stop or length was expected"):
        normal(prompt="a", completion="b", finish="matte")


def test_earlier_turns_in_a_column_of_their_own_are_refused_beside_a_text():
    with pytest.raises(DataError, match=r"has earlier turns in a column 'history' \(1\), which nothing here reads"):
        normal(prompt="a", completion="b", history=[["c", "d"]])
    assert normal(prompt="a", completion="b", history=[]).prompt == "a"
    assert normal(messages=ASK + BLUE, history=["seen"]).responses == [ASK + BLUE]


def test_a_label_beside_messages_judges_the_last_of_them():
    row = normal(messages=ASK + BLUE, label=False)
    assert (row.prompt, row.responses, row.labels) == (ASK, [BLUE], [0.0])
    with pytest.raises(DataError, match="has a label beside a text"):
        normal(text="a", label=False)
    assert normal(text="a", label=3).labels == []
    with pytest.raises(DataError, match="does not end with an answer"):
        normal(messages=ASK, label=True)


def test_the_good_response_is_the_chosen_one_and_no_judged_step():
    columns = {"prompt": "a", "chosen": "b", "rejected": "c"}
    good = good_response(normal(**columns), detect(raw(**columns)))
    assert (good.prompt, good.responses, good.labels) == ("a", ["b"], [])
    for others in ({"chosen": "ab", "rejected": "ac"}, {"prompt": "a", "completions": ["b"], "labels": [1]}):
        with pytest.raises(DataError, match=r"no prompt of its own|takes none"):
            good_response(normal(**others), detect(raw(**others)))


def test_what_is_asked_does_not_depend_on_the_answer():
    assert normal(messages=ASK + BLUE).asked == normal(prompt=ASK, chosen=BLUE, rejected=GREEN).asked == ASK
    assert normal(chosen="The sky is blue.", rejected="The sky is green.").asked == "The sky is "
    assert normal(text="Once upon a time").asked == "Once upon a time"


def test_strings_that_repeat_their_prompt_give_it_up_as_conversations_do():
    row = normal(prompt="What is 2+2?", completion="What is 2+2? Four.")
    assert (row.prompt, row.responses) == ("What is 2+2?", [" Four."])
    asked = "Human: hi\n\nAssistant:"
    assert normal(prompt=asked, chosen=f"{asked} yo", rejected=f"{asked} no").responses == [" yo", " no"]
    half = normal(prompt="What is 2+2?", chosen="What is 2+2? Four.", rejected="Five.")
    assert half.responses == ["What is 2+2? Four.", "Five."]
    assert normal(prompt="1", completion="12").responses == ["12"]
