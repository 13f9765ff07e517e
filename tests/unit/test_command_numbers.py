"""Numbers on the command line that native code could not hold are refused by name, before anything is looked at."""

from __future__ import annotations

import pytest

from flowrl.cli import main


@pytest.mark.parametrize(
    "given",
    [
        ["inspect", "RUN", "--limit", str(1 << 63)],
        ["inspect", "RUN", "--group", "9" * 5000],
        ["retrain", "RUN", "--steps", f"0:{1 << 70}"],
        ["retrain", "RUN", "--steps", "²:3"],
        ["simulate", "graph.py", "--steps", "1e3"],
    ],
    ids=["beyond 64 bits", "digits without end", "beyond them in a range", "no digit", "no whole number"],
)
def test_a_number_is_a_whole_one_of_64_bits(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is not a whole number of 64 bits" in said or "is not FIRST:END" in said
    assert len(said) < 200
