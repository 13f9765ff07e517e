"""A setting that the book or README names is one that a shipped graph has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.config import Select
from flowrl.graph.program import load_program
from flowrl.runs.judged import JudgedSettings
from tests.support.command import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

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
