"""Rows from files, directories and the Hugging Face hub, each with the place it came from.

`read_rows` yields rows in the order of the source; a row is a mapping of columns that can be sent as JSON; its place
(in a file of lines the line, "a.jsonl:12", else the row counted from 0) goes into every later error. A row that cannot
be read is handed to `bad`, which raises or counts. Called by `load_prompts` and `load_examples`.

Tests: tests/unit/data/test_sources.py
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import msgspec

from flowrl.errors import DataError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Bad = Callable[[DataError], None]

TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # each also with .gz behind
FORMATS = (*TEXT_FORMATS, ".parquet", ".arrow")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # that folders and files are named for
SAVED = ("dataset_info.json", "state.json")  # what save_to_disk puts beside a data set's files
NO_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})  # about data
MAX_DEPTH = 64  # of lists and objects in one another: templates and encoders walk them by recursion
UNHELD = (LookupError, OverflowError, ValueError)  # of what Arrow holds and Python does not: a key twice, the year 0
MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8, as Windows writes it


class RawRow(msgspec.Struct, frozen=True):
    """One row as it was found."""

    place: str  # file and line, or file and row, for errors
    columns: dict[str, Any]
    is_columnar: bool = (
        False  # from Parquet and its like: an object has every field that any has, null where it lacks it
    )


def read_rows(source: str, *, split: str, subset: str, bad: Bad) -> Iterator[RawRow]:
    """Yield every row of a file, a directory, a run of graphs/generate.py or a hub data set.

    Raises:
        DataError: the source is missing, of an unknown kind, unreachable or damaged as a whole.
    """
    if not source.strip():
        raise DataError("data.source", "is empty", "give a file, a directory or a Hugging Face id")
    if source.lstrip().startswith("["):
        raise DataError(f"data {source}", "is a list", "give several sources as data.mix=[{source: a.jsonl}, ...]")
    path = Path(source).expanduser()
    if (path / "settings.yaml").is_file():  # a run: what its writer has written
        path = path / "data"
    if path.is_file() and subset:
        raise DataError(f"data {source}", f"lies here and has no subset {subset!r}", "leave data.subset out")
    if path.is_dir():
        yield from _read_directory(path, split, subset, bad)
    elif path.is_file():
        if split not in ("train", "") and _format(path) != ".json":  # which may hold several
            what = f"is one file, without a split {split!r}"
            raise DataError(f"data {source}", what, "leave data.split out, or give the directory of the splits' files")
        yield from _read_file(path, split, bad)
    elif _format(path) in (*FORMATS, ".gz") or source.startswith(("/", ".", "~")):
        raise DataError(f"data {source}", "no such file or directory", "check data.source")
    else:
        yield from _read_hub(source, split, subset, bad)


class DataDigest:
    """A digest of rows whatever their order: their number, and a sum of their digests."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._sum = 0

    def add(self, columns: dict[str, Any], source: int = 0) -> None:
        """Take in a row of the source of this number."""
        content = msgspec.msgpack.encode([source, columns], order="deterministic")
        self._num_rows += 1
        self._sum += int.from_bytes(blake2b(content, digest_size=16).digest(), "little")

    def __str__(self) -> str:
        return f"{self._num_rows} rows, {self._sum % (1 << 128):032x}"


def is_of_split(name: str, split: str) -> bool:
    """Say whether a file or folder holds rows of a split by its name; "" is every split.

    `train` has train, train.jsonl, train-00000-of-00002.parquet and train_0.jsonl, but not training_notes.jsonl; nor
    train_sft.jsonl, which is of the split train_sft.
    """
    return not split or re.match(rf"{re.escape(split)}(?:[-.]|[_ ]?\d|\Z)", name) is not None


def _format(path: Path) -> str:
    """Return a file's format by its name: ".csv" for a.csv and a.csv.gz."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return inner if last == ".gz" and inner in TEXT_FORMATS else last


def _read_file(path: Path, split: str, bad: Bad) -> Iterator[RawRow]:
    format = _format(path)
    if format not in FORMATS:
        raise DataError(f"data {path}", f"is a {format or 'nameless'} file", f"give one of {', '.join(FORMATS)}")
    if format == ".parquet":
        yield from _read_parquet(path, bad)
    elif format == ".arrow":
        yield from _read_arrow(path, bad)
    else:
        try:
            with _opened(path) as file:
                if format in (".csv", ".tsv"):
                    yield from _read_table(path, file, "," if format == ".csv" else "\t", bad)
                elif format == ".json":
                    yield from _read_json(path, file, split, bad)
                else:
                    yield from _read_lines(path, file, bad)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"data {path}", f"cannot be read ({error})", "write the file again") from error


def _read_directory(path: Path, split: str, subset: str, bad: Bad) -> Iterator[RawRow]:
    if (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in SAVED):
        if subset:
            what = f"was written by save_to_disk and has no subset {subset!r}"
            raise DataError(f"data {path}", what, "leave data.subset out")
        yield from _read_saved(path, split, bad)
        return
    names = sorted(each.relative_to(path) for each in path.rglob("*") if each.is_file() and _format(each) in FORMATS)
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    names = [name for name in names if name.name not in NO_DATA]
    if not names:
        raise DataError(f"data {path}", f"holds no file of {', '.join(FORMATS)}", "give a directory that does")
    names = _of_subset(path, names, subset)
    chosen = _of_split(names, split)
    if not chosen and (kinds := _kinds(names, split)):
        if len(kinds) > 1:
            what = f"holds no split {split!r} but several kinds of it: {', '.join(kinds)}"
            raise DataError(f"data {path}", what, "set data.split to one of them")
        chosen = _of_split(names, kinds[0])
    if not chosen:
        found = ", ".join(map(str, names[:5]))
        remedy = 'set data.split to how one begins, or to "" to take all'
        raise DataError(f"data {path}", f"no file or folder is named {split!r} or {split}-... (found {found})", remedy)
    if len(several := {*chosen.values()}) > 1:
        what = f"holds the split {split!r} in several folders: {', '.join(sorted(several))}"
        raise DataError(f"data {path}", what, "set data.subset to one of them, or name each as a source of data.mix")
    for name in chosen:
        yield from _read_file(path / name, split, bad)


def _of_split(names: list[Path], split: str) -> dict[Path, str]:
    """Return the files of a split, each with the folder that the split stands in (`data` is the hub's word for any).

    What is nearest to the rows says it: train/test-0.parquet is of the split test.
    """
    found: dict[Path, str] = {}
    for name in names:
        places = [k for k, part in enumerate(name.parts) if any(is_of_split(part, each) for each in (split, *SPLITS))]
        if not split or (places and is_of_split(name.parts[places[-1]], split)):
            before = name.parts[: places[-1]] if split else ()
            found[name] = "/".join(part for part in before if part != "data") or "."
    return found


def _kinds(names: list[Path], split: str) -> list[str]:
    """Return the splits whose names begin with a split's and a word: of `train` train_sft and train_gen."""
    found = [re.match(rf"{re.escape(split)}_[a-zA-Z]+", part) for name in names for part in name.parts]
    return sorted({each.group() for each in found if each})


def _of_subset(path: Path, names: list[Path], subset: str) -> list[Path]:
    """Return the files of a subset: those in the folder of its name, as a copy of a data set from the hub has them."""
    folders = list(dict.fromkeys(part for name in names for part in name.parts[:-1]))
    if subset:
        if subset not in folders:
            what = f"has no folder {subset!r} (found {', '.join(folders) or 'none'})"
            raise DataError(f"data {path}", what, "check data.subset, or leave it out")
        return [name for name in names if subset in name.parts[:-1]]
    card = (path / "README.md").read_text(errors="replace") if (path / "README.md").is_file() else ""
    named = re.findall(r"^\s*-\s*config_name:\s*(\S+)\s*$", card, re.MULTILINE)
    if len(several := [folder for folder in folders if folder in named]) > 1:
        what = f"holds several subsets: {', '.join(several)}"
        raise DataError(f"data {path}", what, "set data.subset to one of them")
    return names


# Text


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a text file, behind its byte order mark if it has one.

    Raises:
        DataError: it is no UTF-8.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as opened:
        file = cast("BinaryIO", opened)
        head = file.read(4)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
            raise DataError(f"data {path}", "is UTF-16 or UTF-32, or no text", "save it as UTF-8")
        file.seek(len(MARK) if head.startswith(MARK) else 0)
        yield file


def _read_lines(path: Path, file: BinaryIO, bad: Bad) -> Iterator[RawRow]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield from _read_row(line.removeprefix(MARK), f"{path}:{number}", "mend the line", bad)


def _read_json(path: Path, file: BinaryIO, split: str, bad: Bad) -> Iterator[RawRow]:
    """Read an array of rows, an object that holds one under the split's name or as `data`, or rows as lines."""
    content = file.read()
    try:
        if not content.lstrip().startswith(b"["):
            try:
                held = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
            except msgspec.DecodeError:  # a second object behind the first
                yield from _read_lines(path, io.BytesIO(content), bad)
                return
            arrays = [name for name in (split, "data", "rows") if bytes(held.get(name, b"")).lstrip().startswith(b"[")]
            if not arrays:
                what = f"holds one object, with {', '.join(held) or 'nothing'}"
                raise DataError(f"data {path}", what, "write a list of rows, or one object a line as .jsonl")
            content = bytes(held[arrays[0]])
        rows = msgspec.json.decode(content, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"data {path}", f"is not JSON ({error})", "write the file again") from error
    for number, row in enumerate(rows):
        yield from _read_row(bytes(row), f"{path} row {number}", "mend the row", bad)


def _read_row(line: bytes, place: str, remedy: str, bad: Bad) -> Iterator[RawRow]:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        bad(DataError(place, f"is not JSON ({error})", f"{remedy}, or set data.on_bad=skip"))
    except RecursionError:
        bad(_too_deep(place))
    else:
        if not isinstance(row, dict):
            found = f"holds a {type(row).__name__}, not an object"
            bad(DataError(place, found, "write one JSON object for each row, or set data.on_bad=skip"))
        elif flaw := _flaw(cast("dict[str, Any]", row), place, num_brackets=line.count(b"[") + line.count(b"{")):
            bad(flaw)
        elif name := _twice(line):
            bad(DataError(place, f"gives {name!r} twice in one object", "write it once, or set data.on_bad=skip"))
        else:
            yield RawRow(place, cast("dict[str, Any]", row))


def _twice(line: bytes) -> str:
    """Return a key that an object in JSON has twice, of which readers take one and lose the other; "" where none."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            found.append(next(name for place, name in enumerate(names) if name in names[:place]))

    json.loads(line, object_pairs_hook=look)
    return found[0] if found else ""


def _read_table(path: Path, file: BinaryIO, delimiter: str, bad: Bad) -> Iterator[RawRow]:
    """Read a table whose first line names its columns; every cell is a text, an empty one is null."""
    csv.field_size_limit(sys.maxsize)
    table = csv.reader((line.decode("utf-8") for line in file), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        names = [name.strip() for name in next(table, [])]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}:1", f"names the column {doubled[0]!r} twice", "rename one of them")
        if len(names) == 1 and (marks := [mark for mark in ";|\t" if mark in names[0]]):
            what = f"names one column, {names[0]!r}: is it {marks[0]!r} that separates them?"
            raise DataError(f"{path}:1", what, "separate them by commas, or in a .tsv by tabs")
        before = table.line_num
        for cells in table:
            place, before = f"{path}:{before + 1}", table.line_num
            if len(cells) == len(names):
                yield RawRow(place, {name: cell or None for name, cell in zip(names, cells, strict=True)})
            elif cells:
                what = f"has {len(cells)} cells, the first line names {len(names)} columns"
                bad(DataError(place, what, "mend the line, or set data.on_bad=skip"))
    except csv.Error as error:
        raise DataError(f"{path}:{table.line_num}", f"is not a table ({error})", "mend the line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data {path}", f"is not UTF-8 ({error})", "save it as UTF-8") from error


# Tables with types


def _read_parquet(path: Path, bad: Bad) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from _read_batches(path, pq.ParquetFile(path).iter_batches(), bad)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data {path}", f"cannot be read as Parquet ({error})", "write the file again") from error


def _read_arrow(path: Path, bad: Bad) -> Iterator[RawRow]:
    """Read an Arrow file of either kind: with an index at its end, or a stream as `datasets` writes it."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                found = pa.ipc.open_file(file)
                batches: Any = (found.get_batch(place) for place in range(found.num_record_batches))
            except pa.ArrowInvalid:
                batches = pa.ipc.open_stream(file)
            yield from _read_batches(path, batches, bad)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data {path}", f"cannot be read as Arrow ({error})", "write the file again") from error


def _read_batches(path: Path, batches: Any, bad: Bad) -> Iterator[RawRow]:
    yield from _number(str(path), chain.from_iterable(_rows_of(path, batch) for batch in batches), bad)


def _rows_of(path: Path, batch: Any) -> list[dict[str, Any] | Exception]:
    """Return the rows of a batch, in the place of one that Python cannot hold the reason."""
    if doubled := [name for name in batch.schema.names if batch.schema.names.count(name) > 1]:
        raise DataError(f"data {path}", f"names the column {doubled[0]!r} twice", "rename one of them")
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except UNHELD as error:
        if len(batch) == 1:
            return [error]
        return [row for place in range(len(batch)) for row in _rows_of(path, batch.slice(place, 1))]


def _read_saved(path: Path, split: str, bad: Bad) -> Iterator[RawRow]:
    """Read what `datasets` wrote with save_to_disk."""
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    try:
        found = load_from_disk(str(path))
    except (OSError, LookupError, ValueError) as error:
        raise DataError(f"data {path}", f"cannot be read ({error})", "write it again by save_to_disk") from error
    if not isinstance(found, Dataset):
        if split not in found:
            raise DataError(
                f"data {path}", f"no split {split!r} (found {', '.join(map(str, found))})", "set data.split"
            )
        found = found[split]
    elif split not in ("train", "", str(found.split)):
        raise DataError(f"data {path}", f"is one data set, without a split {split!r}", "leave data.split out")
    yield from _number(str(path), _as_stored(found), bad)


def _read_hub(source: str, split: str, subset: str, bad: Bad) -> Iterator[RawRow]:
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HFValidationError, HTTPError

    where = f"data {source}"
    disable_progress_bars()
    try:
        found = load_dataset(source, subset or None, split=split or "train")
    except (OSError, HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        remedy = f"check the id and the network, or copy the data here as one of {', '.join(FORMATS)}"
        raise DataError(where, f"cannot be fetched from the hub ({reason})", remedy) from error
    except HFValidationError as error:
        what = "is no file or directory here, and no name that the hub could have"
        raise DataError(
            where, what, "check data.source; a split or subset goes to data.split or data.subset"
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:  # a split or subset, a script, a file that is damaged
        reason = str(error).splitlines()[0]
        raise DataError(where, f"cannot be loaded ({reason})", "set data.split or data.subset") from error
    yield from _number(source, _as_stored(found), bad)


def _as_stored(found: Any) -> Any:
    """Return a data set's rows with all columns, none of them as tensors, and no picture or sound decoded."""
    return found.with_format(None).to_iterable_dataset().decode(False)


def _number(source: str, rows: Any, bad: Bad) -> Iterator[RawRow]:
    for number, row in enumerate(rows):
        place = f"{source} row {number}"
        if isinstance(row, Exception):
            bad(DataError(place, f"cannot be read ({one_line(str(row))})", "mend the row, or set data.on_bad=skip"))
            continue
        columns = _jsonable(row, place)
        if flaw := _flaw(columns, place):
            bad(flaw)
        else:
            yield RawRow(place, columns, is_columnar=True)


# What can be sent


def _jsonable(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the row with dates, decimals and the like as JSON has them, bytes as they are: they are no text."""
    try:
        found = msgspec.to_builtins(row, str_keys=True, builtin_types=(bytes,), enc_hook=_written_time)
        return cast("dict[str, Any]", found)
    except TypeError as error:
        raise DataError(place, f"a column cannot be sent to reward functions ({error})", "drop the column") from error


def _written_time(value: Any) -> str:
    """Return a time of pandas', which Arrow gives for those to the nanosecond, as JSON has times."""
    if not hasattr(value, "isoformat"):
        raise TypeError(f"a {type(value).__name__} is nothing that JSON has")
    return str(value.isoformat())


def _flaw(columns: dict[str, Any], place: str, *, num_brackets: int = 0) -> DataError | None:
    """Return why a row cannot be sent: numbers beyond 64 bits, or a column that is nested too deep.

    `num_brackets` in its text is more than its depth.
    """
    if num_brackets > MAX_DEPTH and any(_is_deep(value) for value in columns.values()):
        return _too_deep(place)
    try:
        msgspec.msgpack.encode(columns)
    except OverflowError:
        return DataError(place, f"column {_overflowing(columns)!r} holds an integer beyond 64 bits", "write it as text")
    return None


def _too_deep(place: str) -> DataError:
    what = f"is nested more than {MAX_DEPTH} deep"
    return DataError(place, what, "write what is inside as text, or set data.on_bad=skip")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            each
            for outer in level
            if isinstance(outer, list | dict)
            for each in cast("Any", outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _overflowing(columns: dict[str, Any]) -> str:
    for name, value in columns.items():
        try:
            msgspec.msgpack.encode(value)
        except OverflowError:
            return name
    raise AssertionError("the row has no such column")
