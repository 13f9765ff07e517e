"""The staleness benchmark on a small scale: torch samples, virtual time, real gradients."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import msgspec
import pytest

from perf import staleness
from perf.staleness_chart import smoothed
from perf.staleness_task import Setting, spans_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_the_staleness_benchmark_writes_its_figures_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "2", "--staleness", "0", "2", "--corrections", "truncated", "--steps", "6", "--groups", "5"]
    assert staleness.main([*options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "staleness.json").read_bytes())
    runs = msgspec.convert(found["runs"], list[staleness.Ran])
    assert [(ran.setting.seed, ran.setting.staleness) for ran in runs] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert [ran.mean_staleness for ran in runs] == [0.0, 2.0, 0.0, 2.0]
    assert all(len(ran.scores) == 6 for ran in runs)
    rows = msgspec.convert(found["summary"], list[staleness.Row])
    assert [(row.staleness, row.correction, row.change is None) for row in rows] == [
        (0, "-", True), (2, "truncated", False)
    ]  # fmt: skip
    drawn = ElementTree.fromstring((tmp_path / "staleness.svg").read_text())
    assert len(drawn.findall(".//{http://www.w3.org/2000/svg}polyline")) == 2
    assert "against synchronous" in capsys.readouterr().out


def test_a_synchronous_run_of_one_seed_is_the_same_each_time(tmp_path: Path) -> None:
    setting = Setting(seed=3, staleness=0, correction="none", steps=3, groups_per_step=5, group_size=4, lr=3e-3,
                      minibatches=1, algorithm="flowrl.algorithms.grpo:GRPO", entropy=0.01)  # fmt: skip
    first, second = (staleness.run_once(setting, tmp_path / name) for name in ("a", "b"))
    assert first.scores == second.scores


def test_tokens_of_one_version_are_one_span() -> None:
    spans = spans_of([4, 4, 5, 5, 5])
    assert [(span.version, span.start, span.end) for span in spans] == [(4, 0, 2), (5, 2, 5)]


def test_a_long_curve_is_drawn_by_its_means() -> None:
    assert smoothed([1.0, 3.0, 5.0], points=2) == [(0.5, 2.0), (2.0, 5.0)]
