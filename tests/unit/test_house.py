"""The house keeps its order: no import circles, also none that only the type checker sees, and one class for a name."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "flowrl"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return every module of flowrl by its name."""
    found: dict[str, ast.Module] = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports_of(tree: ast.Module, known: set[str]) -> set[str]:
    """Return the modules that a module imports anywhere: at its top, under TYPE_CHECKING or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= known else {node.module} | names  # a package stands for what it is asked for
    return found & known


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            members, stack[place:] = stack[place:], []
            if len(members) > 1:
                found.append(set(members))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set[str]()}
    assert circles(graph) == [{"a", "b", "c"}]


@pytest.mark.slow
def test_no_module_imports_itself_through_others() -> None:
    trees = modules()
    graph = {name: imports_of(tree, set(trees)) - {name} for name, tree in trees.items()}
    assert [sorted(circle) for circle in circles(graph)] == []


@pytest.mark.slow
def test_no_two_classes_have_one_name() -> None:
    places = [
        (node.name, module)
        for module, tree in modules().items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")  # known in their module alone
    ]
    counts = Counter(name for name, _ in places)
    assert {name for name, _ in places if counts[name] > 1} == set()


@pytest.mark.slow
def test_what_a_module_says_holds_it_is_a_test_that_imports_it():
    known = set(modules())
    for name, tree in modules().items():
        for line in (ast.get_docstring(tree) or "").splitlines():
            if line.startswith("Tests: "):
                path = ROOT.parent / line.removeprefix("Tests: ")
                assert path.is_file(), f"{name}: there is no {path}"
                assert name in imports_of(ast.parse(path.read_text()), known), f"{name} is not imported by {path}"
