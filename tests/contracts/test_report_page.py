"""The report in a real browser: it opens without a complaint, its script runs, and a hostile rollout's does not."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from flowrl.cli import main
from tests.support.past_run import HOSTILE, SECTIONS, past_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), "")
PHONE = "390,3000"  # CSS pixels


def opened(file: Path, profile: Path) -> tuple[str, list[str]]:
    """Open a file as a phone would show it; returns the document once its script has run, and what the console says."""
    switches = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={profile}", f"--window-size={PHONE}", "--enable-logging=stderr", "--dump-dom",
    ]  # fmt: skip
    result = subprocess.run(
        [BROWSER, *switches, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return result.stdout, [line for line in result.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine: apt-get install chromium")
def test_a_report_opens_in_a_browser_whatever_the_rollouts_hold(tmp_path: Path) -> None:
    run_dir = past_run(tmp_path / "run", text=HOSTILE)
    out = tmp_path / "report.html"
    assert main(["report", str(run_dir), "--out", str(out)]) == 0
    document, console = opened(out, tmp_path / "profile")
    assert console == []
    assert re.findall(r'<section id="(\w+)"', document) == ["missing", *SECTIONS]
    assert "<title>run: flowrl report</title>" in document, "no script but the page's own has run"
    num_plots = document.count('<figure class="chart"') + document.count('<div class="strip"')
    assert num_plots > 10
    assert document.count('<i class="cursor"') == num_plots, "the page's own script has run"
