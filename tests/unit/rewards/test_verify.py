from __future__ import annotations

import pytest

from flowrl.rewards.verify import exact_answer, final_answer, reasoning_gym_score


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 12.\n", "12"),
        ("12 apples", "12 apples"),
        (r"So \boxed{3}, no: \boxed{12}.", "12"),
        ("Think. <answer>\n12 </answer> done", "12"),
        ("6 + 6 = 12\n#### 12", "12"),
        ([{"role": "assistant", "content": " 12"}], "12"),
        ("", ""),
    ],
)
def test_final_answer_is_the_marked_one_or_the_whole_text(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (" 1200", "1,200", 1.0),
        ("$1,200.", 1200, 1.0),
        ("+5", "5", 1.0),
        ("paris", "Paris", 1.0),
        ("-5", "5", 0.0),
        ("12", "1", 0.0),
        ("The answer is 12.", "12", 0.0),
        ("", "12", 0.0),
    ],
)
def test_exact_answer_is_all_or_nothing(completion, answer, reward):
    assert exact_answer([completion], answer=[answer]) == [reward]


def test_reasoning_gym_gives_full_marks_or_none():
    entry = {"question": "4 * 3", "answer": "12", "metadata": {}}
    completions = [" 12.", "12.0", "13", "The answer is 12", ""]
    given = reasoning_gym_score(completions, task=["products"] * 5, entry=[entry] * 5)
    assert given == [1.0, 1.0, 0.0, 0.0, 0.0]
