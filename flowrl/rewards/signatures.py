"""How reward functions are called: the common signatures, told apart by the names of their parameters.

    trl         def score(prompts, completions, completion_ids, **columns) -> list[float | None]
                Lists with one entry for each sample; completions are texts, or one assistant message each where the
                prompt is a conversation. None means "does not apply" and counts 0.
    sample      def score(completion, prompt, **columns) -> float | None
                One sample at a time: the completion's text, the prompt as it stood in the data, the row's columns.
    verl        def compute_score(data_source, solution_str, ground_truth, extra_info) -> float | {"score": float, ...}
                One sample at a time; lists where the names are plural (data_sources, solution_strs, ...). The ground
                truth is `reward_model["ground_truth"]` of the row, else its column ground_truth, else `label_column`.
    openrlhf    def reward_func(queries, prompts, labels) -> list | tensor | {"rewards": list | tensor, ...}
                A query is the prompt followed by the response; a prompt that is a conversation is given as its
                messages' contents, one per line. Labels are the column `label_column`; "" where that setting is "".
    verifiers   a Rubric (verifiers/rubrics/rubric.py): any object with `funcs` and `weights`, an object with such a
                `rubric`, or a group of `rubrics`; or a function without arguments that returns one, such as
                `load_environment`. A function takes those it names of prompt, completion, answer, state, info, task,
                the other columns and the rubric's `class_objects`, and returns a number for one sample; with plural
                names (prompts, completions, ...) it takes lists and returns one number for each sample. Only by
                adapter=verifiers, since a rubric has no signature.

In the first two a `responses` or `response` is the completion where the function names none by that word. All but the
last may be `async`; a function is given those it names, or all with **kwargs; verl's and OpenRLHF's keep
the defaults of further parameters (gsm8k's `score=1.0`), whatever columns there are. Two differences from verifiers: a
function that raises is an error and not a score of 0, and a function of weight 0 is not called. Sources: TRL
GRPOTrainer "custom reward function"; verl/utils/reward_score; OpenRLHF examples/python/reward_func.py.

Invariant: what comes back is not yet checked; `RewardFunction`, which calls `style_of`, does that.

Tests: tests/unit/rewards/test_signatures.py
"""

from __future__ import annotations

import ast
import asyncio
import difflib
import inspect
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from flowrl.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Function = Callable[..., Any]
    Columns = dict[str, list[Any]]  # by name, one entry for each sample

Adapter = Literal["auto", "trl", "sample", "verl", "openrlhf", "verifiers"]

TO_COPY = (
    "take lists, `def score(completions, answer, **columns): return [float(a in c) for c, a in zip(completions, "
    "answer)]`, or one sample, `def score(completion, answer, **columns): return float(answer in completion)`"
)
PLURAL = frozenset({"prompts", "completions", "answers", "states", "infos", "tasks"})  # arguments of a group function
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")


@dataclass(frozen=True)
class Style:
    """How a function wants to be called."""

    adapter: Adapter
    is_one_by_one: bool = False  # a call for each sample
    is_plural: bool = False  # verl's names are
    response: str = ""  # what it calls a completion, where not by that word


def style_of(found: Any, adapter: Adapter, *, path: str, where: str) -> Style:
    """Return how the function found at `path` is called.

    Raises:
        ConfigError: it is no function, returns nothing, or its parameters are none that the adapter, or any, gives.
    """
    if adapter == "verifiers":
        return Style("verifiers")
    if isinstance(found, type) or not callable(found):
        remedy = "set adapter=verifiers" if _is_rubric(found) else f"name a function: {TO_COPY}"
        if isinstance(found, type) and "__call__" in vars(found):
            remedy = f"name an object of it: write `scorer = {found.__name__}()` in the module and name `scorer`"
        kind = type(found).__name__
        article = "an" if kind[0] in "aeiou" else "a"
        raise ConfigError(where, f"{path} is {article} {kind}, not a function", remedy)
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(where, f"{path} has no signature that can be read ({error})", TO_COPY) from error
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    found_style = None if by_place else _style(names, takes_all, adapter)
    if found_style is None:
        wanted = "no signature that is known" if adapter == "auto" else f"not the signature of adapter={adapter}"
        raise ConfigError(where, f"{path}{inspect.signature(found)} has {wanted}", TO_COPY)
    if found_style.is_one_by_one and _returns_nothing(found):  # None would count 0
        raise ConfigError(where, f"{path} has no `return` with a value", TO_COPY)
    return found_style


def _returns_nothing(function: Any) -> bool:
    """Say whether a function's text holds no `return` with a value, nor anything else that could be the result."""
    body: Any = function if inspect.isfunction(function) else type(function).__call__
    try:
        (whole,) = ast.parse(textwrap.dedent(inspect.getsource(body))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # a lambda within a line, code that was made at run time
        return False
    if not isinstance(whole, ast.FunctionDef | ast.AsyncFunctionDef) or isinstance(whole.body[-1], ast.Raise):
        return False
    inside: list[ast.AST] = [*whole.body]
    for node in inside:  # which grows
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return False
        if isinstance(node, ast.Return) and ast.unparse(node) not in ("return", "return None"):
            return False
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            inside += ast.iter_child_nodes(node)
    return True


def _style(names: set[str], takes_all: bool, adapter: Adapter) -> Style | None:
    if adapter == "auto":
        own = "completions" in names or "completion" in names  # the other names are then columns of the data
        if not own and not names & {*VERL, "queries", "solution_strs"}:
            if "responses" in names:
                return Style("trl", response="responses")
            if "response" in names:
                return Style("sample", is_one_by_one=True, response="response")
        known = ("trl", "sample") if own else ("verl", "openrlhf", "trl", "sample")
        tried = (_style(names, False, each) for each in known)
        found = next((style for style in tried if style is not None), None)
        return found or (Style("trl") if takes_all else None)
    if adapter == "verl" and "solution_strs" in names:
        return Style("verl", is_plural=True)
    says = {
        "verl": {"solution_str"},
        "openrlhf": {"queries"},
        "trl": {"completions", "prompts", "completion_ids"},
        "sample": {"completion"},
    }[adapter]
    if not (names & says or takes_all):
        return None
    return Style(adapter, is_one_by_one=adapter in ("verl", "sample"))


def columns_for(style: Style, texts: Columns, *, label_column: str, where: str) -> tuple[Columns, set[str] | None]:
    """Return what a function may ask for by name, and what **kwargs are given, None: all of it.

    `texts` are prompts, completions, completion_ids and the data's columns.

    Raises:
        RewardError: the data has no labels.
    """
    columns = dict(texts)
    prompts, completions, ids = (columns.pop(name, []) for name in ("prompts", "completions", "completion_ids"))
    said = [_text(completion) for completion in completions]
    match style.adapter:
        case "sample":
            own = {style.response: said} if style.response else {}
            return {**columns, "prompt": prompts, "completion": said, "completion_ids": ids, **own}, None
        case "openrlhf":
            labels = _labels(columns, label_column, where) if label_column else [""] * len(said)
            asked = [_text(prompt) for prompt in prompts]
            queries = [before + behind for before, behind in zip(asked, said, strict=True)]
            given = {"queries": queries, "prompts": asked, "labels": labels}
        case "verl":
            empty: list[Any] = [{} for _ in said]
            truths = _ground_truths(columns, label_column, where)
            found = (columns.get("data_source", [""] * len(said)), said, truths, columns.get("extra_info", empty))
            given = {f"{name}s" if style.is_plural else name: each for name, each in zip(VERL, found, strict=True)}
        case _:
            return {**texts, style.response: completions} if style.response else texts, None
    return {**columns, **given}, set(given)


def rewards_of(result: Any, style: Style) -> Any:
    """Return the scores among what a call returned, a tensor of shape [n, 1] as n numbers.

    Raises:
        ValueError: a dict lacks them.
    """
    key = {"openrlhf": "rewards", "verl": "score"}.get(style.adapter)
    if key is not None and isinstance(result, dict):
        if key not in result:
            raise ValueError(f"returned a dict without {key!r} (keys: {', '.join(map(str, result))})")
        result = cast("dict[str, Any]", result)[key]
    if style.adapter == "openrlhf":
        return result.reshape(-1) if hasattr(result, "reshape") else result
    if style.is_plural:
        return [rewards_of(each, Style("verl")) for each in result]
    return result


def missing_column(name: str, known: Columns, where: str) -> RewardError:
    """Return the error for a column that is asked for and that the data lacks."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(known))}; take another function"
    return RewardError(where, f"needs a column {name!r} that the data lacks", hint)


def _labels(columns: Columns, label_column: str, where: str) -> list[Any]:
    if label_column not in columns:
        what = f"the data has no column {label_column!r} (columns: {', '.join(sorted(columns)) or 'none'})"
        raise RewardError(where, what, "set label_column to one of them, or to '' for no labels")
    return columns[label_column]


def _ground_truths(columns: Columns, label_column: str, where: str) -> list[Any]:
    rows = columns.get("reward_model", [])
    if rows and all(isinstance(row, dict) and "ground_truth" in row for row in rows):
        return [row["ground_truth"] for row in rows]
    return columns["ground_truth"] if "ground_truth" in columns else _labels(columns, label_column, where)


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt)


def rubric_reward(found: Any, *, path: str, where: str) -> Function:
    """Return what is found at `path`, a rubric or what has or makes one, as one async function with TRL's signature.

    Raises:
        ConfigError: there is no rubric.
    """
    weighted = _weighted(_rubric_of(found, path, where), path, where)

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
