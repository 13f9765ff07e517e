"""Rows from files, directories and the Hugging Face hub, each with the place it came from.

`read_rows` yields rows in the order of the source; a row is a mapping of JSON-able columns and its place ("a.jsonl:12")
goes into every later error. A row that cannot be read is handed to `bad`, which raises or counts. Called by
`load_prompts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Bad = Callable[[DataError], None]

FORMATS = (".jsonl", ".parquet")


class RawRow(msgspec.Struct, frozen=True):
    """One row as it was found."""

    place: str  # file and line, or file and row, for errors
    columns: dict[str, Any]


def read_rows(source: str, *, split: str, subset: str, bad: Bad) -> Iterator[RawRow]:
    """Yield every row of a file, a directory, a run of graphs/generate.py or a hub data set.

    Raises:
        DataError: the source is missing, of an unknown kind, unreachable or damaged as a whole.
    """
    path = Path(source).expanduser()
    if (path / "settings.yaml").is_file():  # a run: what its writer has written
        path = path / "data"
    if path.is_dir():
        yield from _read_directory(path, split, bad)
    elif path.is_file():
        yield from _read_file(path, bad)
    elif path.suffix in (*FORMATS, ".json", ".csv", ".gz") or source.startswith(("/", ".", "~")):
        raise DataError(f"data {source}", "no such file or directory", "check data.source")
    else:
        yield from _read_hub(source, split, subset)


def _read_file(path: Path, bad: Bad) -> Iterator[RawRow]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, bad)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise DataError(f"data {path}", f"is a {path.suffix or 'nameless'} file", "give .jsonl or .parquet")


def _read_directory(path: Path, split: str, bad: Bad) -> Iterator[RawRow]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        yield from _read_saved(path, split)
        return
    files = sorted(p for p in path.iterdir() if p.suffix in FORMATS)
    if not files:
        raise DataError(f"data {path}", "holds no .jsonl or .parquet file", "give a directory that does")
    chosen = [p for p in files if p.name.startswith(split)]
    if not chosen:
        names = ", ".join(p.name for p in files[:5])
        raise DataError(
            f"data {path}", f"no file begins with {split!r} (found {names})", 'set data.split="" to take all'
        )
    for file in chosen:
        yield from _read_file(file, bad)


def _read_jsonl(path: Path, bad: Bad) -> Iterator[RawRow]:
    decode = msgspec.json.Decoder().decode
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                bad(DataError(place, f"is not JSON ({error})", "mend the line, or set data.on_bad=skip"))
                continue
            if isinstance(row, dict):
                yield RawRow(place, cast("dict[str, Any]", row))
            else:
                found = f"holds a {type(row).__name__}, not an object"
                bad(DataError(place, found, "write one JSON object a line, or set data.on_bad=skip"))


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        place = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield RawRow(f"{path} row {place}", _jsonable(row, f"{path} row {place}"))
                place += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data {path}", f"cannot be read as Parquet ({error})", "write the file again") from error


def _read_saved(path: Path, split: str) -> Iterator[RawRow]:
    """Read what `datasets` wrote with save_to_disk."""
    from datasets import Dataset, load_from_disk

    found = load_from_disk(str(path))
    if not isinstance(found, Dataset):
        if split not in found:
            raise DataError(
                f"data {path}", f"no split {split!r} (found {', '.join(map(str, found))})", "set data.split"
            )
        found = found[split]
    yield from _number(str(path), found)


def _read_hub(source: str, split: str, subset: str) -> Iterator[RawRow]:
    from datasets import load_dataset
    from huggingface_hub.errors import HTTPError

    where = f"data {source}"
    try:
        found = load_dataset(source, subset or None, split=split or "train")
    except (OSError, HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        remedy = "check the id and the network, or copy the data here as .jsonl or .parquet"
        raise DataError(where, f"cannot be fetched from the hub ({reason})", remedy) from error
    except ValueError as error:  # an unknown split, or a data set with several subsets
        reason = str(error).splitlines()[0]
        raise DataError(where, f"cannot be loaded ({reason})", "set data.split or data.subset") from error
    yield from _number(source, found)


def _number(source: str, rows: Any) -> Iterator[RawRow]:
    for place, row in enumerate(rows):
        yield RawRow(f"{source} row {place}", _jsonable(row, f"{source} row {place}"))


def _jsonable(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the row with dates, decimals and the like as JSON has them; columns travel in messages."""
    try:
        return cast("dict[str, Any]", msgspec.to_builtins(row, str_keys=True))
    except TypeError as error:
        raise DataError(place, f"a column cannot be sent to reward functions ({error})", "drop the column") from error
