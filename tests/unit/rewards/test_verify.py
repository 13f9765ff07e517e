from __future__ import annotations

import pytest

from flowrl.rewards.math import math_answer
from flowrl.rewards.verify import exact_answer, final_answer, reasoning_gym_score


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 12.\n", "12"),
        ("12 apples", "12 apples"),
        (r"So \boxed{3}, no: \boxed{12}.", "12"),
        ("Think. <answer>\n12 </answer> done", "12"),
        ("6 + 6 = 12\n#### 12", "12"),
        ("", ""),
    ],
)
def test_final_answer_is_the_marked_one_or_the_whole_text(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize("score", [exact_answer, pytest.param(math_answer, marks=pytest.mark.slow)])
def test_thinking_that_was_not_ended_says_nothing_whoever_began_it(score):
    completions = [r"It is \boxed{12}", r"It is \boxed{12}</think> 12", r"<think>It is \boxed{12}", [{"content": "12"}]]
    assert score(completions, answer=["12"] * 4) == [1.0, 1.0, 0.0, 1.0]
    assert score(completions, answer=["12"] * 4, answer_prefix=["<think>\n"] * 4) == [0.0, 1.0, 0.0, 0.0]
    assert score(completions, answer=["12"] * 4, answer_prefix=["The answer is", None, "", ""]) == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (" 1200", "1,200", 1.0),
        ("$1,200.", 1200, 1.0),
        ("+5", "5", 1.0),
        ("paris", "Paris", 1.0),
        ("-5", "5", 0.0),
        ("12", "1", 0.0),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x^{2}+1}", "x^{2}+1", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", 1.0),
        (r"first \boxed{3}, then \boxed{4}", "3", 0.0),
        (r"\boxed{3} is wrong\n#### 4", "4", 1.0),
        (r"cut in \boxed{4", "4", 0.0),
        (r"\boxed{3} and \boxed{\boxed{4} is cut", "4", 1.0),
        (r"a } here, \{ there, \\boxed{4}", "4", 1.0),
        ("<answer>3</answer> or <answer>4", "3", 1.0),
        ("#### 7", 7.0, 1.0),
        ("#### 7", "7.0", 1.0),
        ("#### 1,000", "1000", 1.0),
        ("1,2", "12", 0.0),
        ("1/2", "0.5", 1.0),
        (r"\dfrac{2}{4}", "1/2", 1.0),
        ("0.0000001", 1e-7, 1.0),
        ("(A)", "A", 1.0),
        ("A.", "(A)", 1.0),
        (r"\boxed{\text{A}}", "a", 1.0),
        ("B", "A", 0.0),
        (r"\boxed{12\text{ km}}", "12", 1.0),
        ("#### 12 apples", 12, 1.0),
        ("#### 12 apples", "12 pears", 0.0),
        ("12 apples", "12", 0.0),
        (r"\boxed{90^\circ}", "90", 1.0),
        ("yes", ["yes", "indeed"], 1.0),
        ("#### 72", {"ground_truth": "72", "style": "rule"}, 1.0),
        ("\u22127", "-7", 1.0),  # the minus sign that models write
        ("\\boxed{7}", "\uff17", 1.0),
        ("10\u00b2", "102", 0.0),
        ("<think>8, no</think>\n\n7", "7", 1.0),
        (r"<think>\boxed{7}?</think>\boxed{8}", "7", 0.0),
        (r"it is \boxed{7}.[/THINK]8", "8", 1.0),
        (r"<think>perhaps \boxed{7}", "7", 0.0),  # cut before it said anything
        ("The answer is 12.", "12", 0.0),
        ("", "12", 0.0),
        ("1 2", "12", 0.0),
        ("1, 200", "1200", 0.0),
        ("11/2", "1 1/2", 0.0),
        ("3/2", "1 1/2", 1.0),
        (r"5\frac{1}{2}", "5.5", 1.0),
        ("1 3/2", "2.5", 0.0),
        (r"\frac12", "1/2", 1.0),
        (r"\frac{-1}{2}", "-0.5", 1.0),
        (r"\boxed{1\,000{,}000}", "1000000", 1.0),
        ("1 234", "1234", 1.0),
        ("12 34", "1234", 0.0),
        (r"so \boxed 5", "5", 1.0),
        (r"$\boxed5$", "5", 1.0),
        (r"\boxed{(1,2)}", "(1, 2)", 1.0),
        ("12:30", "12:30", 1.0),
        (r"\boxed{12\%}", "12%", 1.0),
        (r"\boxed{{7}}", "7.0", 1.0),
        (r"\boxed{\{a, b\}}", "{a,b}", 1.0),
        (r"\(7\)", "7", 1.0),
        (r"\[ 7 \]", "7", 1.0),
        ("<|channel|>analysis<|message|>8<|end|><|start|>assistant<|channel|>final<|message|>7", "7", 1.0),
        ("<|channel>thought\n7", "7", 0.0),
    ],
)
def test_exact_answer_is_all_or_nothing(completion, answer, reward):
    assert exact_answer([completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    "said", ["12x", "12i", "12 x", "12pi", "12 million", "12k", "2xy", "12 not", "12 maybe", "12m"]
)
def test_what_is_no_unit_makes_another_answer(said: str):
    assert exact_answer([rf"\boxed{{{said}}}", f"#### {said}"], answer=["12", "12"]) == [0.0, 0.0]


@pytest.mark.parametrize("said", ["12 apples", "12cm", "12 km", r"12\text{ dollars}", r"12\%", "12°", "12 square",
                                  r"12\text{ m}", r"12\,\mathrm{s}"])  # fmt: skip
def test_a_unit_does_not(said: str):
    assert exact_answer([rf"\boxed{{{said}}}"], answer=["12"]) == [1.0]


@pytest.mark.parametrize("digits", [29, 3999, 4400])
def test_a_number_of_any_length_is_exact(digits: int):
    right = "1" * digits
    assert exact_answer([right, right[:-1] + "2"], answer=[right] * 2) == [1.0, 0.0]
    assert exact_answer([f"{right}/3", f"{right}.5"], answer=["1"] * 2) == [0.0, 0.0]


@pytest.mark.parametrize("mark", ["\\boxed{", "<answer>", "####", "{", "\\boxed ", "<answer></answer>"])
def test_a_mark_said_over_and_over_is_read_in_one_pass(mark: str):
    completion = 5_000 * mark + "7"
    assert exact_answer([completion, completion + r" \boxed{7}"], answer=["7"] * 2)[1] == 1.0


def test_an_answer_with_several_ways_to_write_it_is_right_by_each():
    squad, trivia = {"text": ["Paris", "The city"], "answer_start": [0, 7]}, {"value": "Paris", "aliases": ["Lutetia"]}
    assert exact_answer(["the city", "Lutetia", "Rome"], answer=[squad, trivia, trivia]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("answer", [None, "", " ", float("nan"), {"says": "72"}, [], [1, 2], {"answer": None}])
def test_what_is_no_answer_in_the_data_is_an_error(answer):
    with pytest.raises(ValueError, match="answer"):
        exact_answer(["72"], answer=[answer])


def test_reasoning_gym_gives_full_marks_or_none():
    entry = {"question": "4 * 3", "answer": "12", "metadata": {}}
    completions = [" 12.", "12.0", "13", "The answer is 12", ""]
    given = reasoning_gym_score(completions, task=["products"] * 5, entry=[entry] * 5)
    assert given == [1.0, 1.0, 0.0, 0.0, 0.0]
