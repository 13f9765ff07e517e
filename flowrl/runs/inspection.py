"""Look into a run's recorded rollouts: list those an expression chooses, or show one group in full.

Rows come from the Parquet files of rollouts.py, as a data set: only the columns asked for are read, and rows beyond the
limit are counted, not held.

Invariants:
- files of different steps may have different scores, a score that a file lacks is missing in its rows;
- what a model wrote cannot move the cursor of who reads it.

Called by `flowrl inspect`.

Tests: tests/unit/runs/test_inspection.py
"""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import ConfigError, DataError, one_line, printable, shortened
from flowrl.runs.query import COUNTED, MOST_NUMBER, column, parse, unknown_column
from flowrl.telemetry.records import step_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    Pieces = Callable[[Sequence[int]], list[str]]  # token ids -> the text of each

LISTED = ["learned_in_step", "group_id", "sample", "reward", "staleness", "tokens", "finish", "prompt", "response"]
WIRE = "message"  # the column that only replays read
CELL = 24  # characters of a column of text at least
NARROWEST = 60  # characters of a line


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """The samples that were chosen, as far as the limit goes."""

    columns: list[str]
    rows: list[dict[str, Any]]
    num_chosen: int
    num_samples: int  # recorded in all


class RecordedRollouts:
    """A run's recorded samples."""

    def __init__(self, run_dir: Path) -> None:
        """Find the files.

        Raises:
            DataError: there are none, or one cannot be read.
        """
        import pyarrow as pa
        import pyarrow.dataset as ds
        import pyarrow.parquet as pq

        paths = [*step_files(run_dir / "rollouts").values()]
        if not paths:
            what = "has no rollouts: no step was learned yet, or learner.save_rollouts=false, or it learns offline"
            raise DataError(str(run_dir), what, "name a run that recorded some")
        schemas: list[Any] = []
        for path in paths:
            try:
                schemas.append(pq.read_schema(path))
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(str(path), f"cannot be read ({error})", "remove it, or write it anew") from error
        self._schema = pa.unify_schemas(schemas)
        self._data = ds.dataset([str(path) for path in paths], schema=self._schema, format="parquet")

    @property
    def columns(self) -> dict[str, str]:
        """Return each column and its kind: number, text, list or other."""
        return {field.name: _kind(field.type) for field in self._schema if field.name != WIRE}

    def choose(self, where: str, *, limit: int, columns: Sequence[str]) -> Listing:
        """Return the samples of which `where` is true ("" is true of all), in the order in which they were learned.

        Raises:
            ConfigError: `where` is not of the language, or a column is unknown.
        """
        import pyarrow as pa

        known = self.columns
        names = [name for name in columns or LISTED if columns or name in known or name in COUNTED]
        if unknown := next((n for n in names if n not in known and n not in COUNTED), None):
            raise unknown_column(unknown, known, "--columns")
        expression = parse(where, known) if where.strip() else None
        wanted = {name: column(name, known) for name in names}
        try:
            rows = self._data.scanner(columns=wanted, filter=expression).head(limit).to_pylist()
            num_chosen = self._data.count_rows(filter=expression)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ConfigError("--where", f"{where!r} cannot be evaluated ({str(error).splitlines()[0]})") from error
        return Listing(columns=names, rows=rows, num_chosen=num_chosen, num_samples=self._data.count_rows())

    def group(self, group_id: int) -> list[dict[str, Any]]:
        """Return every recorded sample of a group; of one that was learned again, all times."""
        import pyarrow.compute as pc

        if abs(group_id) > MOST_NUMBER:
            return []
        wanted = list(self.columns)
        return self._data.to_table(columns=wanted, filter=pc.field("group_id") == group_id).to_pylist()


def _kind(kind: Any) -> str:
    import pyarrow.types as types

    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return "number"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return "list" if types.is_list(kind) or types.is_large_list(kind) else "other"


def as_table(listing: Listing, *, width: int | None = None) -> Iterator[str]:
    """Yield a listing as aligned lines that fit the terminal."""
    width = max(NARROWEST, width or shutil.get_terminal_size((160, 24)).columns)
    texts = [name for name in listing.columns if any(isinstance(row[name], str) for row in listing.rows)]
    rest = [name for name in listing.columns if name not in texts]
    cells = [{name: _cell(row[name]) for name in listing.columns} for row in listing.rows]
    widths = {name: max([len(name), *(len(row[name]) for row in cells)]) for name in listing.columns}
    room = width - sum(widths[name] + 2 for name in rest)
    for place, name in enumerate(sorted(texts, key=widths.__getitem__)):  # what a short one leaves, a long one gets
        widths[name] = min(widths[name], max(CELL, room // (len(texts) - place) - 2))
        room -= widths[name] + 2
    yield one_line("  ".join(_fitted(name, widths[name], is_text=name in texts) for name in listing.columns).rstrip())
    for row in cells:
        yield "  ".join(_fitted(row[n], widths[n], is_text=n in texts) for n in listing.columns).rstrip()
    shown = f", the first {len(listing.rows)} shown" if len(listing.rows) < listing.num_chosen else ""
    yield f"{listing.num_chosen} of {listing.num_samples} samples{shown}"


def as_json(listing: Listing) -> Iterator[str]:
    """Yield a listing as one JSON object a line."""
    for row in listing.rows:
        text = msgspec.json.encode(row).decode()
        yield "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else printable(value).replace("\n", " ") if isinstance(value, str) else str(value)


def _fitted(cell: str, width: int, *, is_text: bool) -> str:
    return shortened(cell, width).ljust(width) if is_text else cell.rjust(width)


def describe_group(rows: list[dict[str, Any]], fate: str, pieces: Pieces | None) -> Iterator[str]:
    """Yield one group in full as lines: prompt, samples, rewards, tokens with version and ratio, and its fate."""
    first = rows[0]
    yield one_line(f"group {first['group_id']}: {fate}")
    prompt = "".join(pieces(first["prompt_token_ids"])) if pieces else first["prompt"]
    yield f"prompt, {len(first['prompt_token_ids'])} tokens"
    yield from _indented(printable(prompt) if prompt else "(its text is not recorded)")
    for row in rows:
        yield ""
        scores = [
            f"{name} {_cell(value)}" for name, value in row.items() if name.startswith("score.") and value is not None
        ]
        yield one_line(f"sample {row['sample']}: reward {_cell(row['reward'])} ({', '.join(scores)})")
        facts = f"mean advantage {_cell(row['advantage_mean'])}, staleness {row['staleness']}, ended by {row['finish']}"
        yield one_line(f"  {facts}, {row['generator']}, learned in step {row['learned_in_step']}")
        yield from _indented(printable(row["response"] or ""))
        yield from _token_lines(row, pieces)


def _token_lines(row: dict[str, Any], pieces: Pieces | None) -> Iterator[str]:
    texts = pieces(row["token_ids"]) if pieces else [""] * len(row["token_ids"])
    yield f"  {'token':>6}  {'version':>7}  {'p':>8}  {'ratio':>7}  text"
    ratios = token_ratios(row)
    columns = zip(row["token_ids"], row["token_versions"], row["logprobs"], ratios, texts, strict=True)
    for token, version, logprob, ratio, text in columns:
        shown = json.dumps(text, ensure_ascii=False) if pieces else ""
        if version == ENVIRONMENT:
            yield f"  {token:>6}  {'env':>7}  {'':>8}  {'':>7}  {printable(shown)}"
        else:
            known = "" if ratio is None else f"{ratio:.3f}"
            yield f"  {token:>6}  {version:>7}  {math.exp(logprob):>8.4f}  {known:>7}  {printable(shown)}"
    if all(ratio is None for ratio in ratios):
        yield "  (the learner's log-probs, and so the importance ratios, were not recorded)"


def _indented(text: str) -> Iterator[str]:
    for line in text.splitlines() or [""]:
        yield f"  | {line}"


ENVIRONMENT = -1  # the version of tokens that no policy sampled
LARGEST = 50.0  # nats: beyond, a ratio is only said to be huge


def token_ratios(row: dict[str, Any]) -> list[float | None]:
    """Return each token's importance ratio, learner over generator, None where the learner's part is not recorded.

    Log-probs of -1.0 and -2.0 make exp(1) = 2.718.
    """
    learner = row.get("learner_logprobs")
    if learner is None:
        return [None] * len(row["token_ids"])
    return [
        None if version == ENVIRONMENT else math.exp(min(ours - theirs, LARGEST))
        for ours, theirs, version in zip(learner, row["logprobs"], row["token_versions"], strict=True)
    ]
