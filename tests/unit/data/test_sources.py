from __future__ import annotations

import datetime
import gzip
import json
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


def test_bytes_are_no_text_and_a_map_is_an_object(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    options = pa.array([[("enable_thinking", False)]], pa.map_(pa.string(), pa.bool_()))
    pq.write_table(pa.table({"image": pa.array([b"abc"], pa.binary()), "options": options}), tmp_path / "x.parquet")
    (row,) = read(tmp_path / "x.parquet")
    assert row.columns == {"image": b"abc", "options": {"enable_thinking": False}}


@pytest.mark.slow  # imports pyarrow, and pandas for nanoseconds
def test_what_python_cannot_hold_as_it_is_stands_for_itself_or_is_a_bad_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    times = pa.array([1577934245123456789, 0, None], pa.timestamp("ns"))
    maps = pa.array([[("a", 1)], [("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"time": times, "map": maps}), tmp_path / "x.parquet")
    said: list[str] = []
    rows = list(read_rows(f"{tmp_path}/x.parquet", split="", subset="", bad=lambda error: said.append(str(error))))
    assert [row.columns for row in rows] == [
        {"time": "2020-01-02T03:04:05.123456789", "map": {"a": 1}}, {"time": None, "map": {}}
    ]  # fmt: skip
    assert len(said) == 1
    assert "x.parquet row 1: cannot be read (" in said[0]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "y.parquet")
    with pytest.raises(DataError, match="names the column 'prompt' twice"):
        read(tmp_path / "y.parquet")


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
    with pytest.raises(DataError, match=r"no file or folder is named 'train' .*\(found dev\.jsonl\)"):
        read(tmp_path)


@pytest.mark.slow
def test_saved_data_set_is_read_by_split(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}).save_to_disk(str(tmp_path / "saved"))
    assert [row.columns for row in read(tmp_path / "saved")] == [{"prompt": "a"}]
    with pytest.raises(DataError, match=r"no split 'dev'.*found train"):
        read(tmp_path / "saved", split="dev")
    assert [row.columns for row in read(tmp_path / "saved" / "train")] == [{"prompt": "a"}]
    with pytest.raises(DataError, match=r"is one data set, without a split 'dev'"):
        read(tmp_path / "saved" / "train", split="dev")


@pytest.mark.slow
def test_unreachable_hub_data_set_says_what_to_do():
    with pytest.raises(DataError, match="data nobody/nothing: cannot be fetched from the hub") as caught:
        read("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone.jsonl", "no such file"), ("./gone", "no such file"), ("a.txt", "is a .txt file"),
        ("", "data.source: is empty"), ("[a.jsonl, b.jsonl]", r"is a list; give several sources as data.mix=\["),
    ],
)  # fmt: skip
def test_source_that_is_not_there_or_of_another_kind_is_refused(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("prompt\n")
    with pytest.raises(DataError, match=said):
        read(name)


ROWS = [{"prompt": "a"}, {"prompt": "ä\nb"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("x.json", json.dumps(ROWS).encode()),
        ("x.json", b"\xef\xbb\xbf" + json.dumps({"version": 1, "data": ROWS}).encode()),
        ("x.json", json.dumps({"test": [], "train": ROWS}).encode()),
        ("x.json", LINES),
        ("x.csv", 'prompt\na\n"ä\nb"\n'.encode("utf-8-sig")),
        ("X.JSONL.GZ", gzip.compress(LINES, mtime=0)),
        ("x.CSV", ' prompt \na\n"ä\nb"\n'.encode()),
        ("x.csv", ' prompt \n a\n "ä\nb"\n'.encode()),
        ("x.tsv.gz", gzip.compress('prompt\r\na\r\n"ä\nb"\r\n'.encode(), mtime=0)),
    ],
)
def test_text_files_of_every_format_give_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row.columns for row in read(tmp_path / name)] == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["new_file", "new_stream"])
def test_arrow_files_of_both_kinds_are_read(tmp_path, writer):
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with getattr(pa.ipc, writer)(str(tmp_path / "x.arrow"), table.schema) as file:
        file.write_table(table)
    assert [(row.place, row.columns) for row in read(tmp_path / "x.arrow")] == [
        (f"{tmp_path / 'x.arrow'} row {number}", row) for number, row in enumerate(ROWS)
    ]


def test_places_are_lines_of_the_file_also_where_a_cell_has_several(tmp_path):
    (tmp_path / "x.csv").write_text('a,b\n1,"two\nlines"\n\n3,4\n5\n')
    said: list[str] = []
    rows = list(read_rows(f"{tmp_path}/x.csv", split="", subset="", bad=lambda error: said.append(str(error))))
    assert [row.place.rpartition(":")[2] for row in rows] == ["2", "5"]
    assert len(said) == 1
    assert "x.csv:6: has 1 cells, the first line names 2 columns" in said[0]


def test_the_files_of_a_split_are_told_by_whole_words(tmp_path):
    names = ["train.jsonl", "train_0.jsonl", "train/a.jsonl", "data/train-1.jsonl"]
    others = [
        "training_notes.jsonl",
        "train_sft-00000.jsonl",
        "test.jsonl",
        ".hidden/train.jsonl",
        "dataset_infos.json",
    ]
    for name in [*names, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    assert sorted(row.columns["prompt"] for row in read(tmp_path)) == sorted(names)


def test_a_split_of_one_kind_is_taken_and_of_several_one_is_asked_for(tmp_path):
    for kind in ("train_sft", "test_sft"):
        (tmp_path / f"{kind}-00000-of-00001.jsonl").write_text(json.dumps({"prompt": kind}) + "\n")
    assert [row.columns["prompt"] for row in read(tmp_path)] == ["train_sft"]
    (tmp_path / "train_gen.jsonl").write_text('{"prompt": "c"}\n')
    with pytest.raises(
        DataError, match=r"no split 'train' but several kinds of it: train_gen, train_sft; set data\.split"
    ):
        read(tmp_path)


def test_a_directory_s_subset_is_its_folder_and_is_asked_for_where_its_card_names_several(tmp_path):
    for name in ("main/train-0.jsonl", "main/test-0.jsonl", "other/train-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    assert [row.columns["prompt"] for row in read(tmp_path / "main")] == ["main/train-0.jsonl"]
    with pytest.raises(DataError, match=r"holds the split 'train' in several folders: main, other; set data\.subset"):
        read(tmp_path)
    assert len(read(tmp_path, split="")) == 3
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: main\n  x: y\n- config_name: other\n---\n")
    with pytest.raises(DataError, match=r"holds several subsets: main, other; set data\.subset to one of them"):
        read(tmp_path)
    found = read_rows(str(tmp_path), split="train", subset="main", bad=lambda _: None)
    assert [row.columns["prompt"] for row in found] == ["main/train-0.jsonl"]
    with pytest.raises(DataError, match=r"has no folder 'mane' \(found main, other\)"):
        list(read_rows(str(tmp_path), split="train", subset="mane", bad=lambda _: None))


@pytest.mark.slow
def test_a_saved_data_set_is_read_as_it_is_stored(tmp_path):
    from datasets import Dataset, Features, Image, Value

    columns = {"prompt": ["a", "b"], "picture": [{"bytes": b"no image", "path": None}] * 2, "n": [1, 2]}
    features = Features({"prompt": Value("string"), "picture": Image(), "n": Value("int64")})
    found = Dataset.from_dict(columns, features=features).select([1, 0])
    found.set_format("numpy", columns=["n"])
    found.save_to_disk(str(tmp_path / "saved"))
    picture = {"bytes": b"no image", "path": None}
    assert [row.columns for row in read(tmp_path / "saved")] == [
        {"prompt": "b", "picture": picture, "n": 2}, {"prompt": "a", "picture": picture, "n": 1}
    ]  # fmt: skip
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"junk")
    with pytest.raises(DataError, match=r"saved: cannot be read \(.*; write it again by save_to_disk"):
        read(tmp_path / "saved")


def test_a_split_or_subset_that_a_file_cannot_have_is_refused(jsonl):
    source = jsonl([{"prompt": "a"}])
    with pytest.raises(DataError, match=r"is one file, without a split 'test'; leave data\.split out"):
        read(source, split="test")
    with pytest.raises(DataError, match=r"lies here and has no subset 'main'; leave data\.subset out"):
        list(read_rows(str(source), split="train", subset="main", bad=lambda _: None))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", '{"prompt": "a"}'.encode("utf-16"), "x.jsonl: is UTF-16"),
        ("x.csv", "prompt\na".encode("utf-16-le"), "x.csv: is UTF-16"),
        ("x.csv", "prompt\nä".encode("latin-1"), "x.csv: is not UTF-8"),
        ("x.csv", b'prompt\na\n"open\n', "x.csv:3: is not a table"),
        ("x.csv", b"prompt;answer\na;b\n", "x.csv:1: names one column, 'prompt;answer': is it ';' that"),
        ("x.csv", b"a,a\n1,2\n", "x.csv:1: names the column 'a' twice"),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "x.jsonl.gz: cannot be read"),
        ("x.json", b'{"prompt": "a"}', "holds one object, with prompt"),
        ("x.json", b'[{"prompt": "a"}', "x.json: is not JSON"),
        ("x.json", b'[{"prompt": "a"}, 3]', "x.json row 1: holds a int"),
        ("x.jsonl", b'{"a": 1}\n{"n": 18446744073709551616}', "x.jsonl:2: column 'n' holds an integer beyond 64"),
        ("x.jsonl", b'{"a": ' + 5000 * b"[" + 5000 * b"]" + b"}", "x.jsonl:1: is nested more than 64 deep"),
        ("x.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}', "x.jsonl:2: gives 'a' twice in one object"),
        ("x.jsonl", b'{"m": [{"role": "user", "role": "tool"}]}', "x.jsonl:1: gives 'role' twice in one object"),
        ("x.json", b'[{"a": 1, "a": 1}]', "x.json row 0: gives 'a' twice in one object"),
        ("x.json", b'[{"a": ' + 100 * b"[" + 100 * b"]" + b"}]", "x.json row 0: is nested more than 64 deep"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
