"""A setting that the book or README names is one that a shipped graph has, and every command is one that is taken."""

from __future__ import annotations

import re
import shlex
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.cli import _parser
from flowrl.config import Select
from flowrl.graph.program import load_program
from flowrl.runs.judged import JudgedSettings
from scripts.tested_pages import FENCE
from tests.support.command import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(DOCS / "start").glob("*.md"), *(DOCS / "tutorials").glob("*.md")]
# Whose parts are the user's or vLLM's; `flowrl judge` has a server of its own.
FREE = {
    "agent.environment_options", "cluster.labels", "cluster.most", "data.columns", "evaluation.sets",
    "generator.engine_options", "server",
}  # fmt: skip


def addresses(settings: msgspec.Struct, at: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(type(settings)):
        address = f"{at}.{field.name}".lstrip(".")
        yield address
        value = getattr(settings, field.name)
        if isinstance(value, msgspec.Struct):
            yield from addresses(value, address)
        if isinstance(value, Select):
            yield from addresses(value.load(address), address)


def test_every_setting_that_is_named_exists():
    known = {name for path in (ROOT / "graphs").glob("*.py") for name in addresses(load_program(path).settings)}
    known |= {*addresses(JudgedSettings())}  # of flowrl eval
    figures = set(re.findall(r"`([a-z_.]+)`", (DOCS / "reference" / "metrics.md").read_text()))
    knobs = (DOCS / "reference" / "which-knob.md").read_text()
    named = {name for page in PAGES for name in re.findall(r"--set '?([a-z_.]+)=", page.read_text())}
    named |= set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", knobs)) - figures
    assert len(named) > 40
    assert sorted(name for name in named - known if name.rpartition(".")[0] not in FREE) == []


def commands(page: Path, here: Path) -> Iterator[list[str]]:
    """Write a page's titled blocks to files and yield the arguments of every flowrl command in the others."""
    for kind, title, body in FENCE.findall(page.read_text()):
        if title:
            (here / title).parent.mkdir(parents=True, exist_ok=True)
            (here / title).write_text(body)
        elif kind == "console":
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line.strip().removeprefix("$ "), comments=True)
                if words[:1] == ["flowrl"]:
                    yield words[1 : words.index("&") if "&" in words else None]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.stem)
def test_every_command_is_taken_and_its_settings_make_a_graph(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in commands(page, tmp_path):
        asked = _parser().parse_args(arguments)
        graph = getattr(asked, "graph", None)
        if graph is None or not (ROOT / graph).exists():
            continue
        config = next((path for path in (asked.config, ROOT / (asked.config or "")) if path and path.is_file()), None)
        if (asked.config is None) == (config is None):  # a user's own is nowhere
            load_program(ROOT / graph, config=config, overrides=asked.overrides)
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
