"""The house keeps its order: no import circles, also none that only the type checker sees, and one class for a name."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

from flowrl import cli

ROOT = Path(__file__).resolve().parents[2] / "flowrl"


@functools.cache
def modules(root: Path = ROOT) -> dict[str, ast.Module]:
    """Return every module of a package by its name."""
    found: dict[str, ast.Module] = {}
    for path in sorted(root.rglob("*.py")):
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


def has_code(tree: ast.Module) -> bool:
    """Return whether a module is more than its docstring."""
    return any(not isinstance(node, ast.Expr) for node in tree.body)


@functools.cache
def imports_of_all() -> dict[str, set[str]]:
    """Return what each module of flowrl, tests and graphs imports of them, or names in a text ("flowrl.cli:main").

    What tests/graphs holds are the graphs, which it loads by their files.
    """
    packages = [modules(), *(modules(ROOT.parent / name) for name in ("tests", "graphs"))]
    trees = {name: tree for package in packages for name, tree in package.items()}
    graphs = set(packages[-1])
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        named = {each for text in texts for each in re.findall(r"(?:flowrl|tests)(?:\.\w+)+", text)}
        found[name] = imports_of(tree, set(trees)) | (named & set(trees))
        found[name] |= graphs if name.startswith("tests.graphs.") else set()
    return found


def reached_from(name: str) -> set[str]:
    """Return the modules that a module imports, and what those import."""
    found, waiting = set[str](), [name]
    while waiting:
        new = imports_of_all()[waiting.pop()] - found
        found |= new
        waiting += new
    return found


@pytest.mark.slow
def test_every_module_says_which_test_files_hold_it_and_they_reach_it() -> None:
    for name, tree in modules().items():
        if not has_code(tree):
            continue
        said = re.findall(r"^Tests: (.+)$", ast.get_docstring(tree) or "", re.MULTILINE)
        assert said, f"{name}: its docstring ends with no line `Tests: tests/...`, the file that holds it"
        for path in map(Path, ", ".join(said).split(", ")):
            assert (ROOT.parent / path).is_file(), f"{name}: there is no {path}"
            assert name in reached_from(".".join(path.with_suffix("").parts)), f"{name} is not reached by {path}"


def test_files_of_the_house_that_the_book_names_are_there() -> None:
    project = ROOT.parent
    for page in [*sorted((project / "docs").rglob("*.md")), *project.glob("*.md")]:
        for path in re.findall(r"`((?:flowrl|graphs|scripts|tests|perf)/[\w/.-]*\w/?)`", page.read_text()):
            assert (project / path).exists(), f"{page.relative_to(project)} names {path}, and there is no such file"


def sentences(docstring: str) -> list[str]:
    """Return a docstring's sentences, and the parts that a semicolon ends; what is in backticks is a word."""
    lines = [line for line in docstring.splitlines() if not line.startswith(("Tests: ", "    "))]
    text = re.sub(r"`[^`]*`", "word", "\n".join(lines))
    parts = [each for part in re.split(r"\n(?=- )|\n\s*\n", text) for each in re.split(r"(?<=[.!?;])\s+", part)]
    return [" ".join(each.split()) for each in parts if each.strip()]


def test_sentences_are_told_apart() -> None:
    found = sentences("One `a. b` here; two.\n\n- Three\n  more\n- Four.\n\nTests: x.py\n")
    assert found == ["One word here;", "two.", "- Three more", "- Four."]


def test_invariants_stand_one_a_line() -> None:
    for name, tree in modules().items():
        lines = (ast.get_docstring(tree) or "").splitlines()
        for place, line in enumerate(lines):
            if found := re.search(r"\bInvariant(s?)\b[^.]*:", line):
                assert found.start() == 0, f"{name}: begin a line with its invariants"
                is_list = line.endswith(":") and lines[place + 1].startswith("- ")
                assert is_list or not found[1], f"{name}: begin a line with `- ` for each invariant"


@pytest.mark.slow
def test_no_sentence_of_a_docstring_is_over_thirty_words() -> None:
    said = [
        (name, ast.get_docstring(node) or "")
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [f"{name}: {each}" for name, text in said for each in sentences(text) if len(each.split()) > 30]
    assert not long, "\n".join(long)


def test_the_command_line_names_all_its_commands_in_its_first_words() -> None:
    first = (cli.__doc__ or "").partition("\n\n")[0]
    commands = next(action.choices for action in cli._parser()._actions if isinstance(action.choices, dict))
    assert len(commands) > 20
    assert set(commands) - set(re.findall(r"\w+", first)) == set()


def test_graph_files_say_no_any_and_are_laid_out_by_the_formatter() -> None:
    for path in sorted((ROOT.parent / "graphs").glob("*.py")):
        assert re.findall(r"\bAny\b|# fmt: |# noqa|# type: |# pyright: ", path.read_text()) == [], path.name
