from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from flowrl.data.sources import RawRow, read_rows
from flowrl.errors import DataError


def read(source: str | Path, split: str = "train") -> list[RawRow]:
    def fail(error: DataError) -> None:
        raise error

    return list(read_rows(str(source), split=split, subset="", bad=fail))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def test_jsonl_rows_carry_their_line_and_blank_lines_are_none(jsonl):
    source = jsonl([{"prompt": "a"}, "", {"prompt": "b"}])
    assert [(row.place, row.columns["prompt"]) for row in read(source)] == [(f"{source}:1", "a"), (f"{source}:3", "b")]


@pytest.mark.slow  # the first use imports pyarrow
def test_parquet_columns_come_as_json_has_them(tmp_path):
    messages = [{"role": "user", "content": "a"}]
    write_parquet(tmp_path / "x.parquet", [{"prompt": messages, "day": datetime.date(2024, 5, 1)}])
    assert [row.columns for row in read(tmp_path / "x.parquet")] == [{"prompt": messages, "day": "2024-05-01"}]


@pytest.mark.slow
def test_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read as Parquet"):
        read(tmp_path / "x.parquet")


def test_directory_gives_the_files_of_the_split_in_order(tmp_path, jsonl):
    for name in ("train-1", "train-0", "test"):
        jsonl([{"prompt": name}], f"{name}.jsonl")
    assert [row.columns["prompt"] for row in read(tmp_path)] == ["train-0", "train-1"]
    assert [row.columns["prompt"] for row in read(tmp_path, split="")] == ["test", "train-0", "train-1"]


def test_directory_without_the_split_names_what_is_there(tmp_path, jsonl):
    jsonl([{"prompt": "a"}], "dev.jsonl")
    with pytest.raises(DataError, match=r"no file begins with 'train' \(found dev\.jsonl\)"):
        read(tmp_path)


@pytest.mark.slow
def test_saved_data_set_is_read_by_split(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}).save_to_disk(str(tmp_path / "saved"))
    assert [row.columns for row in read(tmp_path / "saved")] == [{"prompt": "a"}]
    with pytest.raises(DataError, match=r"no split 'dev'.*found train"):
        read(tmp_path / "saved", split="dev")


@pytest.mark.slow
def test_unreachable_hub_data_set_says_what_to_do():
    with pytest.raises(DataError, match="data nobody/nothing: cannot be fetched from the hub") as caught:
        read("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"), [("gone.jsonl", "no such file"), ("./gone", "no such file"), ("a.csv", "is a .csv file")]
)
def test_source_that_is_not_there_or_of_another_kind_is_refused(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("prompt\n")
    with pytest.raises(DataError, match=said):
        read(name)
