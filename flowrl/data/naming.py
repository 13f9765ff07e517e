"""A row's columns under the names that formats know, whatever its source calls them.

`data.columns` says some; the others are those of common data sets. ShareGPT's `conversations` are messages (or, beside
chosen and rejected, the prompt); labelling tools' exports are preferences (labelling.py); `kto_tag` is a label;
messages written as JSON in a text, as tables hold them, are messages. What a response answers is looked for under the
names that online prompts have where there is no `prompt` and the response does not hold it itself. An `instruction` is
followed by its `input` (or `context`). Invariant: no column that says what is asked is left out without a word. Called
by `load_prompts` and `load_examples`.

Tests: tests/unit/data/test_naming.py
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.data.conversations import noun, renamed
from flowrl.data.labelling import preference_of
from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowrl.data.sources import RawRow

ASKING = ("question", "problem", "instruction", "query", "input")
# Where prompts for online training are looked for, in this order.
PROMPT_COLUMNS = ("prompt", "messages", "context_messages", *ASKING)
ABOUT = ("input", "context")  # what an instruction is to be done with (Alpaca, Dolly)
ANSWERING = ("output", "response")  # the same two on what is to be answered
SHAREGPT = "conversations"
SPOKEN = (SHAREGPT, "messages", "context_messages", "prompt", "completion", "chosen", "rejected")  # may hold messages
WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']\s*:""")  # messages in a text
SHOWN_COLUMNS = 12  # of a row, in an error


def with_names(row: RawRow, names: Mapping[str, str]) -> RawRow:
    """Return a row with columns under other names as well, `names` saying which is whose: {"answer": "solution"}.

    Raises:
        DataError: it lacks one of them, a message is from somebody unknown, or a labelled row prefers nothing.
    """
    columns = {**row.columns, **preference_of(row.columns, row.place)}
    missing = [theirs for theirs in names.values() if theirs not in columns]
    if missing:
        what = f"no column {missing[0]!r} (columns: {', '.join(columns) or 'none'})"
        raise DataError(row.place, what, "mend data.columns")
    columns |= {ours: _asked(row, columns, names[ours]) for ours in names}
    columns |= {name: _spoken(row, columns, name) for name in SPOKEN if columns.get(name)}
    ours = "prompt" if columns.get("chosen") else "messages"
    if columns.get(SHAREGPT) and columns.get(ours) is None:
        columns[ours] = columns[SHAREGPT]
    if columns.get("label") is None and columns.get("kto_tag") is not None:
        columns["label"] = columns["kto_tag"]
    if not columns.get("prompt") and (column := _answered(columns)):
        columns["prompt"] = _asked(row, columns, column)
    return msgspec.structs.replace(row, columns=columns)


def with_answer(row: RawRow) -> RawRow:
    """Return a row of an instruction and its output with prompt and completion, which offline training learns."""
    columns = row.columns
    answer = next((name for name in ANSWERING if isinstance(columns.get(name), str)), "")
    taken = any(columns.get(name) is not None for name in (*SPOKEN, "text", "completions"))
    if taken or not answer or columns.get("instruction") is None:
        return row
    found = {"prompt": _asked(row, columns, "instruction"), "completion": columns[answer]}
    return msgspec.structs.replace(row, columns={**columns, **found})


def prompt_column(row: RawRow) -> str:
    """Return the column that holds what is asked: the first known name with a text, or with messages to be answered.

    Raises:
        DataError: none does.
    """
    there = [name for name in PROMPT_COLUMNS if row.columns.get(name)]
    if there:
        return next((name for name in there if not ends_answered(row.columns[name])), there[0])
    close = difflib.get_close_matches("prompt", row.columns, n=1)
    names = ", ".join(list(row.columns)[:SHOWN_COLUMNS]) or "none"
    what = f"no column is known to hold the prompt (columns: {names})"
    hint = f"did you mean data.prompt_column={close[0]}?" if close else "name it with data.prompt_column"
    raise DataError(row.place, what, hint)


def ends_answered(value: Any) -> bool:
    """Say whether these are messages of which the last is the assistant's."""
    last = cast("list[Any]", value)[-1] if isinstance(value, list) and value else None
    return isinstance(last, dict) and cast("dict[str, Any]", last).get("role") == "assistant"


def with_prompt(row: RawRow, column: str) -> RawRow:
    """Return a row with its prompt in the column `prompt`.

    Raises:
        DataError: there is no such column.
    """
    if column not in row.columns:
        close = difflib.get_close_matches(column, row.columns, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "set data.prompt_column"
        raise DataError(row.place, f"no column {column!r} (columns: {', '.join(row.columns) or 'none'})", hint)
    prompt = _asked(row, row.columns, column)
    return msgspec.structs.replace(row, columns={**row.columns, "prompt": prompt})


def _answered(columns: Mapping[str, Any]) -> str:
    """Return the column with what the responses answer, "" where they hold it themselves or none does."""
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    first = chosen if chosen is not None and rejected is not None else columns.get("completion")
    column = next((name for name in ASKING if columns.get(name) and str(columns[name]).strip()), "")
    if isinstance(first, list):
        return column if ends_answered(cast("list[Any]", first)[:1]) else ""
    if not column or not isinstance(first, str):
        return ""
    asked = str(columns[column]).strip()
    end = first.find(asked) + len(asked) if asked in first else 0
    return "" if end and isinstance(rejected, str) and rejected.startswith(first[:end]) else column


def _asked(row: RawRow, columns: Mapping[str, Any], column: str) -> Any:
    """Return what a column holds, an instruction with what it is about."""
    value = _spoken(row, columns, column)
    if column != "instruction" or not isinstance(value, str):
        return value
    if columns.get("history"):
        what = "has former turns in the column 'history' beside its instruction"
        raise DataError(row.place, what, "write the conversation as messages")
    about = {name: columns[name] for name in ABOUT if columns.get(name)}
    for name, text in about.items():
        if not isinstance(text, str):
            raise DataError(row.place, f"column {name!r} holds {noun(text)}", "a string was expected")
    return "\n\n".join([value, *(text for text in about.values() if text.strip())])


def _spoken(row: RawRow, columns: Mapping[str, Any], name: str) -> Any:
    """Return what a column holds, messages as such, also those in a text."""
    value = columns[name]
    if isinstance(value, str) and WRITTEN.match(value):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            what = f"column {name!r} holds messages in a text that is no JSON ({error})"
            raise DataError(row.place, what, "write them as a list, or as JSON (json.dumps, not str)") from error
    return renamed(value, row.place)
