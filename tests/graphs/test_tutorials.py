"""Every command of the tutorials that need nobody else, in the order in which a reader types them; runs are short."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from scripts.tested_pages import FENCE
from tests.support.command import ROOT, SCRIPT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.long]


def commands(page: Path, here: Path) -> list[str]:
    """Write a page's titled blocks to files and return its commands; a run takes three steps."""
    found: list[str] = []
    for kind, title, body in FENCE.findall(page.read_text()):
        if title:
            (here / title).write_text(body)
        elif kind == "console":
            lines = [line.strip() for line in body.replace("\\\n", " ").splitlines() if line.strip()]
            found += [re.sub(r"^(flowrl run .*)$", r"\1 --set steps=3", line) for line in lines]
    return found


@pytest.mark.parametrize("page", ["grpo", "dpo", "agents", "pipeline", "distillation"])
def test_a_reader_can_type_every_command(page: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    typed = commands(ROOT / "docs" / "tutorials" / f"{page}.md", tmp_path)
    assert any(command.startswith("flowrl run ") for command in typed)
    for command in typed:
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
