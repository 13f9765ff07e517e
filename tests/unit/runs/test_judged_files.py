"""Files of MT-Bench and AlpacaEval in a wrong shape are refused in a line that says where, before anybody is asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import ConfigError, DataError, FlowrlError
from flowrl.rewards.chat import ChatServer
from flowrl.runs.alpaca_eval import Annotator, read_annotations, read_annotator, read_outputs, read_preference
from flowrl.runs.judged import JudgedSettings, Lines
from flowrl.runs.mt_bench import check_lines, read_prompts, read_questions, turns_in, winner_in

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = {"question_id": 1, "category": "writing", "turns": ["a", "b"]}
ANSWER = {"question_id": 1, "choices": [{"index": 0, "turns": ["x", "y"]}]}
SINGLE = {"question_id": 1, "judge": ["gpt-4", "single-v1"], "model": "m", "score": 3, "turn": 1, "user_prompt": "u"}
PAIR = {"question_id": 1, "judge": ["gpt-4", "pair-v2"], "model_1": "a", "model_2": "b", "g1_winner": "tie",
        "g2_winner": "model_1", "turn": 2}  # fmt: skip
OUTPUT = {"instruction": "i", "output": "o", "generator": "g"}
NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
ANNOTATOR = {
    "prompt_template": "x/p.txt", "fn_completion_parser": "logprob_parser",
    "completion_parser_kwargs": {"numerator_token": "m", "denominator_tokens": ["m", "M"]},
}  # fmt: skip


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(error: FlowrlError, said: str) -> None:
    assert said in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**QUESTION, "question_id": None}, "question 2: Expected `int | str`, got `null`"),
        ({**QUESTION, "turns": "a"}, "question 2: Expected `array`, got `str`"),
        ({**QUESTION, "turns": []}, "question 2: has no turns"),
        ({**QUESTION, "question_id": 2, "required_temperature": -1}, "question 2: Expected `float` >= 0.0"),
        (QUESTION, "question 2: has the id 1 of another"),
        (7, "line 2: is not a JSON object"),
    ],
)
def test_a_question_in_another_shape_is_refused_by_its_place(row: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_questions(lines(tmp_path / "question.jsonl", QUESTION, row))
    refused(caught.value, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question_id": [1]}, "Expected `int | str`, got `array`"),
        ({"choices": []}, "Expected `array` of length >= 1"),
        ({"choices": [{}]}, "missing required field `turns`"), ({"choices": [{"turns": [None]}]}, "Expected `str`"),
    ],
)  # fmt: skip
def test_an_answer_in_another_shape_is_refused_by_its_place(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        turns_in([ANSWER, {**ANSWER, **change}], tmp_path / "m.jsonl")
    refused(caught.value, f"answer 2: {said}" if said.startswith("Expected") else said)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**SINGLE, "score": None}, "has no score"),
        ({**SINGLE, "score": "high"}, "Expected `float | null`, got `str`"),
        ({**SINGLE, "turn": None}, "Expected `int`, got `null`"), ({**SINGLE, "user_prompt": []}, "got `array`"),
        ({**SINGLE, "question_id": {}}, "got `object`"), ({**PAIR, "g1_winner": "A"}, "has the winner 'A'"),
        ({**PAIR, "g2_winner": None}, "Expected `str`, got `null`"), ({**SINGLE, "judge": "gpt-4"}, "Expected `array`"),
    ],
)  # fmt: skip
def test_a_verdict_that_is_none_is_refused_and_left_on_the_disk(row: Any, said: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "gpt-4_single.jsonl", SINGLE, PAIR, row)
    before = path.read_bytes()
    with pytest.raises(DataError) as caught:
        check_lines(Lines(path))
    refused(caught.value, said)
    assert "judgment 3" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "template", ["{", "}", "{answer", "{0}", "{answer.x}", "{answer[0]}", "{answer:d}", "{answer_b}", "{question_2}"]
)
def test_a_prompt_with_a_gap_that_nothing_fills_is_refused(template: str, tmp_path: Path) -> None:
    rows = [{"name": name, "type": "single", "system_prompt": "", "prompt_template": "{question_1} {ref_answer_1}",
             "output_format": ""} for name in NAMES]  # fmt: skip
    settings = JudgedSettings(prompts=str(lines(tmp_path / "prompts.jsonl", *rows)), judge=ChatServer(model="gpt-4"))
    assert read_prompts(settings)["math"].name == "single-math-v1"
    lines(tmp_path / "prompts.jsonl", {**rows[0], "prompt_template": template}, *rows[1:])
    with pytest.raises(ConfigError) as caught:
        read_prompts(settings)
    refused(caught.value, "prompt single-v1: has a gap that nothing fills")


@pytest.mark.parametrize(
    ("said", "winner"),
    [("[[A]]", "a"), ("[[A]] first\n[[B]]", "b"), ("[[A]], [[B]] or [[C]]", "error"), ("A", "error"), ("[[c]]", "tie")],
)
def test_a_verdict_of_two_is_taken_from_our_own_prompts_only_where_it_says_one_thing(said: str, winner: str) -> None:
    prompt = read_prompts(JudgedSettings(way="pairs"))["default"]
    assert winner_in(said, prompt, ("a", "b")) == winner


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is empty"), (b"<html>", "is not alpaca_eval's"), (b"[]", "holds no rows"),
        (b"{}", "is not alpaca_eval's"),
        (b'[\n {"instruction": "i"}]', "is not alpaca_eval's"), (b"\xff\xfe[", "is not alpaca_eval's"),
        (b"[" * 5000, "is not alpaca_eval's"), (json.dumps([OUTPUT, OUTPUT]).encode(), "answers an instruction twice"),
    ],
)  # fmt: skip
def test_outputs_in_another_shape_are_refused(body: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "o.json").write_bytes(body)
    with pytest.raises(DataError) as caught:
        read_outputs(tmp_path / "o.json")
    refused(caught.value, said)
    if body:
        with pytest.raises(DataError):
            read_annotations(tmp_path / "o.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"completions_kwargs": [1]}, "completions_kwargs: is a list"),
        ({"completion_parser_kwargs": "x"}, "completion_parser_kwargs: is a str"),
        ({"completion_parser_kwargs": {"denominator_tokens": 7}}, "denominator_tokens: is a int"),
        ({"completion_parser_kwargs": {"outputs_to_match": ["x"]}}, "outputs_to_match: is a list"),
        ({"completion_parser_kwargs": {"outputs_to_match": {"1": "("}}}, "outputs_to_match: "),
        ({"completion_parser_kwargs": {"outputs_to_match": {"a": "b"}}}, "outputs_to_match: "),
        ({"fn_completion_parser": "json_parser"}, "reads verdicts by json_parser"),
        ({"prompt_template": None}, "is not there"),
    ],
)
def test_an_annotator_that_cannot_be_asked_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    text = "<|im_start|>user\n{instruction} {output_1} {output_2}\n<|im_end|>"
    (tmp_path / "x" / "p.txt").write_text(text)
    path = tmp_path / "x" / "configs.yaml"
    settings = JudgedSettings(prompts=str(path), judge=ChatServer(model="m"))
    path.write_text(json.dumps({"x": ANNOTATOR}))
    assert read_annotator(settings).parser == "logprob_parser"
    path.write_text(json.dumps({"x": {**ANNOTATOR, **change}}))
    with pytest.raises(FlowrlError) as caught:
        read_annotator(settings)
    refused(caught.value, said)


@pytest.mark.parametrize(
    ("said", "preference"),
    [("Output (a)", 1.0), ("better: Output (b).", 2.0), ("Output (a)? No: Output (b)", None), ("neither", None),
     ("Output (b), yes, Output (b)", None)],
)  # fmt: skip
def test_a_verdict_by_pattern_is_the_only_one_there_is_as_in_alpaca_eval(said: str, preference: float | None) -> None:
    patterns = {"outputs_to_match": {1: r"Output \(a\)", 2: r"Output \(b\)"}}
    annotator = Annotator(name="x", parser="regex_parser", options=patterns)
    assert read_preference(said, [], annotator) == preference
