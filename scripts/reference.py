"""Write the generated pages of the book: every command, setting, algorithm, error and recipe, from the code.

Invariants: what stands there is what the code takes today; a setting, an option or an error without words is an error
of the build, and so is a page that no menu names. Called by scripts/docs.sh with the directory of the pages.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import sys
import textwrap
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

import flowrl.algorithms
from flowrl import cli, errors
from flowrl.algorithms.base import Objective
from flowrl.config import Config, Select
from flowrl.graph.program import load_program

ROOT = Path(__file__).resolve().parents[1]
Words = dict[str, str]


class Undocumented(Exception):
    """Something a user can set or meet has no words."""


def main(pages: Path) -> None:
    """Write reference/*.md and recipes.md; raises Undocumented with everything that lacks words."""
    directory = pages / "reference"
    directory.mkdir(exist_ok=True)
    (pages / "recipes.md").write_text(recipes())
    missing: list[str] = []
    for name, text in (
        ("commands", commands()),
        ("settings", settings(missing)),
        ("algorithms", algorithms(missing)),
        ("errors", families()),
    ):
        (directory / f"{name}.md").write_text(text)
    if missing:
        raise Undocumented(f"{len(missing)} settings have no comment beside them:\n  " + "\n  ".join(missing))
    there = {str(path.relative_to(pages)) for path in pages.rglob("*.md")}
    named = set(_pages_of(tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())["project"]["nav"]))
    if there != named:
        raise Undocumented(f"the menu of docs/zensical.toml and the pages differ: {', '.join(sorted(there ^ named))}")


def _pages_of(menu: Any) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    return [page for each in (menu.values() if isinstance(menu, dict) else menu) for page in _pages_of(each)]


def _said(module: Any) -> str:
    """Return a module's docstring, without the line that is for who changes it."""
    return (inspect.getdoc(module) or "").partition("\n\nTests: ")[0]


# Commands.


def commands() -> str:
    """Return every command with its arguments."""
    lines = ["# Commands", "", _said(cli), ""]
    lines += _command_lines(cli._parser(), "flowrl")
    return "\n".join(lines) + "\n"


def _command_lines(parser: argparse.ArgumentParser, name: str) -> list[str]:
    lines: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            says = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for command, inner in action.choices.items():
                lines += [f"## {name} {command}", "", f"{says.get(command, '')}.".capitalize(), ""]
                lines += _command_lines(inner, f"{name} {command}")
        elif not isinstance(action, argparse._HelpAction):
            if not action.help:
                raise Undocumented(f"{name}: {action.dest} has no help")
            shown = ", ".join(action.option_strings) or (action.metavar or action.dest)
            lines.append(f"- `{shown}`: {action.help % {'prog': name, 'default': action.default}}")
    return [*lines, ""] if lines and lines[-1] else lines


# Settings.


def settings(missing: list[str]) -> str:
    """Return every setting of the graphs that flowrl ships, by the part of a graph it belongs to."""
    places: dict[type[Config], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((ROOT / "graphs").glob("*.py")):
        kind = type(load_program(path).settings)
        _walk(kind, "", path.stem, places)
    lines = [
        "# Settings",
        "",
        "One address for each, the same in `--set`, in a YAML file, in metrics and in errors. A default that a graph "
        "changes is in the graph's file; `flowrl check GRAPH` prints what a run would take.",
        "",
    ]
    for kind, found in places.items():
        lines += [f"## {_title(kind, found)}", ""]
        if kind.__doc__ and not kind.__doc__.startswith(kind.__name__ + "("):
            lines += [inspect.getdoc(kind) or "", ""]
        lines += [f"`{prefix or '(the graph itself)'}` in {', '.join(graphs)}  " for prefix, graphs in found.items()]
        lines += ["", *_table(kind, missing), ""]
    return "\n".join(lines)


def _title(kind: type[Config], found: dict[str, list[str]]) -> str:
    if "" in found:
        return f"graphs/{found[''][0]}.py"
    shortest = min(found, key=len)
    return shortest.rpartition(".")[2] if len(found) == 1 else kind.__qualname__.removesuffix(".Config")


def _walk(kind: type[Config], prefix: str, graph: str, places: dict[type[Config], dict[str, list[str]]]) -> None:
    if graph not in places[kind][prefix]:
        places[kind][prefix].append(graph)
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        for inner in _structs(hints[field.name]):
            if not issubclass(inner, Select):
                _walk(inner, f"{prefix}.{field.name}".lstrip("."), graph, places)


def _structs(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Config) else []
    return [found for argument in get_args(annotation) for found in _structs(argument)]


def _table(kind: type[Config], missing: list[str]) -> list[str]:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    hints = get_type_hints(kind, include_extras=True)
    said = _comments(kind)
    for field in msgspec.structs.fields(kind):
        name, annotation = field.name, hints[field.name]
        inner = _structs(annotation)
        if not said.get(name) and not inner:
            missing.append(f"{kind.__module__}:{kind.__qualname__}.{name}")
        meaning = said.get(name) or " ".join(f"see {each.__qualname__.removesuffix('.Config')}" for each in inner)
        cells = (f"`{name}`", _kind(annotation), _default(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _kind(annotation: Any) -> str:
    """Return a type in words, with the bounds that it states."""
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        bounds = [
            f"{sign} {value:g}"
            for meta in annotation.__metadata__
            for sign, value in ((">=", meta.ge), (">", meta.gt), ("<=", meta.le), ("<", meta.lt))
            if value is not None
        ]
        return " ".join([_kind(get_args(annotation)[0]), *bounds])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if str(origin) == "typing.Literal":
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(_kind(each) for each in arguments if each is not ...)}"
    if arguments:
        return " or ".join(_kind(each) for each in arguments)
    if annotation is type(None):
        return "none"
    return getattr(annotation, "__qualname__", str(annotation)).removesuffix(".Config")


def _default(field: msgspec.structs.FieldInfo) -> str:
    value = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    if value is msgspec.NODEFAULT:
        return "must be given"
    if isinstance(value, Select):
        return f"`{value.use}`"
    return "" if isinstance(value, Config) else f"`{value!r}`"


@cache
def _comments(kind: type[Config]) -> Words:
    """Return what the source says of each field, beside it or in the lines above it, own fields over inherited ones."""
    found: Words = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Config) and base is not Config:
            found |= _own_comments(base)
    return found


def _own_comments(kind: type[Config]) -> Words:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    lines = source.splitlines()
    found: Words = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            _, _, beside = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")  # type: ignore[operator]
            above: list[str] = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("# "):
                    break
                above.insert(0, line.strip()[2:])
            words = " ".join([*above, beside]).replace("fmt: skip", "").strip()
            if words:
                found[node.target.id] = words[0].upper() + words[1:]
    return found


# Recipes.


def recipes() -> str:
    """Return every recipe with its model, data, devices and memory plan, and whether it was run."""
    measured = (ROOT / "docs" / "learning.md").read_text()
    lines = [
        "# Recipes",
        "",
        "YAML files in `graphs/recipes/`, taken with `--config`; the first lines of each say where it is from and how "
        "to run it. Measured ones are in [learning](learning.md). One that was only checked has never trained here.",
        "",
        "| recipe | graph | model | data | GPUs | memory of the learner | run |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "graphs" / "recipes").glob("*.yaml")):
        text = path.read_text()
        graph = text.partition("graphs/")[2].partition(".py")[0]
        program = load_program(ROOT / "graphs" / f"{graph}.py", config=path)
        settings: Any = program.settings
        nodes = [node.config for node in program.graph.nodes.values()]
        gpus = sum(node.gpus * node.ranks * node.replicas for node in nodes if not node.share)
        was_run = "checked only" if "NOT RUN" in text else "measured" if path.name in measured else "on two cores"
        cells = (f"`{path.stem}`", f"`{graph}`", settings.model, settings.data.source, f"{gpus:g}",
                 _memory_plan(settings.learner), was_run)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _memory_plan(learner: Any) -> str:
    plan = [f"ZeRO {learner.zero_stage} over {learner.ranks}"] if learner.ranks > 1 else []
    plan += ["checkpointed layers"] if learner.gradient_checkpointing else []
    plan += ["optimizer on the CPU"] if learner.offload_optimizer else []
    plan += [f"LoRA {learner.lora.rank}"] if learner.lora.rank else []
    return ", ".join(plan) or "all on one device"


# Algorithms and errors.


def algorithms(missing: list[str]) -> str:
    """Return every algorithm and objective with its source and its options."""
    lines = ["# Algorithms and objectives", "", "Chosen by name or path: `--set algorithm=grpo`, "
             "`--set algorithm.kl.coef=0.01`; one file each in `flowrl/algorithms/`.", ""]  # fmt: skip
    for module in pkgutil.iter_modules(flowrl.algorithms.__path__):
        loaded = importlib.import_module(f"flowrl.algorithms.{module.name}")
        for kind in vars(loaded).values():
            if not (isinstance(kind, type) and issubclass(kind, Objective) and kind.__module__ == loaded.__name__):
                continue
            if inspect.isabstract(kind) or kind.loss is Objective.loss or kind.__name__.startswith("_"):
                continue
            lines += [f"## {kind.__name__}", "", f"`{loaded.__name__}:{kind.__name__}`", "",
                      "```text", _said(loaded), "```", ""]  # fmt: skip
            if msgspec.structs.fields(kind):
                lines += [*_table(kind, missing), ""]
    return "\n".join(lines)


def families() -> str:
    """Return the tree of errors with what each means and its exit code."""
    lines = ["# Errors", "", "```text", _said(errors), "```", "", "| error | exit code | means |",
             "|---|---|---|"]  # fmt: skip
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.FlowrlError):
            if not kind.__doc__:
                raise Undocumented(f"errors.{kind.__name__}")
            lines.append(f"| `{kind.__name__}` | {kind.exit_code} | {inspect.getdoc(kind)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Undocumented as error:
        sys.exit(f"reference: {error}")
