"""Intervals of benchmark scores, against published or independently computed figures."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import pytest

from flowrl.errors import DataError
from flowrl.runs.results import Answers, Results, Score, differences, table
from flowrl.telemetry.scores import difference_of, mean_difference, mean_over, score_of, wilson

if TYPE_CHECKING:
    from collections.abc import Sequence


def test_a_share_of_items_has_wilsons_interval():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    right = score_of([1.0] * 20, None, seed=0)
    assert right.method == "wilson"
    assert right.low == pytest.approx(1 / (1 + 1.959963985**2 / 20))  # by hand: 20 of 20 do not prove 100 %
    assert right.high == pytest.approx(1.0)


def test_a_mean_of_other_values_has_students_interval():
    found = score_of([1.0, 2.0, 3.0], None, seed=0)
    assert (found.value, found.method, found.num) == (2.0, "student", 3)
    assert found.high == pytest.approx(2.0 + 4.302653 / math.sqrt(3), abs=0.02)


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def test_what_is_no_mean_is_resampled_and_a_seed_gives_the_same_again():
    draw = random.Random(1)
    values = [draw.gauss(0, 1) for _ in range(60)]
    found = score_of(values, root_mean_square, seed=3)
    assert found == score_of(values, root_mean_square, seed=3)
    assert (found.value, found.method) == (root_mean_square(values), "bootstrap")
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(2 * 60), rel=0.4)  # as of many normal draws


def test_one_item_has_no_interval():
    assert score_of([3.5], None, seed=0).low is None
    assert score_of([3.5], root_mean_square, seed=0).said() == "3.5000 no interval"


def test_a_difference_is_taken_item_by_item():
    ours, theirs = [k + 1.0 for k in range(30)], [float(k) for k in range(30)]
    mean = difference_of(ours, theirs, None, seed=0)
    assert (mean.low, mean.high) == (1.0, 1.0)  # unpaired it would span -3.6 to 5.6
    total = difference_of(ours, theirs, sum, seed=0)
    assert (total.low, total.high) == (30.0, 30.0)


def test_few_items_that_all_went_one_way_do_not_prove_a_difference():
    few, more = (difference_of([1.0] * num, [0.0] * num, None, seed=0) for num in (2, 8))
    assert (few.value, few.high, few.method) == (1.0, 1.0, "agreed")
    assert few.low == pytest.approx(1 - 2 * (1 - math.sqrt(0.025)))  # -0.68: heads came twice
    assert more.low == pytest.approx(0.2611, abs=1e-3)  # the sign test of 8 of 8 has p = 0.0078
    same = difference_of([0.5] * 8, [0.5] * 8, None, seed=0)
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(-0.3694, abs=1e-3), pytest.approx(0.3694, abs=1e-3))


def test_turns_of_one_question_are_no_two_observations():
    assert mean_over([[6.0, 8.0], [3.0, 5.0]], seed=0).num == 2
    assert mean_over([[6.0, 8.0], [3.0]], seed=0).value == pytest.approx(17 / 3)  # of all turns, as FastChat's
    all_won = mean_over([[1.0, 1.0]] * 6, is_share=True, seed=0)
    assert (all_won.low, all_won.high) == (pytest.approx(wilson(6, 6)[0]), 1.0)
    apart = mean_difference([[2.0, 3.0], [5.0]], [[1.0, 1.0], [5.0]], seed=0)
    assert (apart.value, apart.num) == (1.0, 2)


def answers(target: str, values: list[float], digests: list[str]) -> Answers:
    score = Score(task="t", metric="acc", filter="none", bounds=score_of(values, None, seed=0), higher_is_better=True)
    return Answers(target=target, scores=[score], items={"t/acc/none": values}, digests={"t/acc/none": digests})


def test_two_models_are_told_apart_only_beyond_the_interval():
    names = [str(k) for k in range(40)]
    good, same = (
        answers("good", [1.0] * 30 + [0.0] * 10, names),
        answers("same", [0.0] * 2 + [1.0] * 30 + [0.0] * 8, names),
    )
    bad = answers("bad", [0.0] * 40, names)
    for other, said in ((bad, "better"), (same, "not told apart")):
        found = Results(
            benchmark="", seed=0, limit=0, of=good, against=other, differences=differences(good, other, {}, 0)
        )
        assert said in table(found)[-1]
    with pytest.raises(DataError, match="different items"):
        differences(good, answers("other", [0.0] * 40, names[::-1]), {}, 0)
