"""Reward functions written for other libraries, made into functions with TRL's signature.

    openrlhf    reward_func(queries, prompts, labels, **kwargs) -> list | tensor | {"rewards": list | tensor, ...}
                (OpenRLHF examples/python/reward_func.py). A query is the prompt followed by the response; a prompt that
                is a conversation is given as its messages' contents, one per line. Labels are the column
                `label_column`, or "" where that setting is "". Besides "rewards" nothing of a dict is used.
    verifiers   a Rubric (verifiers/rubrics/rubric.py): any object with `funcs` and `weights`, an object with such a
                `rubric`, or a group of `rubrics`; or a function without arguments that returns one, such as
                `load_environment`. A function takes those it names of prompt, completion, answer, state, info, task,
                the other columns and the rubric's `class_objects`, and returns a number for one sample; with plural
                names (prompts, completions, ...) it takes lists and returns one number for each sample.

Two differences from verifiers: a function that raises is an error and not a score of 0, and a function of weight 0 is
not called. Invariant: what comes back is not yet checked; `RewardFunction`, which calls `adapted`, does that.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any, Literal, cast

from flowrl.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Function = Callable[..., Any]

Adapter = Literal["trl", "openrlhf", "verifiers"]

PLURAL = frozenset({"prompts", "completions", "answers", "states", "infos", "tasks"})  # arguments of a group function


def adapted(found: Any, adapter: Adapter, *, label_column: str, path: str, where: str) -> Function:
    """Return a function with TRL's signature that calls what was found at `path`.

    Raises:
        ConfigError: it is not what the adapter takes.
    """
    if adapter == "verifiers":
        return verifiers_reward(_weighted(_rubric_of(found, path, where), path, where))
    if isinstance(found, type) or not callable(found):
        raise ConfigError(where, f"{path} is a {type(found).__name__}, not a function", "name a function")
    if adapter == "openrlhf":
        return openrlhf_reward(found, label_column)
    return cast("Function", found)


def openrlhf_reward(function: Function, label_column: str) -> Function:
    """Return an OpenRLHF `reward_func` as a function with TRL's signature."""
    call = function if inspect.isroutine(function) else function.__call__  # type: ignore[operator]

    async def waited(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> Any:
        return rewards_of(await function(**openrlhf_columns(prompts, completions, columns, label_column)))

    def called(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> Any:
        return rewards_of(function(**openrlhf_columns(prompts, completions, columns, label_column)))

    return waited if inspect.iscoroutinefunction(call) else called


def openrlhf_columns(
    prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, list[Any]], label_column: str
) -> dict[str, list[Any]]:
    """Return queries, prompts and labels as OpenRLHF gives them.

    Raises:
        RewardError: the data has no column `label_column`.
    """
    columns = {name: column for name, column in columns.items() if name != "completion_ids"}
    texts = [_text(prompt) for prompt in prompts]
    if label_column and label_column not in columns:
        what = f"the data has no column {label_column!r} (columns: {', '.join(sorted(columns)) or 'none'})"
        raise RewardError("label_column", what, "set label_column to one of them, or to '' for no labels")
    return {
        "queries": [text + _text(completion) for text, completion in zip(texts, completions, strict=True)],
        "prompts": texts,
        "labels": columns[label_column] if label_column else [""] * len(texts),
    }


def rewards_of(result: Any) -> Any:
    """Return the rewards among an OpenRLHF function's result, a tensor of shape [n, 1] as n numbers."""
    if isinstance(result, dict):
        if "rewards" not in result:
            raise ValueError(f"returned a dict without 'rewards' (keys: {', '.join(map(str, result))})")
        result = cast("dict[str, Any]", result)["rewards"]
    return result.reshape(-1) if hasattr(result, "reshape") else result


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt)


def verifiers_reward(weighted: Sequence[tuple[Function, float, dict[str, Any]]]) -> Function:
    """Return (function, weight, class objects) triples as one async function: the weighted sum of their scores."""

    async def reward(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
        states = [
            _state(prompt, completion, {k: v[place] for k, v in columns.items() if k != "completion_ids"})
            for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        alone = [triple for triple in weighted if not _is_group_function(triple[0])]
        async with asyncio.TaskGroup() as tasks:
            sums = [tasks.create_task(_weighted_sum(alone, state)) for state in states]
        totals = [each.result() for each in sums]
        for function, weight, objects in weighted:
            if _is_group_function(function):
                scores = await _call(function, {**_group_arguments(states), **objects})
                totals = [total + weight * float(score) for total, score in zip(totals, scores, strict=True)]
        return totals

    return reward


async def _weighted_sum(weighted: Sequence[tuple[Function, float, dict[str, Any]]], state: dict[str, Any]) -> float:
    """Score one sample, function after function: they may leave results for each other in the state."""
    total = 0.0
    for function, weight, objects in weighted:
        total += weight * float(await _call(function, {**state, "state": state, **objects}))
    return total


async def _call(function: Function, arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = {p.name for p in parameters}
        arguments = {name: value for name, value in arguments.items() if name in named}
    result = function(**arguments)
    return await result if inspect.isawaitable(result) else result


def _state(prompt: Any, completion: Any, columns: dict[str, Any]) -> dict[str, Any]:
    return {"answer": "", "info": {}, "task": "default", **columns, "prompt": prompt, "completion": completion}


def _group_arguments(states: list[dict[str, Any]]) -> dict[str, Any]:
    plural = {f"{name}s": [state[name] for state in states] for name in states[0]}
    return {**plural, "states": states}


def _is_group_function(function: Function) -> bool:
    return bool(PLURAL & set(inspect.signature(function).parameters))


def _rubric_of(found: Any, path: str, where: str) -> Any:
    """Return the rubric that `found` is, has or makes."""
    if _is_rubric(found) and not isinstance(found, type):
        return found
    if callable(found):
        try:
            found = found()
        except Exception as error:
            what = f"{path}() raised {type(error).__name__}: {error}"
            raise ConfigError(where, what, "name a rubric, or a function without arguments that makes one") from error
    found = getattr(found, "rubric", found)
    if not _is_rubric(found):
        what = f"{path} gives a {type(found).__name__} without funcs and weights"
        raise ConfigError(where, what, "name a rubric, or a function without arguments that makes one")
    return found


def _is_rubric(found: Any) -> bool:
    return hasattr(found, "rubrics") or (hasattr(found, "funcs") and hasattr(found, "weights"))


def _weighted(rubric: Any, path: str, where: str) -> list[tuple[Function, float, dict[str, Any]]]:
    """Return what a rubric and those inside it score with, without functions of weight 0."""
    if hasattr(rubric, "rubrics"):
        return [triple for each in rubric.rubrics for triple in _weighted(each, path, where)]
    functions, weights = list(rubric.funcs), list(rubric.weights)
    if not functions or len(functions) != len(weights):
        what = f"{path} has {len(functions)} functions and {len(weights)} weights"
        raise ConfigError(where, what, "give each function one weight")
    objects = dict(getattr(rubric, "class_objects", None) or {})
    return [(f, float(weight), objects) for f, weight in zip(functions, weights, strict=True) if weight]
