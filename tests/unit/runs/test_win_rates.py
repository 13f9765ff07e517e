"""AlpacaEval's win rates, against what alpaca_eval 0.6.6 itself computed on the same annotations (win_rates.json).

They were recorded by its `get_length_controlled_winrate`, with `df_gamed.csv` made up: the real one lies on a hub.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from flowrl.errors import DataError
from flowrl.runs.win_rates import LengthControl, raw, read_gamed


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("win_rates.json").read_bytes())


def test_the_raw_win_rate_is_upstreams(recorded: dict[str, Any]) -> None:
    expected = recorded["upstream"]["length_controlled_v1"]
    won = raw(recorded["preferences"])
    assert 100 * fmean(won) == pytest.approx(expected["win_rate"], abs=1e-6)
    assert len(won) == expected["n_total"]
    assert sum(each == 0.5 for each in won) == expected["n_draws"]


@pytest.mark.slow  # scikit-learn is loaded
@pytest.mark.parametrize("name", ["length_controlled_v1", "length_controlled_minimal"])
def test_the_length_controlled_win_rate_is_upstreams(recorded: dict[str, Any], name: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    with (tmp_path / "df_gamed.csv").open("w", newline="") as file:
        csv.writer(file).writerows(recorded["gamed"])
    gamed = read_gamed(tmp_path / "df_gamed.csv") if name == "length_controlled_v1" else None
    control = LengthControl(recorded["preferences"], recorded["lengths"], gamed)
    expected = recorded["upstream"][name]["length_controlled_winrate"]
    assert 100 * fmean(control.predicted()) == pytest.approx(expected, abs=1e-6)
    everything = [*range(len(recorded["lengths"]))]
    assert 100 * control.drawn(everything) == pytest.approx(expected, abs=1e-6)


def test_a_file_that_is_not_the_gamed_answers_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "df_gamed.csv"
    path.write_text(
        "index,instruction_difficulty,std_delta_len,preference,not_gamed_baseline\n0,1,1,1,True\n1,x,1,1,True\n"
    )
    with pytest.raises(DataError, match=r"df_gamed\.csv, line 3: is not as AlpacaEval's"):
        read_gamed(path)


def test_lengths_that_never_differ_cannot_be_controlled_for() -> None:
    with pytest.raises(DataError, match="3 answers differ in length by the same"):
        LengthControl([1.0, 2.0, 1.5], [(3, 2), (5, 4), (9, 8)], None)
