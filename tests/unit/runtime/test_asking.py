"""No wait on Ray is without an end: `ask` is the only way to call an actor, and it gives up."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from typing import Any

import pytest

from flowrl.runtime.calls import METHODS, CallClient, FlowCalls
from flowrl.runtime.cluster import Unanswered, ask
from flowrl.runtime.flow import Flow
from flowrl.simulation.clock import run_virtual

ROOT = Path(__file__).resolve().parents[3]
# What may write `.remote(...)`: the wrapper, and what starts an actor and keeps its handle.
MAY_CALL = {
    ("cluster.py", "answer_of"),
    ("cluster.py", "ask"),
    ("ray.py", "_start"),
    ("ray.py", "_start_host"),
}
WAITS_FOR_EVER = {"get", "wait"}  # of the module ray


def calls_of(path: Path) -> list[tuple[str, ast.Call]]:
    """Return every call in a file with the innermost function it stands in."""
    found: list[tuple[str, ast.Call]] = []

    def walk(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Call):
                found.append((inside, child))
            walk(child, inside)

    walk(ast.parse(path.read_text()), "")
    return found


def test_actors_are_called_through_ask_alone() -> None:
    wrong: list[str] = []
    num_seen = 0
    for path in sorted((ROOT / "flowrl" / "runtime").glob("*.py")):
        for function, call in calls_of(path):
            if not isinstance(call.func, ast.Attribute):
                continue
            owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
            is_call = call.func.attr == "remote" and owner != "ray"  # `ray.remote(Class)` makes a class of actors
            num_seen += is_call
            if (is_call and (path.name, function) not in MAY_CALL) or (
                owner == "ray" and call.func.attr in WAITS_FOR_EVER
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno} in {function}: {ast.unparse(call)[:60]}")
    assert num_seen >= 3, "the test looks in the wrong place"
    assert not wrong, "\n".join(wrong)


class Silent:
    """An actor's method that is never answered."""

    def remote(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()


def test_a_call_that_is_not_answered_ends_at_its_deadline() -> None:
    async def body() -> float:
        with pytest.raises(Unanswered, match=r"scorer\.0: not heard from for 30 s"):
            await ask(Silent(), where="scorer.0", within_s=30.0)
        return asyncio.get_running_loop().time()

    took_s: Any = run_virtual(body())
    assert took_s == pytest.approx(30.0)


def test_the_table_of_calls_is_what_the_flow_has() -> None:
    for name in METHODS:
        ours = ast_arguments(FlowCalls, name)
        assert ast_arguments(Flow, name) == ["self", "replica", *ours[1:]], name
    undone = {name.removeprefix("undo_") for name in vars(Flow) if name.startswith("undo_")}
    assert undone == {"get", "acquire", "take"}
    assert undone <= METHODS
    with pytest.raises(AttributeError, match="'drop_all' is not a call of the flow"):
        _ = CallClient(lambda call: asyncio.sleep(0), "scorer.0", 0).drop_all


def ast_arguments(owner: type, name: str) -> list[str]:
    function = getattr(owner, name)
    return list(function.__code__.co_varnames[: function.__code__.co_argcount])
