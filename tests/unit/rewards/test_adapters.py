"""Reward functions of other libraries behind TRL's signature."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flowrl.errors import ConfigError, RewardError
from flowrl.rewards.adapters import Adapter, adapted
from flowrl.rewards.function import RewardFunction
from tests.support.alone import rollouts

HERE = __name__
CONVERSATION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "count"}]
asked: list[Any] = []


def score(name: str, adapter: Adapter, group: Any = None, label_column: str = "answer") -> list[float]:
    function = RewardFunction(f"{HERE}:{name}", "reward.0", adapter=adapter, label_column=label_column)
    return asyncio.run(function(group or rollouts("one", "three")))


# --- OpenRLHF


def records(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    asked.append((queries, prompts, labels))
    return {"rewards": np.zeros(len(queries)), "scores": None, "extra_logs": {}}


def a_list(queries: list[str], prompts: list[str], labels: list[str], **kwargs: Any) -> list[float]:
    return [float(label in query.removeprefix(prompt)) for query, prompt, label in zip(queries, prompts, labels)]  # noqa: B905


def a_column(queries: list[str], prompts: list[str], labels: list[str]) -> Any:
    return np.array([[float(len(query))] for query in queries])


async def awaited(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"rewards": [2.0] * len(queries)}


def no_rewards(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    return {"scores": [1.0] * len(queries)}


@pytest.mark.parametrize(
    ("name", "scores"), [("a_list", [1.0, 0.0]), ("a_column", [8.0, 10.0]), ("awaited", [2.0, 2.0])]
)
def test_openrlhf_functions_return_lists_arrays_or_dicts(name: str, scores: list[float]):
    assert score(name, "openrlhf") == scores


def test_openrlhf_functions_are_given_prompt_with_response_and_labels():
    assert score("records", "openrlhf") == [0.0, 0.0]
    assert asked.pop() == (["countone", "countthree"], ["count", "count"], ["one", "one"])


def test_openrlhf_prompts_that_are_conversations_are_given_as_text():
    score("records", "openrlhf", rollouts("one", prompt=CONVERSATION), label_column="")
    assert asked.pop() == (["be brief\ncountone"], ["be brief\ncount"], [""])


def test_openrlhf_labels_must_be_in_the_data():
    with pytest.raises(RewardError, match=r"no column 'gold' \(columns: answer\); set label_column"):
        score("a_list", "openrlhf", label_column="gold")


def test_openrlhf_dict_without_rewards_is_refused():
    with pytest.raises(RewardError, match=r"without 'rewards' \(keys: scores\)"):
        score("no_rewards", "openrlhf")


# --- verifiers


def exact(completion: str, answer: str) -> float:
    return float(completion == answer)


async def remembers(completion: str, state: dict[str, Any]) -> float:
    await asyncio.sleep(0)
    state["length"] = len(completion)
    return 0.0


def recalls(state: dict[str, Any]) -> float:
    return float(state["length"])


def everything(**arguments: Any) -> float:
    asked.append(arguments)
    return 0.0


def ranks(completions: list[str], answers: list[str], scale: float) -> list[float]:
    order = sorted(completions, key=len)
    return [scale * order.index(completion) for completion in completions]


def raises(completion: str) -> float:
    raise ArithmeticError(completion)


def never(completion: str) -> float:
    raise AssertionError("a function of weight 0 is not called")


def rubric(*weighted: tuple[Any, float], **objects: Any) -> Any:
    functions, weights = [list(column) for column in zip(*weighted, strict=True)] if weighted else ([], [])
    return SimpleNamespace(funcs=functions, weights=weights, class_objects=objects)


weighted = rubric((exact, 2.0), (recalls, 0.5), (never, 0.0))
weighted.funcs.insert(0, remembers)
weighted.weights.insert(0, 1.0)
inspecting = rubric((everything, 1.0), parser="a parser")
comparing = rubric((exact, 1.0), (ranks, 1.0), scale=10.0)
nested = SimpleNamespace(rubrics=[rubric((exact, 1.0)), rubric((exact, 0.5))])
failing = rubric((raises, 1.0))
empty = rubric()


def load_environment() -> Any:
    return SimpleNamespace(rubric=weighted)


def load_broken() -> Any:
    raise OSError("no data")


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("weighted", [3.5, 2.5]),
        ("load_environment", [3.5, 2.5]),
        ("comparing", [1.0, 10.0]),
        ("nested", [1.5, 0.0]),
    ],
)
def test_a_rubric_scores_the_weighted_sum_of_its_functions(name: str, scores: list[float]):
    assert score(name, "verifiers") == scores


def test_a_rubrics_functions_are_given_sample_columns_and_objects():
    assert score("inspecting", "verifiers", rollouts("one", info={"k": 1}, level=3)) == [0.0]
    given = asked.pop()
    state = given.pop("state")
    assert given == {
        "prompt": "count", "completion": "one", "answer": "one", "info": {"k": 1}, "task": "default", "level": 3,
        "parser": "a parser",
    }  # fmt: skip
    assert (state["completion"], state["answer"]) == ("one", "one")


def test_a_rubrics_error_is_not_a_score():
    with pytest.raises(RewardError, match="raised ArithmeticError: one"):
        score("failing", "verifiers", rollouts("one"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty", "has 0 functions and 0 weights"),
        ("CONVERSATION", "gives a list without funcs and weights"),
        ("load_broken", r"load_broken\(\) raised OSError: no data"),
        ("asked", "gives a list"),
    ],
)
def test_what_is_no_rubric_is_refused(name: str, said: str):
    with pytest.raises(ConfigError, match=said):
        RewardFunction(f"{HERE}:{name}", "reward.function", adapter="verifiers")


def test_a_rubric_is_no_function_for_trl():
    with pytest.raises(ConfigError, match="is a SimpleNamespace, not a function"):
        adapted(weighted, "trl", label_column="", path="x:weighted", where="reward.function")
