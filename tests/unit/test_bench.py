"""`flowrl bench` lists what stands in perf/ without importing it, and refuses what does not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from flowrl.bench import benchmarks, run_benchmark
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FIRST = '"""How fast.\n\nMore.\n"""\n'
MAIN = "def main(argv):\n    return len(argv)\n"


def test_a_benchmark_is_a_module_with_a_main_and_is_listed_by_its_first_line_unread(tmp_path: Path) -> None:
    (tmp_path / "perf").mkdir()
    files = {"fast": FIRST + MAIN + "1 / 0", "fast_parts": FIRST + MAIN, "tables": FIRST}
    for name, text in files.items():
        (tmp_path / "perf" / f"{name}.py").write_text(text)
    assert benchmarks(tmp_path) == {"fast": "How fast."}


def test_a_name_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"bench papre: is not a benchmark; name one of .*paper"):
        run_benchmark("papre", [])
    assert "perf.papre" not in sys.modules
