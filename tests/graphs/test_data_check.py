"""`flowrl data check` reports on standard output, and ends in one line and exit code 2 where a run would stop."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.cli import main
from tests.support.command import ROOT, flowrl

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_data_set_is_reported_without_escape_codes_off_a_terminal(tiny: Path, tmp_path: Path) -> None:
    result = flowrl("data", "check", write(tmp_path / "a.jsonl", [PAIR]), "--model", tiny, cwd=tmp_path)
    assert result.code == 0, result.text
    assert "preference, standard, explicit prompt (detected)" in result.text
    assert "chosen: ⟦ blue.<|im_end|>⟧" in result.text
    assert "\x1b" not in result.text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ([PAIR, '{"prompt": '], [], ":2: is not JSON"),
        ([{"body": "a"}], [], ":1: has the columns body"),
        ([PAIR], ["--format", "unpaired-preference"], "which are not those of unpaired-preference"),
        ([PAIR], ["--format", "pairs"], "data.format: expected one of preference"),
        ([PAIR], ["--set", "data.max_tokens=6"], "tokens, data.max_tokens is 6"),
        ([PAIR], ["--set", "data.max_token=6"], "did you mean 'max_tokens'"),
        ([PAIR], ["--set", "lr=1"], "lr"),
        ([PAIR], ["--model", "/no/such/model"], "/no/such/model"),
        ([], [], "a.jsonl: holds no rows"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    rows: list[Any], arguments: list[str], said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", rows)
    assert_refused(["data", "check", str(source), "--model", str(tiny), *arguments], said, capsys)


def test_a_missing_file_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "flowrl: data ./nowhere.jsonl: no such file or directory; check data.source"
    assert_refused(["data", "check", "./nowhere.jsonl", "--model", str(tiny)], said, capsys)


def assert_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("flowrl: "), lines
    assert said in lines[0], lines


def test_a_parquet_file_is_read_with_the_nulls_it_is_written_with(tiny: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    rows = [{"messages": said, "text": None}, {"messages": said[:1] + said, "text": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    result = flowrl("data", "check", tmp_path / "a.parquet", "--model", tiny, cwd=tmp_path)
    assert result.code == 0, result.text
    assert "2 to train on" in result.text


def test_help_of_the_command_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "datasets", "pyarrow", "jinja2", "numpy"]
    code = (
        "import sys\nfrom flowrl.cli import main\n"
        "try:\n    main(['data', 'check', '--help'])\n"
        f"finally:\n    sys.stderr.write(str([name for name in {heavy} if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--format" in result.stdout
    assert result.stderr == "[]"
