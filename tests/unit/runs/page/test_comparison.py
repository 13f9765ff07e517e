"""Runs side by side: what differs is shown, equal prompts are paired, and nothing of a run gets out of place."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import pytest

from flowrl.cli import main
from flowrl.runs.page.comparison import MOST_RUNS
from flowrl.telemetry.events import Evaluation
from flowrl.telemetry.metrics import read_evaluations
from tests.support.past_run import HOSTILE, past_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("compare")
    return [past_run(home / name, num_steps=steps, num_recorded=1) for name, steps in (("first", 3), ("second", 5))]


def compared(runs: list[Path], out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return the page as text, and what was printed."""
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    return html.unescape(" ".join(out.read_text().split())), capsys.readouterr().out


def test_two_runs_have_one_page_with_what_differs(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, said = compared(runs, tmp_path / "page.html", capsys)
    lines = said.splitlines()
    assert lines[0].startswith("run")
    assert [line.split()[:2] for line in lines[1:3]] == [["first", "3"], ["second", "5"]]
    for section in ("runs", "heldout", "learning", "settings", "samples"):
        assert f'<section id="{section}">' in page
    assert "second - first, paired by prompt: no prompt's score changed." in page  # both end with the same scores
    first, last = (each.scores for each in read_evaluations(runs[0] / "metrics.jsonl"))
    assert first != last
    for name in ("first", "second"):
        assert f"<b>{name}</b>" in page
    assert "src=" not in page  # nothing from anywhere else


def with_setting(directory: Path, old: str, new: str) -> Path:
    run = past_run(directory, num_steps=3, num_recorded=1)
    text = (run / "settings.yaml").read_text()
    assert old in text
    (run / "settings.yaml").write_text(text.replace(old, new, 1))
    return run


def test_settings_that_are_the_same_are_left_out(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = with_setting(tmp_path / "changed", "lr: 1.0e-05", "lr: 0.5")
    page, _ = compared([runs[0], changed], tmp_path / "page.html", capsys)
    table = page[page.index('<section id="settings">') : page.index('<section id="samples">')]
    assert "0.5" in table
    assert table.count("<tr>") == 2  # the head, and the one that differs


def test_scores_of_other_prompts_are_not_paired(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_setting(tmp_path / "other", "seed: 0", "seed: 1")
    assert (other / "settings.yaml").read_text().startswith("seed: 1")
    page, _ = compared([runs[0], other], tmp_path / "page.html", capsys)
    assert "other - first: not the same prompts (seed), so there is no paired difference." in page


def test_what_a_run_holds_does_nothing_to_the_page(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = past_run(tmp_path / "hostile", text=HOSTILE, num_steps=3, num_recorded=1)
    with (hostile / "metrics.jsonl").open("ab") as file:
        import msgspec

        from flowrl.telemetry.metrics import row_of

        said = [{"prompt": HOSTILE, "completion": HOSTILE, "reward": "1"}]
        file.write(
            msgspec.json.encode(row_of(Evaluation(version=9, time_s=1.0, scores=[[1.0]], completions=said))) + b"\n"
        )
    out = tmp_path / "page.html"
    compared([hostile, runs[0]], out, capsys)
    assert out.read_text().count("<script>") == 1
    assert "<img" not in out.read_text()


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, f"1 run given; name 2 to {MOST_RUNS}"), (MOST_RUNS + 1, f"{MOST_RUNS + 1} runs"), (-2, "named twice")],
)
def test_too_few_too_many_and_one_twice_are_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, said: str
) -> None:
    named = [str(runs[0])] * abs(count)
    assert main(["compare", *named, "--out", str(tmp_path / "page.html")]) == 2
    assert said in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("flowrl: ")
