"""Finds the benchmarks, which stand in perf/ beside the package in a checkout and are not installed with it.

A benchmark is a module of perf/ without an underscore in its name that defines `main(argv) -> int`; helpers have one
and are not listed. Listing them reads their first lines and imports nothing. Used by `flowrl bench`.

Tests: tests/unit/test_bench.py
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = "perf"


def run_benchmark(name: str, argv: Sequence[str]) -> int:
    """Import one benchmark and call its `main` with the options that stood behind its name.

    Raises:
        ConfigError: there is none of that name, or no checkout.
    """
    root = _checkout()
    if name not in (known := benchmarks(root)):
        raise ConfigError(f"bench {name}", "is not a benchmark", f"name one of {', '.join(known)}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"{FOLDER}.{name}").main(list(argv)) or 0


def benchmarks(root: Path | None = None) -> dict[str, str]:
    """Return name -> what it measures, the first line of its docstring."""
    found: dict[str, str] = {}
    for path in sorted(((root or _checkout()) / FOLDER).glob("[a-z]*.py")):
        tree = ast.parse(path.read_bytes())
        if "_" not in path.stem and any(
            isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body
        ):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _checkout() -> Path:
    """Return the folder that holds perf/: the one flowrl is imported from, else the one the user stands in."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / FOLDER / "__init__.py").is_file() and (root / "pyproject.toml").is_file():
            return root
    what = f"the benchmarks stand in {FOLDER}/ of flowrl's repository and are not installed with the package"
    raise ConfigError("bench", what, "call it in a checkout of the repository")
