"""Reward functions of other libraries behind TRL's signature."""

from __future__ import annotations

import asyncio
import functools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flowrl.errors import ConfigError, RewardError
from flowrl.rewards.function import RewardFunction
from flowrl.rewards.signatures import TO_COPY, Adapter, style_of
from tests.support.one_stage import rollouts

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


@pytest.mark.parametrize("adapter", ["trl", "auto"])
def test_a_rubric_is_no_function_for_the_others(adapter: Adapter):
    with pytest.raises(ConfigError, match="is a SimpleNamespace, not a function; set adapter=verifiers"):
        RewardFunction(f"{HERE}:weighted", "reward.function", adapter=adapter)


# --- which signature it is


def trl(completions: list[Any], answer: list[str]) -> list[float | None]:
    asked.append((completions, answer))
    return [None, 2.0]


def one(completion: str, answer: str, **columns: Any) -> float | None:
    asked.append((completion, answer, columns))
    return len(completion) if completion == answer else None


async def one_later(completion: str) -> float:
    await asyncio.sleep(0)
    return float(len(completion))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
    asked.append((data_source, solution_str, ground_truth, extra_info))
    return {"score": solution_str == ground_truth, "acc": 1.0}


def compute_score_plainly(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> bool:
    return solution_str == ground_truth


def compute_scores(data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any) -> Any:
    return [{"score": len(solution)} for solution in solution_strs]


def without_labels(queries: list[str], prompts: list[str]) -> list[int]:
    return [len(query) for query in queries]


def only_kwargs(**kwargs: Any) -> list[int]:
    return [len(kwargs["completions"])] * 2


def undecorated(*args: Any, **kwargs: Any) -> Any:
    return only_kwargs(*args, **kwargs)


def gives_a_coroutine(completion: str) -> Any:
    return one_later(completion)


partly = functools.partial(one_later)


def of_columns(completions: list[str], data_source: list[str], ground_truths: Any = (), **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("trl", [0.0, 2.0]),
        ("one", [3.0, 0.0]),
        ("one_later", [3.0, 5.0]),
        ("partly", [3.0, 5.0]),
        ("gives_a_coroutine", [3.0, 5.0]),
        ("compute_score", [1.0, 0.0]),
        ("compute_score_plainly", [1.0, 0.0]),
        ("compute_scores", [3.0, 5.0]),
        ("a_list", [1.0, 0.0]),
        ("without_labels", [8.0, 10.0]),
        ("only_kwargs", [2.0, 2.0]),
        ("undecorated", [2.0, 2.0]),
    ],
)
def test_a_signature_is_known_by_its_parameters(name: str, scores: list[float]):
    assert score(name, "auto") == scores
    with asyncio.Runner() as runner:
        assert RewardFunction(f"{HERE}:{name}", "worker").call_here(rollouts("one", "three"), runner) == scores


def test_columns_that_bear_verls_names_do_not_make_a_function_verls():
    assert score("of_columns", "auto", rollouts("one", "three", data_source="gsm8k", ground_truths="1")) == [3.0, 5.0]


def weighed(solution_str: str, ground_truth: str, extra_info: dict[str, Any], score: float = 1.0) -> float:
    return score + extra_info.get("bonus", 0.0)


def test_a_further_default_of_verls_function_is_kept_and_extra_info_is_an_object():
    assert score("weighed", "auto", rollouts("one", "three", ground_truth="1", score=9.0)) == [1.0, 1.0]


def test_one_sample_is_given_its_text_and_its_rows_columns():
    asked.clear()
    score("one", "auto", rollouts("one", prompt=CONVERSATION, level=3))
    assert asked == [("one", "one", {"level": 3, "prompt": CONVERSATION, "completion_ids": [5, 0]})]


@pytest.mark.parametrize(
    ("columns", "truth"),
    [
        ({"reward_model": {"ground_truth": "7", "style": "rule"}, "data_source": "gsm8k", "extra_info": {"k": 1}}, "7"),
        ({"ground_truth": "8"}, "8"),
        ({}, "one"),
    ],
)
def test_verls_functions_are_given_the_ground_truth_wherever_the_row_has_it(columns: dict[str, Any], truth: str):
    asked.clear()
    score("compute_score", "auto", rollouts("one", **columns))
    assert asked == [(columns.get("data_source", ""), "one", truth, columns.get("extra_info", {}))]


def textual(text: str, gold: str) -> float:
    return 0.0


def by_place(completions: list[str], /) -> list[float]:
    return []


def nothing() -> float:
    return 0.0


@pytest.mark.parametrize("name", ["textual", "by_place", "nothing"])
def test_another_signature_is_refused_with_what_was_found_and_a_function_to_copy(name: str):
    with pytest.raises(ConfigError) as caught:
        RewardFunction(f"{HERE}:{name}", "reward.function")
    said = str(caught.value)
    assert f":{name}(" in said
    assert "has no signature that is known; take lists, `def score(completions, answer, **columns): return [" in said
    assert "\n" not in said


def forgetful(completion: str) -> Any:
    for word in completion.split():
        if word == "one":
            print("a point")


class Forgets:
    def __call__(self, solution_str: str) -> Any:
        solution_str.strip()


forgets = Forgets()


async def forgets_to_say(completion: str) -> Any:
    await asyncio.sleep(0)


def only_raises(completion: str) -> Any:
    raise ValueError(completion)


def says_at_times(completion: str) -> Any:
    if completion == "one":
        return 1.0


@pytest.mark.parametrize("name", ["forgetful", "forgets", "forgets_to_say"])
def test_a_function_for_one_sample_that_returns_nothing_is_refused(name: str):
    with pytest.raises(ConfigError, match=rf"{name} has no `return` with a value; take lists"):
        RewardFunction(f"{HERE}:{name}", "reward.function")


def test_a_function_for_one_sample_may_have_nothing_to_say_of_some():
    assert score("says_at_times", "auto") == [1.0, 0.0]
    with pytest.raises(RewardError, match="raised ValueError: one"):
        score("only_raises", "auto")


def test_the_functions_to_copy_score():
    for text in re.findall("`(.*?)`", TO_COPY):
        namespace: dict[str, Any] = {}
        exec(text, namespace)
        style = style_of(namespace["score"], "auto", path="x:score", where="f")
        if style.adapter == "trl":
            assert namespace["score"](completions=["a 7", "b"], answer=["7", "7"]) == [1.0, 0.0]
        else:
            assert namespace["score"](completion="a 7", answer="7") == 1.0


def test_a_signature_is_held_against_the_adapter_that_is_set():
    with pytest.raises(ConfigError, match="not the signature of adapter=verl; take lists"):
        RewardFunction(f"{HERE}:trl", "reward.function", adapter="verl")


@pytest.mark.parametrize(
    ("name", "said"),
    [("one_list", r"score 0 of 2 is \[1.0\], a list; return one number"), ("one_nan", "score 0 of 2 is nan")],
)
def test_one_sample_earns_one_number(name: str, said: str):
    with pytest.raises(RewardError, match=said):
        score(name, "auto")


def one_list(completion: str) -> Any:
    return [1.0]


def one_nan(completion: str) -> float:
    return float("nan")


# --- a completion by its other name


def response_of_one(prompt: str, response: str, **row: Any) -> float:
    return float(len(response) + 10 * len(prompt) + 100 * len(row["answer"]))


def responses_of_all(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    return [float(len(each) + 10 * len(prompts[0]) + 100 * len(answer[0])) for each in responses]


def truth_is_a_response(solution_str: str, response: str) -> float:
    return float(len(solution_str) + 10 * len(response))


@pytest.mark.parametrize("name", ["response_of_one", "responses_of_all"])
def test_a_response_is_the_completion_whatever_column_has_that_name(name: str):
    group = rollouts("one", "three", prompt="count", response="no sample of ours", responses="nor this")
    assert score(name, "auto", group) == [353.0, 355.0]


def test_beside_another_name_of_the_completion_a_response_is_a_column():
    assert score("truth_is_a_response", "auto", rollouts("one", response="four")) == [43.0]
