from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from flowrl.data.prompts import PromptData, PromptSource, load_prompts, rows_alike
from flowrl.data.tasks import Task
from flowrl.errors import ConfigError, DataError, ModelError
from tests.support.tiny import tiny_tokenizer


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "answer": str(i)} for i in range(count)]


def test_train_and_heldout_share_no_text_even_where_rows_repeat(jsonl, tokenizer):
    prompts = load_prompts(PromptData(source=jsonl(numbered(40) + numbered(40)), num_heldout=8), tokenizer)
    train, heldout = ({row.text for row in rows} for rows in (prompts.train, prompts.heldout))
    assert (len(prompts.train), len(train)) == (64, 32)
    assert len(prompts.heldout) == len(heldout) == 8
    assert not train & heldout
    assert (prompts.num_repeated, prompts.num_left_out) == (40, 8)
    assert list(prompts.told()) == [
        "prompts: 64 to train on, 8 held out, asked in the column 'prompt'",
        "prompts: left out 8 that ask what a held-out one asks",
        "prompts: 40 rows are others once more, and are sampled once more",
    ]


def test_rows_that_ask_alike_are_told_apart_by_their_other_columns(jsonl, tokenizer):
    rows = [{"prompt": f"{i} + {i}?", "answer": answer} for i in range(6) for answer in (str(2 * i), f"{i}+{i}")]
    prompts = load_prompts(PromptData(source=jsonl(rows), num_heldout=3), tokenizer)
    assert len(prompts.train) + prompts.num_left_out == 9
    held = {row.columns["prompt"] for row in prompts.heldout}
    assert not held & {row.columns["prompt"] for row in prompts.train}
    kept = load_prompts(PromptData(source=jsonl(rows), num_heldout=0), tokenizer)
    assert sorted((row.columns["prompt"], row.columns["answer"]) for row in kept.train) == sorted(
        (row["prompt"], row["answer"]) for row in rows
    )


def test_split_order_and_digest_are_the_data_s_whatever_the_rendering(jsonl, tokenizer):
    rows = numbered(20)
    plain, dated = (
        load_prompts(PromptData(source=jsonl(rows), num_heldout=4, system_prompt=each), tokenizer)
        for each in (None, "Today is Tuesday")
    )
    assert plain.train[0].text != dated.train[0].text
    assert [row.index for row in plain.train + plain.heldout] == [row.index for row in dated.train + dated.heldout]
    assert [plain.row_at(k).index for k in range(32)] == [dated.row_at(k).index for k in range(32)]
    digests = [load_prompts(PromptData(source=jsonl(each)), tokenizer).digest for each in (numbered(80), numbered(81))]
    assert digests[0] != digests[1]
    assert plain.digest == dated.digest


USER = [{"role": "user", "content": "a?"}]
SHAPES: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "a?"}, "prompt", "a?"),
    ({"prompt": USER}, "prompt", "a?"),
    ({"messages": USER, "answer": "b"}, "messages", "a?"),
    ({"context_messages": USER, "label": "b"}, "context_messages", "a?"),
    ({"question": "a?", "answer": "#### b"}, "question", "a?"),
    ({"problem": "a?", "solution": "b", "level": 3}, "problem", "a?"),
    ({"instruction": "a?", "output": "b"}, "instruction", "a?"),
    ({"instruction": "a?", "input": ""}, "instruction", "a?"),
    ({"instruction": "Add.", "input": "1, 2"}, "instruction", "Add.\n\n1, 2"),
    ({"query": "a?"}, "query", "a?"),
    ({"prompt": "\n\nHuman: a?\n\nAssistant:"}, "prompt", "a?"),
    ({"question": "a?", "messages": [*USER, {"role": "assistant", "content": "b"}]}, "question", "a?"),
]


@pytest.mark.parametrize(("row", "column", "asked"), SHAPES)
def test_the_column_that_asks_is_found(jsonl, tokenizer, row, column, asked):
    data = PromptData(source=jsonl([row]), num_heldout=0)
    prompts = load_prompts(data, tokenizer)
    assert prompts.found_in == [column]
    assert prompts.train[0].text == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert rows_alike(data)[0][0].columns == prompts.train[0].columns
    assert prompts.train[0].columns == {**row, "prompt": prompts.train[0].columns["prompt"]}


def test_columns_have_the_names_that_reward_functions_ask_for(jsonl, tokenizer):
    data = PromptData(
        source=jsonl([{"q": "a?", "solution": "b"}]), num_heldout=0, prompt_column="q", columns={"answer": "solution"}
    )
    assert load_prompts(data, tokenizer).train[0].columns["answer"] == "b"
    with pytest.raises(DataError, match=r":1: no column 'gold' \(columns: q\); mend data\.columns"):
        load_prompts(PromptData(source=jsonl([{"q": "a?"}]), columns={"answer": "gold"}), tokenizer)


def test_sources_are_mixed_by_weight_each_in_its_own_shape(jsonl, tokenizer):
    one = jsonl([{"question": f"a{i}"} for i in range(30)], "a.jsonl")
    two = jsonl([{"problem": f"b{i}"} for i in range(30)], "b.jsonl")
    mix = [PromptSource(source=one, weight=3), PromptSource(source=two)]
    prompts = load_prompts(PromptData(mix=mix, num_heldout=4), tokenizer)
    assert prompts.found_in == ["question", "problem"]
    assert [kinds[0].columns["prompt"] for kinds in rows_alike(PromptData(mix=mix))] == ["a0", "b0"]
    drawn = [prompts.row_at(position).columns["prompt"][0] for position in range(100)]
    assert (drawn.count("a"), drawn.count("b")) == (75, 25)
    with pytest.raises(ConfigError, match=r"data\.mix: is set, and so is one of source"):
        PromptData(source=one, mix=mix)


def test_split_does_not_depend_on_the_order_of_the_rows(jsonl, tokenizer):
    forward = load_prompts(PromptData(source=jsonl(numbered(30), "a.jsonl"), num_heldout=5), tokenizer)
    backward = load_prompts(PromptData(source=jsonl(numbered(30)[::-1], "b.jsonl"), num_heldout=5), tokenizer)
    assert [row.text for row in forward.heldout] == [row.text for row in backward.heldout]


def test_what_is_held_out_is_never_learned_whatever_the_seed(jsonl, tokenizer):
    source = jsonl(numbered(60))
    sets = [load_prompts(PromptData(source=source, num_heldout=10, seed=seed), tokenizer) for seed in (0, 1)]
    assert [row.index for row in sets[0].heldout] == [row.index for row in sets[1].heldout]
    orders = [[each.row_at(k).index for k in range(50)] for each in sets]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_every_epoch_has_each_row_once_in_another_order(jsonl, tokenizer):
    prompts = load_prompts(PromptData(source=jsonl(numbered(20)), num_heldout=0), tokenizer)
    epochs = [[prompts.row_at(epoch * 20 + place).index for place in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_row_at_a_position_does_not_depend_on_what_was_read_before(jsonl, tokenizer):
    data = PromptData(source=jsonl(numbered(17)), num_heldout=2)
    walked, jumped = load_prompts(data, tokenizer), load_prompts(data, tokenizer)
    rows = [walked.row_at(position) for position in range(100)]
    assert [jumped.row_at(position) for position in (99, 3, 50)] == [rows[99], rows[3], rows[50]]


def test_columns_are_kept_and_the_prompt_column_is_called_prompt(jsonl, tokenizer):
    source = jsonl([{"question": f"q{i}", "answer": {"value": i}} for i in range(3)])
    prompts = load_prompts(PromptData(source=source, prompt_column="question", num_heldout=0), tokenizer)
    row = next(row for row in prompts.train if row.index == 1)
    assert row.columns == {"question": "q1", "prompt": "q1", "answer": {"value": 1}}


def test_token_ids_are_those_of_the_chat_template(jsonl, tokenizer):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    prompts = load_prompts(PromptData(source=jsonl([{"prompt": messages}]), num_heldout=0), tokenizer)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompts.train[0].token_ids == expected


def test_string_without_chat_template_goes_to_the_model_as_it_is(jsonl, tokenizer):
    data = PromptData(source=jsonl([{"prompt": "Once upon"}]), num_heldout=0, chat_template=False)
    row = load_prompts(data, tokenizer).train[0]
    assert row.text == "Once upon"
    assert tokenizer.decode(row.token_ids) == "Once upon"


def test_answer_prefix_column_begins_the_policys_turn(jsonl, tokenizer):
    source = jsonl([{"prompt": "1 + 1?", "answer_prefix": "The answer is"}])
    text = load_prompts(PromptData(source=source, num_heldout=0), tokenizer).train[0].text
    assert text.endswith("<|im_start|>assistant\nThe answer is")


def test_what_a_prompt_ends_with_of_the_answer_is_kept(jsonl, tokenizer):
    source = jsonl([{"prompt": "1 + 1?", "answer_prefix": "It is"}])
    assert load_prompts(PromptData(source=source, num_heldout=0), tokenizer).train[0].begun == "It is"
    thinking = tiny_tokenizer()
    thinking.chat_template = "{{ messages[0].content }}<|im_start|>{% if add_generation_prompt %}<think>\n{% endif %}"
    found = load_prompts(PromptData(source=source, num_heldout=0), thinking).train[0]
    assert found.text == "1 + 1?<|im_start|><think>\nIt is"
    assert found.begun == "<think>\nIt is"


def test_rows_are_of_one_kind_where_what_takes_one_takes_the_others(jsonl):
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "answer": "1", "extra": {"n": 1}},
        {"prompt": "b", "answer": "", "extra": {"n": 2}},
        {"prompt": "c", "answer": None, "extra": {"n": 2.5}},
        {"prompt": "d", "answer": 4, "extra": {"n": 2, "m": ""}},
        {"prompt": "", "answer": []},
    ]
    (kinds,) = rows_alike(PromptData(source=jsonl(rows)))
    assert [(kind.columns["prompt"], kind.num_rows) for kind in kinds] == [("a", 1), ("b", 2), ("d", 1)]
    assert str(kinds[1]).endswith(".jsonl:2, one of 2 like it)")


def test_settings_and_columns_without_effect_on_prompts_are_told(jsonl, tokenizer):
    source = jsonl([{"prompt": "Who?", "context": "Ann did it."}])
    data = PromptData(source=source, num_heldout=0, tasks=[Task(name="chain_sum")])
    told = "\n".join(load_prompts(data, tokenizer).told())
    assert "data.tasks: no effect, for no source is reasoning-gym" in told
    assert "the column 'context' is no part of what is asked" in told


BAD_ROWS: list[tuple[list[Any], dict[str, Any], list[str]]] = [
    ([{"prompt": "a", "history": [["b", "c"]]}], {}, [":1", "has earlier turns in a column 'history' (1)"]),
    ([{"prompt": "a"}, "{oops"], {}, [":2", "is not JSON"]),
    ([{"prompt": "a"}, "[1]"], {}, [":2", "holds a list, not an object"]),
    ([{"promt": "a", "answer": 1}], {}, [":1", "no column is known", "columns: promt, answer", "prompt_column=promt"]),
    ([{"prompt": 7}], {}, [":1", "the prompt is a number"]),
    ([{"prompt": "a", "answer_prefix": 7}], {}, [":1", "column 'answer_prefix' holds a number; a string"]),
    ([{"prompt": "a"}, {"prompt": "  "}], {}, [":2", "is empty"]),
    ([{"prompt": "x" * 50}], {"chat_template": False, "max_prompt_tokens": 49}, [":1", "has 50 tokens", "is 49"]),
    ([{"prompt": [{"role": "user", "content": "a"}]}], {"chat_template": False}, [":1", "is a conversation"]),
    ([{"prompt": [{"role": "user"}]}], {}, [":1", "message 0", "role and content"]),
    ([{"prompt": [{"role": "user", "content": " "}]}], {}, [":1", "the last message of the prompt is blank"]),
    ([{"prompt": [{"role": "system", "content": "a"}]}], {}, [":1", "holds nothing but a system message"]),
    ([{"prompt": "a", "tools": [{"name": "f"}]}], {"chat_template": False}, [":1", "has tools, which only a chat"]),
    (
        [{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        {},
        [":1", "message 1, the last, is the assistant's"],
    ),
]


@pytest.mark.parametrize(("rows", "settings", "said"), BAD_ROWS)
def test_bad_row_stops_with_its_line_and_what_is_wrong(jsonl, tokenizer, rows, settings, said):
    with pytest.raises(DataError) as caught:
        load_prompts(PromptData(source=jsonl(rows), num_heldout=0, **settings), tokenizer)
    message = str(caught.value)
    assert [part for part in said if part not in message] == [], message
    assert "\n" not in message


def test_skipping_leaves_the_good_rows_and_says_what_was_wrong(jsonl, tokenizer):
    source = jsonl([{"prompt": "a"}, "{oops", {"prompt": "x" * 300}, {"prompt": "b"}])
    prompts = load_prompts(PromptData(source=source, num_heldout=0, on_bad="skip"), tokenizer)
    assert sorted(row.index for row in prompts.train) == [0, 2]  # a line that is no row has no index
    assert len(prompts.skipped) == 2
    assert any(":2" in reason for reason in prompts.skipped)
    assert any(":3" in reason for reason in prompts.skipped)


def test_skipping_every_row_is_an_error_that_shows_the_first(jsonl, tokenizer):
    with pytest.raises(DataError, match=r"all 2 rows are bad; the first: .*:1: no column is known"):
        load_prompts(PromptData(source=jsonl([{"a": 1}, {"a": 2}]), on_bad="skip"), tokenizer)


@pytest.mark.parametrize(
    ("num_rows", "settings", "said"),
    [
        (0, {}, "holds no rows"),
        (20, {"num_heldout": 20}, "leaves none to train on"),
        (20, {"num_heldout": 5, "num_train": 16}, "lower num_train to 15"),
    ],
)
def test_too_few_rows_are_refused_with_the_numbers(jsonl, tokenizer, num_rows, settings, said):
    with pytest.raises(DataError, match=said):
        load_prompts(PromptData(source=jsonl(numbered(num_rows)), **settings), tokenizer)


def test_tokenizer_without_chat_template_is_refused_only_where_one_is_wanted(jsonl):
    bare = tiny_tokenizer()
    bare.chat_template = None
    source = jsonl(numbered(3))
    with pytest.raises(ModelError, match=r"no chat template.*chat_template=false"):
        load_prompts(PromptData(source=source, num_heldout=0), bare)
    assert len(load_prompts(PromptData(source=source, num_heldout=0, chat_template=False), bare).train) == 3


def test_system_prompt_needs_the_chat_template():
    with pytest.raises(ConfigError, match="system_prompt"):
        PromptData(system_prompt="Be kind.", chat_template=False)


def test_system_prompt_is_put_before_prompts_that_have_none(jsonl, tokenizer):
    own = [{"role": "system", "content": "Mine"}, {"role": "user", "content": "b"}]
    source = jsonl([{"prompt": "a"}, {"prompt": own}])
    rows = load_prompts(PromptData(source=source, num_heldout=0, system_prompt="Yours"), tokenizer).train
    texts = {row.index: row.text for row in rows}
    assert texts[0].startswith("<|im_start|>system\nYours<|im_end|>\n<|im_start|>user\na")
    assert "Yours" not in texts[1]


@pytest.mark.slow  # the first use imports reasoning-gym
def test_default_prompts_are_different_jsonable_and_end_as_asked(tokenizer):
    prompts = load_prompts(PromptData(), tokenizer)
    assert len(prompts.train) == 192
    assert len(prompts.heldout) == 64
    for row in prompts.train + prompts.heldout:
        assert row.columns["prompt"].endswith("Answer with only the final answer.")
        assert row.text.endswith("assistant\nThe answer is")
        assert json.loads(msgspec.json.encode(row.columns)) == row.columns


@pytest.mark.slow
def test_generated_prompts_depend_on_the_seed_alone(tokenizer):
    def texts(seed: int) -> list[str]:
        data = PromptData(tasks=[Task(name="gcd")], num_train=20, num_heldout=4, seed=seed)
        return [row.text for row in load_prompts(data, tokenizer).train]

    assert texts(3) == texts(3)
    assert not set(texts(3)) & set(texts(4))


def test_tasks_share_the_prompts_by_weight(tokenizer):
    data = PromptData(tasks=[Task(name="gcd", weight=3), Task(name="lcm")], num_train=30, num_heldout=10)
    prompts = load_prompts(data, tokenizer)
    names = [row.columns["task"] for row in prompts.train + prompts.heldout]
    assert (names.count("gcd"), names.count("lcm")) == (30, 10)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Task(name="chainsum"), "no such task; did you mean 'chain_sum'"),
        (Task(name="gcd", config={"min_value": 0}), "min_value must be positive"),
        (Task(name="gcd", config={"smallest": 2}), "smallest"),
        (Task(name="gcd", config={"seed": 2}), "may not set 'seed'"),
        (Task(name="count_bits", config={"max_n": 8}), "gives 8 different questions in .* 30 wanted"),
    ],
)
def test_task_that_cannot_be_made_is_refused(tokenizer, task, said):
    with pytest.raises(DataError, match=said):
        load_prompts(PromptData(tasks=[task], num_train=20, num_heldout=10), tokenizer)
