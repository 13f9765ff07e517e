from __future__ import annotations

from typing import Any

import pytest

from flowrl.data.examples import ExampleRow
from flowrl.data.inspection import check_data, check_settings, histogram, shown
from flowrl.errors import ConfigError, DataError

NAN = float("nan")


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


TALK = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]


class Checker:
    """Checks rows and keeps what was said."""

    def __init__(self, jsonl: Any, tokenizer: Any) -> None:
        self._jsonl = jsonl
        self._tokenizer = tokenizer
        self.said: list[str] = []

    @property
    def text(self) -> str:
        return "\n".join(self.said)

    def __call__(self, rows: list[Any], *overrides: str, format: str | None = None, colour: bool = False) -> str:
        self.said = []
        settings = check_settings(self._jsonl(rows), format=format, overrides=overrides)
        check_data(settings, self._tokenizer, self.said.append, colour=colour)
        return self.text


@pytest.fixture
def check(jsonl, tokenizer) -> Checker:
    return Checker(jsonl, tokenizer)


def test_report_has_format_counts_lengths_and_an_example(check):
    report = check([{"messages": TALK}, {"messages": TALK}, {"messages": TALK[:2]}])
    assert "format     language-modeling, conversational (detected): " in report
    assert "rows       3 to train on, 0 held out" in report
    assert "left out   none" in report
    assert "repeated   1 rows are others once more, and are learned once more" in report
    assert "tokens     least 22, median 45, greatest 45 (prompt and the longest response)" in report
    assert "ends       <|im_end|> (the chat template's)" in report
    assert "were cut" not in report
    assert "data.jsonl:1, with what is learned between ⟦ and ⟧" in report
    assert report.endswith(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧"
    )


def test_sharegpt_is_detected(check):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    report = check([{"conversations": turns, "id": 1}, {"conversations": turns * 2, "id": 2}])
    assert "format     language-modeling, conversational (detected): " in report
    assert "rows       2 to train on, 0 held out" in report


def test_report_counts_what_is_learned_without_an_end(check):
    rows = [{"prompt": "a", "completion": "b", "finish": finish} for finish in ("stop", "length", None)]
    assert "           1 of 3 responses were cut, and are learned without an end" in check(rows)


def test_what_is_learned_is_coloured_on_a_terminal_only(check):
    report = check([{"messages": TALK}], colour=True)
    assert "in green" in report
    assert "\x1b[32mb<|im_end|>\x1b[0m" in report
    assert "\x1b" not in check([{"messages": TALK}])


def test_control_characters_in_data_are_written_out(check):
    report = check([{"prompt": "a\x1b[2J", "completion": "b\r\x07"}])
    assert "a\\x1b[2J⟦b\\r\\x07<|im_end|>⟧" in report


def test_every_row_is_looked_at_and_then_it_ends_as_a_run_would(check):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": "a", "completion": "c" * 50}, "{"]
    with pytest.raises(
        DataError, match=r"3 of its rows would stop a run; the first: .*:2: is prompt-only, standard, the rows"
    ):
        check(rows, "data.max_tokens=20")
    assert "left out   2 bad, 1 longer than max_tokens=20" in check.text
    for line in (":2: is prompt-only", ":3: prompt and response have 52 tokens", ":4: is not JSON"):
        assert line in check.text
    assert "1 to train on" in check(rows, "data.max_tokens=20", "data.on_bad=skip", "data.on_long=skip")
    report = check(rows, "data.max_tokens=20", "data.on_bad=skip", "data.on_long=truncate")
    assert "cut        1 to max_tokens=20" in report


def test_a_first_row_that_lacks_what_others_have_does_not_make_prompts_of_all(check):
    with pytest.raises(DataError, match=":1: is prompt-only, standard: it has no response to learn"):
        check([{"prompt": "a", "chosen": "b", "rejected": None}, {"prompt": "a", "chosen": "b", "rejected": "c"}])


@pytest.mark.parametrize("other", [{"prompt": "a"}, {"prompt": "a", "completion": "c" * 50}])
def test_one_kind_of_row_that_stops_a_run_is_enough(check, other):
    with pytest.raises(DataError, match="1 of its rows would stop a run"):
        check([{"prompt": "a", "completion": "b"}, other], "data.max_tokens=20")


def test_only_the_first_reasons_are_shown(check):
    rows = [{"prompt": "a", "completion": "b"}, *[{"prompt": str(i)} for i in range(10)]]
    report = check(rows, "data.on_bad=skip")
    assert report.count("is prompt-only") == 3
    assert "and 7 more" in report


def test_format_that_was_asked_for_is_said_so(check):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}]
    assert "preference, standard, explicit prompt (detected)" in check(rows)
    assert "prompt-completion, standard (as set)" in check(rows, format="prompt-completion")


def test_held_out_and_conditions_are_counted(check):
    rows = [{"prompt": f"q{i % 8}", "completion": f"{i}", "score": i} for i in range(16)]
    report = check(rows, "data.num_heldout=2", "data.condition_on=[score]")
    assert "14 to train on, 2 held out" in report
    assert "condition  score from 0 to 15 as 0 to 9" in report


def test_prompts_without_responses_are_reported_as_prompts(check):
    report = check([{"prompt": [said("user", "abc")]}, {"prompt": [said("user", "abc")]}])
    assert "format     prompts in the column 'prompt' (detected): " in report
    assert "rows       2 prompts for online training, 0 held out" in report
    assert "repeated   1 rows are others once more" in report
    assert (
        "data.jsonl:1, with nothing to learn in it\n<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n" in report
    )
    with pytest.raises(DataError, match=r"1 of its rows would stop a run; the first: .*:2: "):
        check([{"prompt": "abc"}, {"prompt": 1}])


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": [said("user", "a?")]}, ["--set reward.function=my_rewards.py:score"]),
        ({"conversations": [{"from": "human", "value": "a?"}]}, ["--set reward.function=my_rewards.py:score"]),
        ({"question": "a?", "answer": "b"}, ["--set reward.function=flowrl.rewards.verify:exact_answer"]),
        ({"problem": "a?", "solution": "b"}, ["--set data.columns.answer=solution", "verify:exact_answer"]),
        (
            {"instruction": "a?", "input": "b" * 300},
            ["--set data.max_prompt_tokens=323", "generator.max_model_len=579"],
        ),
    ],
)
def test_prompts_of_any_shape_are_told_with_what_a_run_needs(check, row, wanted):
    report = check([{**row, "level": f"Level {i % 2}", "id": i} for i in range(4)])
    assert "4 prompts for online training" in report
    assert "level      Level 0 2, Level 1 2" in report
    assert "<|im_start|>user\na?" in report
    run = report.splitlines()[-1]
    assert run.startswith("run        flowrl run graphs/group_async.py --set data.source=")
    assert "--set data.num_heldout=1" in run
    assert [part for part in wanted if part not in run] == [], run


def test_prompts_of_several_sources_are_checked_by_the_settings_of_prompts(jsonl, tokenizer):
    sources = [
        jsonl([{column: f"{column} {i}"} for i in range(3)], f"{column}.jsonl") for column in ("question", "problem")
    ]
    overrides = [f"data.mix=[{{source: {sources[0]}, weight: 3}}, {{source: {sources[1]}}}]", "data.num_heldout=2"]
    lines: list[str] = []
    check_data(check_settings(".", format=None, overrides=overrides), tokenizer, lines.append, colour=False)
    assert f"format     prompts in the column 'question' (detected): {sources[0]}, weight 3" in lines
    assert "rows       4 prompts for online training, 2 held out" in lines
    settings = check_settings(sources[0], format=None, overrides=["data.prompt_column=question"])
    check_data(settings, tokenizer, lines.append, colour=False)
    assert f"format     prompts in the column 'question' (as set): {sources[0]}" in lines


def test_pair_is_shown_with_both_responses_and_its_margin(check):
    report = check([{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}])
    assert report.endswith("\na\nchosen: ⟦b<|im_end|>⟧\nrejected: ⟦c<|im_end|>⟧\nmargin: 2")


def test_labels_of_responses_and_steps_are_shown(check, tokenizer):
    assert check([{"prompt": "a", "completion": "b", "label": False}]).endswith("a⟦b<|im_end|>⟧\nlabel: 0")
    row = ExampleRow(
        prompt_ids=tokenizer.encode("q"), responses=[tokenizer.encode("abcd")], step_labels=[[NAN, 1.0, NAN, 0.5]],
        index=0, place="here:1",
    )  # fmt: skip
    assert shown(row, tokenizer, colour=False) == "q⟦ab⟧<1>⟦cd⟧<0.5>"


@pytest.mark.slow  # another tokenizer
def test_token_at_a_boundary_is_reported(jsonl):
    from tests.unit.data.test_rendering import merging_tokenizer

    check = Checker(jsonl, merging_tokenizer([("Ċ", "b")]))
    assert "boundaries 1 with prompt and turns tokenized one by one" in check([{"messages": TALK}])


@pytest.mark.parametrize("lengths", [[1], [0, 5, 6, 6], list(range(1000)), [1, 10_000], [512, 513, 514]])
def test_histogram_counts_every_length_in_few_lines(lengths):
    lines = list(histogram(lengths))
    assert len(lines) <= 9
    total = 0
    for line in lines:
        low, high = (int(part) for part in line[:17].split("to"))
        count = int(line[17:26])
        assert count == sum(low <= length <= high for length in lengths)
        total += count
    assert total == len(lengths)


def test_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'max_tokens'"):
        check_settings("a.jsonl", format=None, overrides=["data.max_token=5"])
