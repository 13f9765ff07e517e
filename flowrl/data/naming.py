"""A row's columns under the names that formats know, whatever its source calls them.

`data.columns` says some; the others are those of common data sets. ShareGPT's `conversations` are messages (or, beside
chosen and rejected, the prompt); labelling tools' exports are preferences (labelling.py), and so are demonstrations
beside a `rejected_response` or `rejected_messages` (ms-swift); `kto_tag` is a label; messages written as JSON in a
text, as tables hold them, are messages. What a response answers is looked for under the names that online prompts have
where there is no `prompt` and the response does not hold it itself. An instruction or a question is followed by its
`input` (or `context`, or `passage`) unless it says it, a `prompt` by its `input` alone. Letter case does not count in
a name that is known: `Question` is `question`.

Invariant: no column that says what is asked is left out without a word: pictures and the like, and choices that the
question does not name, are refused.

Called by `load_prompts` and `load_examples`.

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
    from collections.abc import Iterable, Iterator, Mapping

    from flowrl.data.sources import RawRow

ASKING = ("question", "problem", "instruction", "query", "input")
# Where prompts for online training are looked for, in this order.
PROMPT_COLUMNS = ("prompt", "messages", "context_messages", *ASKING)
ABOUT = ("input", "context", "passage")  # what an instruction or a question is about (Alpaca, Dolly, SQuAD, BoolQ)
CHOICES = ("choices", "options")  # what a question may be answered with (ARC, MMLU)
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
ANSWERING = ("output", "response")  # the same two on what is to be answered
SHAREGPT = "conversations"
SPOKEN = (SHAREGPT, "messages", "context_messages", "prompt", "completion", "chosen", "rejected")  # may hold messages
WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']\s*:""")  # messages in a text
# Names that mean something here or to most reward functions, whatever their letter case in the source.
KNOWN = frozenset(
    (*PROMPT_COLUMNS, *ABOUT, *CHOICES, *MEDIA, *ANSWERING, *SPOKEN, "completions", "label", "labels", "text", "margin",
     "system", "system_prompt", "tools", "history", "answer", "finish", "finish_reason")
)  # fmt: skip
MISSING = object()
SHOWN_COLUMNS = 12  # of a row, in an error


def with_names(row: RawRow, names: Mapping[str, str]) -> RawRow:
    """Return a row with columns under other names as well, `names` saying which is whose: {"answer": "solution"}.

    A field of an object is named behind it: {"answer": "reward_model.ground_truth"}.

    Raises:
        DataError: it lacks one of them, a message is from somebody unknown, or a labelled row prefers nothing.
    """
    columns = _in_small_letters({**row.columns, **preference_of(row.columns, row.place)})
    missing = [theirs for theirs in names.values() if _held(columns, theirs) is MISSING]
    if missing:
        what = f"no column {missing[0]!r} (columns: {', '.join(columns) or 'none'})"
        raise DataError(row.place, what, "mend data.columns")
    if media := [name for name in MEDIA if columns.get(name) and isinstance(columns[name], str | bytes | list | dict)]:
        what = f"has more than text: the column {media[0]!r} is not empty"
        raise DataError(row.place, what, "only text can be trained on: drop the row, or a column that is not needed")
    columns |= {ours: (_asked if ours == "prompt" else _spoken)(row, columns, names[ours]) for ours in names}
    columns |= {name: _spoken(row, columns, name) for name in SPOKEN if columns.get(name)}
    columns |= _turned_down(columns)
    ours = "prompt" if columns.get("chosen") else "messages"
    if columns.get(SHAREGPT) and columns.get(ours) is None:
        columns[ours] = columns[SHAREGPT]
    if columns.get("label") is None and columns.get("kto_tag") is not None:
        columns["label"] = columns["kto_tag"]
    column = "prompt" if columns.get("prompt") else _answered(columns)
    if column:
        columns["prompt"] = _asked(row, columns, column)
    return msgspec.structs.replace(row, columns=columns)


def with_answer(row: RawRow) -> RawRow:
    """Return a row of a question and its response with prompt and completion, which offline training learns."""
    columns = row.columns
    answer = next((name for name in ANSWERING if isinstance(columns.get(name), str)), "")
    asked = next((name for name in ("prompt", *ASKING) if columns.get(name)), "")
    taken = any(columns.get(name) is not None for name in ("completions", *SPOKEN) if name != "prompt")
    if taken or not answer or not asked or not isinstance(prompt := _asked(row, columns, asked), str):
        return row
    return msgspec.structs.replace(row, columns={**columns, "prompt": prompt, "completion": columns[answer]})


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
    if _held(row.columns, column) is MISSING:
        close = difflib.get_close_matches(column, row.columns, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "set data.prompt_column"
        raise DataError(row.place, f"no column {column!r} (columns: {', '.join(row.columns) or 'none'})", hint)
    prompt = _asked(row, row.columns, column)
    return msgspec.structs.replace(row, columns={**row.columns, "prompt": prompt})


def _in_small_letters(columns: dict[str, Any]) -> dict[str, Any]:
    """Return columns with those whose names are known but for their case under the known names as well."""
    small = {name.strip().casefold().replace(" ", "_"): value for name, value in columns.items()}
    return {**columns, **{name: value for name, value in small.items() if name in KNOWN - columns.keys()}}


def _turned_down(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return chosen and rejected of a demonstration that says beside it what would have been worse."""
    messages: Any = columns.get("messages")
    worse = columns.get("rejected_response")
    if "chosen" in columns or "rejected" in columns or not (worse or columns.get("rejected_messages")):
        return {}
    if ends_answered(messages):
        turns = [*messages[:-1], {"role": "assistant", "content": worse}] if worse else columns["rejected_messages"]
        return {"chosen": messages, "rejected": turns}
    answer = next((name for name in ANSWERING if isinstance(columns.get(name), str)), "")
    return {"chosen": columns[answer], "rejected": worse} if answer and isinstance(worse, str) else {}


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


def _held(columns: Mapping[str, Any], name: str) -> Any:
    """Return what a column holds, or a field of an object in one; MISSING where there is none."""
    if name in columns:
        return columns[name]
    outer, _, inner = name.partition(".")
    found = columns.get(outer)
    return _held(cast("Mapping[str, Any]", found), inner) if inner and isinstance(found, dict) else MISSING


def _asked(row: RawRow, columns: Mapping[str, Any], column: str) -> Any:
    """Return what a column holds, a question or an instruction with what it is about."""
    value = _spoken(row, columns, column)
    if column not in (*ASKING, "prompt") or not isinstance(value, str):
        return value
    if column == "instruction" and columns.get("history"):
        what = "has former turns in the column 'history' beside its instruction"
        raise DataError(row.place, what, "write the conversation as messages")
    names = ABOUT if column != "prompt" else [name for name in ("input",) if isinstance(columns.get(name), str)]
    about = {name: columns[name] for name in names if name != column and columns.get(name)}
    for name, text in about.items():
        if not isinstance(text, str):
            what = f"column {name!r}, which belongs to {column!r}, holds {noun(text)}"
            raise DataError(row.place, what, "a string was expected; write both into one column 'prompt'")
    asked = "\n\n".join([value, *(text for text in about.values() if text.strip() and not _says(value, text))])
    for name in (*CHOICES, *_lettered(columns)):
        if unnamed := [text for text in _texts(columns.get(name)) if _folded(text) not in _folded(asked)]:
            what = f"column {name!r} holds {unnamed[0]!r}, which is not in {column!r}, so the model would not read it"
            raise DataError(row.place, what, "write both into one column 'prompt', or drop the column")
    return asked


def unread(columns: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns that would be read behind a question and are not behind a `prompt`, which says all itself."""
    prompt = columns.get("prompt")
    for name in ABOUT if isinstance(prompt, str) else ():
        if isinstance(text := columns.get(name), str) and text.strip() and not _says(cast("str", prompt), text):
            yield name


def _says(value: str, text: str) -> bool:
    """Return whether a text stands in another as words of its own: "1" does not stand in "Add 10"."""
    return re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", value) is not None


def _lettered(columns: Mapping[str, Any]) -> list[str]:
    """Return the columns that hold one choice each: A, B, C, D, or option_a, choice2."""
    letters = [name for name in columns if re.fullmatch("[A-J]", name)]
    named = [name for name in columns if re.fullmatch(r"(?:option|choice)s?[ _]?(?:[a-j]|\d)", name, re.IGNORECASE)]
    return [*(letters if {"A", "B"} <= {*letters} else []), *(named if len(named) > 1 else [])]


def _texts(value: Any) -> list[str]:
    """Return the texts in a nested value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for each in cast("Iterable[Any]", inner) for text in _texts(each)]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _spoken(row: RawRow, columns: Mapping[str, Any], name: str) -> Any:
    """Return what a column holds, messages as such, also those in a text."""
    value = _held(columns, name)
    if isinstance(value, str) and WRITTEN.match(value):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            what = f"column {name!r} holds messages in a text that is no JSON ({error})"
            raise DataError(row.place, what, "write them as a list, or as JSON (json.dumps, not str)") from error
    return renamed(value, row.place)
