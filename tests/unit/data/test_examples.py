from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flowrl.config import resolve
from flowrl.data.examples import BARE, ExampleData, ExampleSet, ExampleSource, load_examples
from flowrl.errors import ConfigError, DataError
from tests.support.tiny import CHAT_TEMPLATE

Rows = list[dict[str, Any]]


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def pairs(count: int) -> Rows:
    return [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(count)]


@pytest.fixture
def load(jsonl, tokenizer):
    """Writes rows to a file and loads them, with nothing held out unless the settings say so."""

    def load(rows: list[Any], **settings: Any) -> ExampleSet:
        return load_examples(ExampleData(**{"source": jsonl(rows), "num_heldout": 0, **settings}), tokenizer)

    return load


def texts(tokenizer: Any, examples: ExampleSet) -> list[str]:
    rows = sorted(examples.train, key=lambda row: row.index)
    return [tokenizer.decode([*row.prompt_ids, *row.responses[0]]) for row in rows]


# What a row becomes


def test_each_format_has_the_labels_that_its_objective_reads(load):
    ask, yes, no = [said("user", "a")], [said("assistant", "y")], [said("assistant", "n")]
    rows: list[tuple[dict[str, Any], int, list[float]]] = [
        ({"prompt": "a", "completion": "b"}, 1, []),
        ({"messages": ask + yes}, 1, []),
        ({"prompt": ask, "chosen": yes, "rejected": no}, 2, [0.0, 0.0]),
        ({"prompt": ask, "chosen": yes, "rejected": no, "margin": 1.5}, 2, [1.5, 1.5]),
        ({"prompt": "a", "completion": "b", "label": True}, 1, [1.0]),
        ({"prompt": "a", "completion": "b", "label": False}, 1, [0.0]),
    ]
    for columns, num_responses, labels in rows:
        (row,) = load([columns]).train
        assert (len(row.responses), row.labels, row.step_labels) == (num_responses, labels, None)
    (row,) = load([{"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}]).train
    assert row.step_labels is not None
    assert (row.labels, list(map(len, row.step_labels))) == ([], [len(row.responses[0])])


def test_row_knows_its_place_and_its_index(load):
    examples = load([{"prompt": "a", "completion": "b"}, "", {"prompt": "c", "completion": "d"}])
    places = sorted((row.index, row.place.rpartition(":")[2]) for row in examples.train)
    assert places == [(0, "1"), (1, "3")]


def test_format_that_was_found_is_shown_and_can_be_set(load):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "messages": [said("user", "a"), said("assistant", "b")]}]
    assert [str(format) for format in load(rows).formats] == ["preference, standard, explicit prompt"]
    assert [str(format) for format in load(rows, format="language-modeling").formats] == [
        "language-modeling, conversational"
    ]


def test_columns_of_other_names_are_told(load, tokenizer):
    examples = load([{"question": "q", "answer": "a"}], columns={"prompt": "question", "completion": "answer"})
    assert texts(tokenizer, examples) == ["qa<|im_end|>"]
    with pytest.raises(DataError, match=r":1: no column 'questoin' \(columns: question\); mend data\.columns"):
        load([{"question": "q"}], columns={"prompt": "questoin"})


def test_strings_become_chat_where_that_is_asked_for(load, tokenizer):
    strings, chat = [{"prompt": "q", "completion": "a"}], [{"messages": [said("user", "q"), said("assistant", "a")]}]
    assert texts(tokenizer, load(strings, strings_as_chat=True)) == texts(tokenizer, load(chat))
    with pytest.raises(DataError, match=r":1: has no prompt of its own"):
        load([{"text": "a"}], strings_as_chat=True)


def test_last_turn_alone_can_be_learned(load, tokenizer):
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    (row,) = load([{"messages": messages}], learn="last").train
    assert (tokenizer.decode(row.responses[0]), row.masks) == ("d<|im_end|>", None)
    (row,) = load([{"messages": messages}]).train
    assert tokenizer.decode(row.responses[0]).startswith("b<|im_end|>\n<|im_start|>user")
    assert row.masks is not None


def test_chat_template_from_a_file_takes_the_place_of_the_tokenizers(load, tokenizer, tmp_path: Path):
    file = tmp_path / "loud.jinja"
    file.write_text(CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|>!"))
    rows = [{"messages": [said("user", "a"), said("assistant", "b")]}]
    (text,) = texts(tokenizer, load(rows, chat_template=str(file)))
    assert text == "<|im_start|>!user\na<|im_end|>\n<|im_start|>!assistant\nb<|im_end|>"
    with pytest.raises(DataError, match=r"data\.chat_template .*nowhere\.jinja: cannot be read \(No such file"):
        load(rows, chat_template=str(tmp_path / "nowhere.jinja"))


# Too long


def test_long_row_stops_is_skipped_or_is_cut(load, tokenizer):
    rows = [{"prompt": "abcd", "completion": "e" * 20}, {"prompt": "ab", "completion": "c"}]
    with pytest.raises(DataError, match=r":1: prompt and response have 25 tokens, data\.max_tokens is 10; .*on_long"):
        load(rows, max_tokens=10)
    skipped = load(rows, max_tokens=10, on_long="skip")
    assert (texts(tokenizer, skipped), skipped.counts["too long"]) == (["abc<|im_end|>"], 1)
    assert [":1: prompt and response have 25 tokens" in reason for reason in skipped.skipped] == [True]
    cut = load(rows, max_tokens=10, on_long="truncate")
    assert texts(tokenizer, cut) == ["abcdeeeeee", "abc<|im_end|>"]
    assert (cut.counts["truncated"], cut.counts["too long"]) == (1, 0)


def test_row_of_which_nothing_to_learn_would_remain_is_not_cut_but_too_long(load):
    rows = [
        {"prompt": "a" * 12, "completion": "b"},
        {"prompt": "ok", "completion": "b"},
    ]
    assert load(rows, max_tokens=10, on_long="truncate").counts["too long"] == 1
    pair = {"prompt": "abcd", "chosen": "e" * 20 + "x" * 2, "rejected": "e" * 20 + "y"}
    with pytest.raises(DataError, match=r"none of 1 rows is usable; the first: .*have 27 tokens"):
        load([pair], max_tokens=10, on_long="truncate")
    with pytest.raises(DataError, match=r"none of 1 rows is usable"):
        load([{"prompt": "a", "completions": ["b" * 20], "labels": [1]}], max_tokens=10, on_long="truncate")


def test_masks_and_step_labels_are_cut_with_their_tokens(load):
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c" * 50), said("assistant", "d")]
    (row,) = load([{"messages": messages}], max_tokens=60, on_long="truncate").train
    assert row.masks is not None
    assert len(row.responses[0]) == len(row.masks[0]) == 60 - len(row.prompt_ids)
    (row,) = load(
        [{"prompt": "a", "completions": ["b", "c" * 50], "labels": [1, 0]}], max_tokens=20, on_long="truncate"
    ).train
    assert row.step_labels is not None
    assert [label for label in row.step_labels[0] if label == label] == [1.0]
    assert len(row.step_labels[0]) == len(row.responses[0]) == 19


# Split, duplicates, order


@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_stands_on_both_sides_of_the_split_even_where_it_has_several_rows(load, seed):
    rows = [{"prompt": f"q{i % 10}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(40)]
    examples = load(rows, num_heldout=6, seed=seed)
    train, heldout = ({tuple(row.prompt_ids) for row in part} for part in (examples.train, examples.heldout))
    assert not train & heldout
    assert len(examples.heldout) == 6
    assert len(examples.train) + len(examples.heldout) + examples.counts["prompt held out"] == 40
    assert examples.counts["prompt held out"] == 2, "4 rows of one held-out prompt, and 2 of another"


def test_conversations_with_one_question_and_conditioned_prompts_stay_on_one_side(load):
    later = [said("user", "and?"), said("assistant", "b")]
    rows = [
        {"messages": [said("user", f"q{i % 5}"), said("assistant", f"a{i}"), *later], "score": i} for i in range(20)
    ]
    examples = load(rows, num_heldout=2, condition_on=["score"])
    held = {row.index % 5 for row in examples.heldout}
    assert len(held) == 1
    assert held.isdisjoint(row.index % 5 for row in examples.train)
    assert len(examples.train) == 16


def test_split_does_not_depend_on_the_order_of_the_rows(load):
    forward, backward = load(pairs(30), num_heldout=5), load(pairs(30)[::-1], num_heldout=5)
    assert [row.responses for row in forward.heldout] == [row.responses for row in backward.heldout]
    other = load(pairs(30), num_heldout=5, seed=1)
    assert [row.responses for row in other.heldout] == [row.responses for row in forward.heldout]
    assert [other.row_at(k).index for k in range(25)] != [forward.row_at(k).index for k in range(25)]


def test_rows_that_are_repeated_are_learned_as_often_and_held_out_once(load):
    examples = load(pairs(10) + pairs(10), num_heldout=3)
    assert (len(examples), len({str(row.responses) for row in examples.train})) == (14, 7)
    assert len({str(row.responses) for row in examples.heldout}) == 3
    assert examples.counts["repeated"] == 10
    assert list(examples.told()) == [
        "examples: 14 to train on, 3 held out (prompt-completion, standard)",
        "examples: left out 3 prompt held out",
        "examples: 10 rows are others once more, and are learned once more",
        BARE,
    ]


def test_split_order_and_digest_are_the_data_s_whatever_the_template(load, tmp_path):
    (tmp_path / "dated.jinja").write_text("today\n" + CHAT_TEMPLATE)
    rows = [{"prompt": [said("user", f"q{i}")], "completion": [said("assistant", "a")]} for i in range(20)]
    sets = [load(rows, num_heldout=4, **each) for each in ({}, {"chat_template": str(tmp_path / "dated.jinja")})]
    assert sets[0].train[0].prompt_ids != sets[1].train[0].prompt_ids
    places = [[row.place for row in each.train + each.heldout] for each in sets]
    assert places[0] == places[1]
    assert sets[0].digest == sets[1].digest == load(rows[::-1]).digest
    assert len({sets[0].digest, load(rows[1:]).digest, load([*rows[1:], rows[1]]).digest}) == 3


def test_good_responses_alone_are_demonstrations(load):
    rows = load([{"prompt": "a", "chosen": "b", "rejected": "c"}], only_good=True).train
    assert [(row.kind, len(row.responses), row.labels) for row in rows] == [("prompt-completion", 1, [])]
    labelled = load([{"prompt": "a", "completion": text, "label": text == "b"} for text in "bcd"], only_good=True)
    assert (len(labelled), labelled.counts["labelled false"]) == (1, 2)
    assert labelled.train[0].place.endswith(":1")


def test_tools_beside_strings_are_refused(load):
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    with pytest.raises(DataError, match="has tools, which only a conversation has a place for"):
        load([{"prompt": "a", "completion": "b", "tools": [tool]}])


@pytest.mark.parametrize("wrong", [False, 0, "False"])
def test_demonstrations_that_their_rows_call_wrong_are_told_of(load, wrong):
    correct = {"b": True, "c": wrong, "d": wrong}
    rows = [{"prompt": "a", "completion": text, "is_correct": correct[text], "is_streamed": False} for text in "bcd"]
    *_, line = load(rows).told()
    assert line.startswith("warning: rows that say is_correct=false (2 of them) are learned like the others")
    assert "data.columns.label=is_correct with data.only_good=true" in line
    good = load(rows, columns={"label": "is_correct"}, only_good=True)
    assert len(good) == 1
    assert not any("is_correct" in line for line in good.told())


def test_every_epoch_has_each_row_once_and_any_position_can_be_asked_first(load):
    walked, jumped = load(pairs(17)), load(pairs(17))
    rows = [walked.row_at(position) for position in range(68)]
    epochs = [[row.index for row in rows[start : start + 17]] for start in range(0, 68, 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [jumped.row_at(position).index for position in (67, 3, 40)] == [
        rows[67].index,
        rows[3].index,
        rows[40].index,
    ]


def test_num_train_takes_a_part_and_refuses_more_than_there_is(load):
    assert len(load(pairs(20), num_train=7)) == 7
    with pytest.raises(DataError, match=r"lower num_train to 15"):
        load(pairs(20), num_heldout=5, num_train=16)


# Bad rows


def test_bad_row_stops_with_its_line_or_is_counted(load):
    rows = [{"prompt": "a", "completion": "b"}, "{oops", {"prompt": "a"}, {"prompt": 3, "completion": "b"}]
    with pytest.raises(DataError, match=r"data\.jsonl:2: is not JSON"):
        load(rows)
    examples = load(rows, on_bad="skip")
    assert (len(examples), examples.counts["bad"]) == (1, 3)
    assert [reason.split(":")[1] for reason in examples.skipped] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([], {}, "holds no rows"),
        (pairs(5), {"num_heldout": 5}, "leaves none to train on"),
        (pairs(5), {"num_heldout": 9}, "lower data.num_heldout below 5"),
        ([{"prompt": "a"}], {}, ":1: is prompt-only, standard: it has no response to learn"),
        ([{"a": 1}], {"on_bad": "skip"}, "none of 1 rows is usable; the first:"),
        ([{"prompt": "a", "completion": "<|im_end|>"}], {"num_heldout": 1}, "leaves none to train on"),
    ],
)
def test_data_that_leave_nothing_to_train_on_are_refused(load, rows, settings, said):
    with pytest.raises(DataError) as caught:
        load(rows, **settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pair_that_differs_only_in_what_the_tokenizer_drops_is_bad(load):
    with pytest.raises(DataError, match=r":1: chosen and rejected are the same tokens"):
        load([{"prompt": "a", "chosen": "b", "rejected": "b<|im_end|>"}])


def test_source_that_is_not_there_is_refused(tokenizer):
    with pytest.raises(DataError, match="no such file"):
        load_examples(ExampleData(source="/no/such/file.jsonl"), tokenizer)


# Conditions


def test_score_is_written_into_the_prompt_as_a_level_of_its_range(load, tokenizer):
    rows = [{"prompt": f"q{i}", "completion": "a", "help": 1 + i, "wit": -i} for i in range(5)]
    examples = load(rows, condition_on=["help", "wit"])
    assert examples.ranges == {"help": (1.0, 5.0), "wit": (-4.0, 0.0)}
    assert [text.splitlines()[0] for text in texts(tokenizer, examples)] == [
        "help: 0, wit: 9", "help: 2, wit: 7", "help: 5, wit: 5", "help: 7, wit: 2", "help: 9, wit: 0",
    ]  # fmt: skip


def test_condition_of_a_conversation_stands_in_its_system_message(load, tokenizer):
    talk = [said("user", "q"), said("assistant", "a")]
    rows = [
        {"messages": talk, "score": 0},
        {"messages": [said("system", "Be kind."), *talk], "score": 1},
    ]
    low, high = texts(tokenizer, load(rows, condition_on=["score"], condition_levels=5))
    assert low.startswith("<|im_start|>system\nscore: 0<|im_end|>\n<|im_start|>user\nq")
    assert high.startswith("<|im_start|>system\nBe kind.\nscore: 4<|im_end|>\n<|im_start|>user\nq")


def test_condition_of_a_text_is_its_prompt_and_not_learned(load, tokenizer):
    examples = load([{"text": "abc", "score": i} for i in range(2)], condition_on=["score"])
    assert [tokenizer.decode(row.prompt_ids) for row in sorted(examples.train, key=lambda row: row.index)] == [
        "score: 0\n",
        "score: 9\n",
    ]
    assert {tokenizer.decode(row.responses[0]) for row in examples.train} == {"abc<|im_end|>"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "completion": "b"}], ":1: column 'score' is missing"),
        ([{"prompt": "a", "completion": "b", "score": "high"}], ":1: column 'score' holds a string"),
        ([{"prompt": str(i), "completion": "b", "score": 3} for i in range(2)], "is 3 in all 2 rows"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}], "this is preference data"),
    ],
)
def test_condition_that_cannot_be_written_is_refused(load, rows, said):
    with pytest.raises(DataError) as caught:
        load(rows, condition_on=["score"])
    assert said in str(caught.value)


# Several sources


def test_sources_are_mixed_by_weight_and_split_together(jsonl, tokenizer):
    mix = [
        ExampleSource(source=jsonl(pairs(40), "a.jsonl"), weight=3),
        ExampleSource(
            source=jsonl([{"messages": [said("user", str(i)), said("assistant", "b")]} for i in range(20)], "b.jsonl")
        ),
    ]
    examples = load_examples(ExampleData(mix=mix, num_heldout=6), tokenizer)
    assert len(examples) == 54
    assert [format.kind for format in examples.formats] == ["prompt-completion", "language-modeling"]
    taken = Counter(Path(examples.row_at(position).place.split(":")[0]).name for position in range(2000))
    assert taken == {"a.jsonl": 1500, "b.jsonl": 500}


def test_row_of_two_sources_is_learned_from_both(jsonl, tokenizer):
    mix = [ExampleSource(source=jsonl(pairs(10), "a.jsonl")), ExampleSource(source=jsonl(pairs(12), "b.jsonl"))]
    examples = load_examples(ExampleData(mix=mix, num_heldout=0), tokenizer)
    assert (len(examples), examples.counts["repeated"]) == (22, 10)
    mix[1] = ExampleSource(source=jsonl(pairs(2)[1:] * 2, "b.jsonl"))
    with pytest.raises(DataError, match=r"data\.mix\[1\]: has no rows left"):
        load_examples(ExampleData(mix=mix, num_heldout=9), tokenizer)


def test_mix_and_a_source_of_its_own_are_refused():
    with pytest.raises(ConfigError, match=r"data\.mix"):
        ExampleData(source="a.jsonl", mix=[ExampleSource(source="b.jsonl")])


# Made on the spot


@pytest.mark.slow  # the first use imports reasoning-gym
def test_made_examples_are_of_the_kind_that_is_named(tokenizer):
    settings: dict[str, Any] = {"num_train": 20, "num_heldout": 4}
    demonstrations = load_examples(ExampleData(**settings), tokenizer)
    assert all(tokenizer.decode(row.responses[0]).startswith("The answer is ") for row in demonstrations.train)
    assert (len(demonstrations), len(demonstrations.heldout)) == (20, 4)
    for row in load_examples(ExampleData(source="reasoning-gym:preference", **settings), tokenizer).train:
        assert row.responses[0] != row.responses[1]
    labelled = load_examples(ExampleData(source="reasoning-gym:unpaired-preference", **settings), tokenizer)
    assert {tuple(row.labels) for row in labelled.train} == {(0.0,), (1.0,)}
    with pytest.raises(DataError, match=r"no 'poems' can be made; one of prompt-completion, preference"):
        load_examples(ExampleData(source="reasoning-gym:poems"), tokenizer)


def test_settings_can_be_given_on_the_command_line():
    data = resolve(ExampleData, overrides=["format=preference", "condition_on=[score]", "columns={prompt: question}"])
    assert (data.format, data.condition_on, data.columns) == ("preference", ["score"], {"prompt": "question"})
    with pytest.raises(ConfigError, match=r"format: expected one of preference, .* got 'prefrence'"):
        resolve(ExampleData, overrides=["format=prefrence"])


@pytest.mark.slow  # SmolLM2's tokenizer and template, from the bundled model
def test_smollm2_is_masked_exactly(jsonl):
    from flowrl.data.models import DEFAULT_MODEL, prepare_model
    from flowrl.data.prompts import load_tokenizer

    tokenizer = load_tokenizer(prepare_model(DEFAULT_MODEL))
    messages = [
        said("user", "Hi  there "), said("assistant", "\n Hello!\n"), said("user", "1+1?"), said("assistant", "  2"),
    ]  # fmt: skip
    source = jsonl([{"messages": messages}, {"messages": [said("system", "Be brief."), *messages]}])
    examples = load_examples(ExampleData(source=source, num_heldout=0), tokenizer)
    assert examples.counts["bad"] == 0
    for row in examples.train:
        assert row.masks is not None
        learned = [token for token, keep in zip(row.responses[0], row.masks[0], strict=True) if keep]
        assert tokenizer.decode(learned) == "\n Hello!\n<|im_end|>  2<|im_end|>"
        ask = [*([said("system", "Be brief.")] if row.index else []), messages[0]]
        assert row.prompt_ids == tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(ask + messages[1:], tokenize=False)
        assert tokenizer.decode([*row.prompt_ids, *row.responses[0]]) == str(whole).rstrip("\n")
