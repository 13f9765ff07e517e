"""The graphs and recipes that come with flowrl: listed, and copied to where their user runs and edits them.

In a checkout they stand in graphs/ beside the package, in an installed wheel in flowrl/graphs. Listing them reads their
first lines and imports nothing. Used by `flowrl graphs` and `flowrl init`.

Tests: tests/graphs/test_installed.py
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

from flowrl.errors import ConfigError

FOLDER = "graphs"
RECIPES = "recipes"
PACKAGE = Path(__file__).resolve().parent


def folder() -> Path:
    """Return the directory that holds the shipped graphs.

    Raises:
        ConfigError: they are nowhere: the installation is not whole.
    """
    for root in (PACKAGE, PACKAGE.parent):
        if (found := root / FOLDER).is_dir():
            return found
    raise ConfigError("graphs", f"are not in {PACKAGE}", "install flowrl-engine again")


def graphs() -> dict[str, str]:
    """Return path -> what it does, for every graph and recipe; paths are as `init` writes them."""
    found: dict[str, str] = {}
    for path in sorted(folder().glob("*.py")):
        found[f"{FOLDER}/{path.name}"] = (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0]
    for path in sorted(folder().glob(f"{RECIPES}/*.yaml")):
        found[f"{FOLDER}/{RECIPES}/{path.name}"] = _first_sentence(path.read_text())
    return found


def init(directory: Path) -> list[Path]:
    """Copy the graphs and recipes to DIRECTORY/graphs; returns the files.

    Raises:
        ConfigError: such a directory is there already, or cannot be written.
    """
    target = directory / FOLDER
    if target.exists():
        raise ConfigError(str(target), "is there already", "name another directory, or move it away")
    try:
        shutil.copytree(folder(), target, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise ConfigError(str(target), f"cannot be written ({error.strerror or error})", "name another") from error
    return sorted(path for path in target.rglob("*") if path.is_file())


def _first_sentence(text: str) -> str:
    """Return the first sentence of a recipe's comment."""
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return re.split(r"(?<=\.)(?<!Dr\.)\s", comment, maxsplit=1)[0]
