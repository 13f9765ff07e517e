"""Data of one's own, in the shapes and files that there are, through the command as a user gives it."""

from __future__ import annotations

import gzip
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.cli import main
from tests.support.command import ROOT, tiny_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

GROUPS, SFT = ROOT / "graphs" / "group_async.py", ROOT / "graphs" / "sft.py"
EXACT = "flowrl.rewards.verify:exact_answer"


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": user(f"{i} + 1?"), "reward_model": {"style": "rule", "ground_truth": str(i)}} for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), path)


SHAPES: list[tuple[str, Callable[[Path], Any], list[str], str]] = [
    (
        "a.jsonl",
        lambda path: path.write_bytes(
            b"\xef\xbb\xbf" + lines([{"question": f"{i}?", "answer": f"so #### {i}"} for i in range(12)])
        ),
        [],
        "question",
    ),
    (
        "b.csv.gz",
        lambda path: path.write_bytes(
            gzip.compress(b"instruction,input,output\n" + b"".join(b"Add,%d,%d\n" % (i, i) for i in range(12)))
        ),
        ["data.columns.answer=output"],
        "instruction",
    ),
    (
        "c.json",
        lambda path: path.write_text(json.dumps([{"messages": user(f"{i}?"), "answer": i} for i in range(12)])),
        [],
        "messages",
    ),
    ("d.parquet", parquet, ["data.columns.answer=reward_model"], "prompt"),
    (
        "e/train/0.jsonl",
        lambda path: path.write_bytes(
            lines([{"problem": f"{i}?", "solution": rf"\boxed{{{i}}}", "level": i % 3} for i in range(12)])
        ),
        ["data.columns.answer=solution"],
        "problem",
    ),
]


@pytest.mark.parametrize(("name", "write", "settings", "column"), SHAPES, ids=[name for name, *_ in SHAPES])
def test_prompts_of_every_shape_pass_the_check_of_a_run_as_they_are(
    name: str, write: Callable[[Path], Any], settings: list[str], column: str, tiny: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    source = tmp_path / "e" if name.startswith("e/") else path
    more = {"data.source": source, "data.num_train": 0, "reward.function": EXACT}
    options = [*tiny_settings(tiny, GROUPS, **more), *(part for each in settings for part in ("--set", each))]
    code = main(["check", str(GROUPS), *options])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert f"prompts: 8 to train on, 4 held out, asked in the column {column!r}" in printed.out


def test_a_run_is_resumed_with_its_own_data_and_settings_only(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} + 1?", "completion": f" {i + 1}"} for i in range(16)]
    (tmp_path / "data.jsonl").write_bytes(lines(rows))
    settings = {
        "model": tiny, "runtime": "local", "steps": 2, "examples_per_step": 4, "data.source": "data.jsonl",
        "data.num_heldout": 4, "learner.engine": "flowrl.engines.torch:TorchEngine", "learner.dtype": "float32",
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]

    def resumed(*overrides: str) -> tuple[int, str]:
        code = main(["run", str(SFT), "--resume", "runs/a", *(part for each in overrides for part in ("--set", each))])
        printed = capsys.readouterr()
        return code, printed.err if code else printed.out

    assert main(["run", str(SFT), "--name", "a", *options]) == 0
    capsys.readouterr()
    code, said = resumed("steps=3", "data.seed=7")
    assert (code, said.count("\n")) == (2, 1)
    assert "data.seed: is 7, but the run has 0" in said
    (tmp_path / "data.jsonl").write_bytes(lines([*rows, rows[0]]))
    code, said = resumed("steps=3")
    assert (code, said.count("\n")) == (2, 1)
    assert "the data have changed since the run began (then 16 rows" in said
    (tmp_path / "data.jsonl").write_bytes(lines(rows[::-1]))
    code, said = resumed("steps=3", "learner.lr=1e-3")
    assert code == 0, said
    assert "learner.lr is 0.001 from here on" in said
    changed = json.loads((tmp_path / "runs" / "a" / "attempts" / "001.json").read_text())["changed"]
    assert changed["steps"] == {"old": 2, "new": 3}


@pytest.mark.parametrize("given", ["reference_model={short}", "objective={{use: FullDistillation, teacher: {short}}}"])
def test_whoever_reads_the_rows_beside_the_policy_has_positions_for_them(
    given: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = shutil.copytree(tiny, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    row = {"prompt": "0123456789", "chosen": "0123456789", "rejected": "1"}
    if "teacher" in given:
        row = {"prompt": row["prompt"], "completion": row["chosen"]}
    (tmp_path / "data.jsonl").write_bytes(lines([row] * 2))
    graph = ROOT / "graphs" / ("sft.py" if "teacher" in given else "preference.py")
    settings = [
        f"model={tiny}",
        f"data.source={tmp_path / 'data.jsonl'}",
        "data.num_heldout=0",
        given.format(short=short),
    ]
    code = main(["check", str(graph), *(part for each in settings for part in ("--set", each))])
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    assert f"data.jsonl:1: has 21 tokens, and {short} positions for 20" in said
