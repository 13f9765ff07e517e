"""The shapes in which training data come, told apart by their columns, and one shape for all of them.

The types and column names are those of TRL's documentation ("Dataset formats and types"); each type is standard
(strings) or conversational (lists of messages):

    preference            chosen, rejected, with prompt (explicit) or without (implicit); margin is optional
    stepwise-supervision  prompt, completions (a list of strings), labels (one for each)
    unpaired-preference   prompt, completion, label; or messages, label, of the last of them
    prompt-completion     prompt, completion
    language-modeling     messages, or text
    prompt-only           prompt

Other names of columns are brought to these by naming.py. A row with the columns of several types is of the first that
fits, in this order. Columns `tools` and `chat_template_kwargs` go to the chat template, `system` (or `system_prompt`)
before a conversation without one; `finish` (or `finish_reason`) says that a response was sampled and whether it was
cut; others are left alone; a null is as good as a column that is not there.

Invariant: what `normalise` returns has at least one response or step, and the types that `NormalRow` states.

Called by `load_examples` and `flowrl data check`.

Tests: tests/unit/data/test_formats.py
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import msgspec

from flowrl.data.conversations import (
    SPEAKERS,
    SYSTEMS,
    Conversation,
    check_history,
    messages_of,
    noun,
    options_of,
    system_of,
    tools_of,
    with_system,
)
from flowrl.data.naming import ASKING, SHOWN_COLUMNS
from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.data.sources import RawRow

Text = str | Conversation  # empty where a row has none
Finish = Literal["", "stop", "length"]
# How serving engines write that a sample was cut, and that the model ended it.
CUT = {"length", "max_tokens", "max_length", "model_length", "max_output_tokens", "abort", "timeout", "content_filter"}
ENDED = {"stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls", "tool_use", "function_call"}
Kind = Literal[
    "preference", "stepwise-supervision", "unpaired-preference", "prompt-completion", "language-modeling", "prompt-only"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Each way of writing a type: the first whose columns are all there is taken. The first column says how it is written.
SHAPES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected")),
    ("stepwise-supervision", ("prompt", "completions", "labels")),
    ("unpaired-preference", ("completion", "prompt", "label")),
    ("unpaired-preference", ("messages", "label")),
    ("prompt-completion", ("completion", "prompt")),
    ("language-modeling", ("messages",)),
    ("language-modeling", ("text",)),
    ("prompt-only", ("prompt",)),
)
SPEAKS = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")  # before what each says (HH)
ANSWERED = ("answer", "solution", "response", "output", "target")  # columns that may hold what is to be learned
LEAST_REPEATED = 8  # characters of a prompt that no response begins with by chance
# Columns that say how much of a row is to be learned. Only messages have a weight here, and sources of a mix.
WEIGHING = ("weight", "weights", "sample_weight", "loss_weight", "loss_mask", "completion_mask", "assistant_masks")
WORDS = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """How a data set is written."""

    kind: Kind
    is_conversational: bool  # messages, not strings
    is_implicit: bool = False  # of preference: the prompt is the part that chosen and rejected share
    has_tools: bool = False

    def __str__(self) -> str:
        parts = [self.kind, "conversational" if self.is_conversational else "standard"]
        if self.kind == "preference":
            parts.append("implicit prompt" if self.is_implicit else "explicit prompt")
        return ", ".join([*parts, *(["tools"] if self.has_tools else [])])


class NormalRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of any format: a prompt and its responses, all strings or all conversations, or the steps of one."""

    place: str
    prompt: Text  # empty where the format has none: the responses then hold it
    responses: list[Text] = []  # of a preference: chosen, rejected
    steps: list[str] = []
    labels: list[float] = []  # one for each response or step; nan: none
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = {}
    finish: Finish = (
        ""  # "stop" or "length": the responses were sampled, and came to their end or were cut; "": not known
    )
    scores: dict[str, float] = {}  # by column, where a response is conditioned on them
    system: str = ""  # of a row of strings, which only a conversation has a place for

    @property
    def asked(self) -> Text:
        """Return what is asked: rows in which it is the same belong on the same side of a split.

        A text without a prompt is asked for as a whole, and a conversation up to the assistant's first message. Of two
        texts with an implicit prompt the characters that both begin with.
        """
        if self.prompt or not self.responses:
            return self.prompt
        first = self.responses[0]
        if isinstance(first, str):
            return first[: num_shared(first, self.responses[-1])]
        roles = [message["role"] for message in first]
        return first[: roles.index("assistant")] if "assistant" in roles[1:] else first


def detect(row: RawRow, kind: Kind | None = None) -> Format:
    """Return the format of a row by its columns and their types; `kind` says which of several to take.

    Raises:
        DataError: the columns fit no format, or not the one that was asked for.
    """
    columns = {name: value for name, value in row.columns.items() if value is not None}
    for each, needed in SHAPES:
        if kind in (None, each) and columns.keys() >= set(needed):
            is_implicit = each == "preference" and "prompt" not in columns
            holder = "prompt" if each == "stepwise-supervision" else needed[0]
            return Format(
                kind=each,
                is_conversational=isinstance(columns[holder], list),
                is_implicit=is_implicit,
                has_tools=bool(columns.get("tools")),
            )
    shapes = dict.fromkeys(" + ".join(sorted(needed)) for each, needed in SHAPES if kind in (None, each))
    names = ", ".join(list(columns)[:SHOWN_COLUMNS]) or "none"
    what = f"has the columns {names}, which are " + (f"not those of {kind}" if kind else "those of no known format")
    asked = next((name for name in ASKING if name in columns), "question")
    answered = next((name for name in ANSWERED if name in columns), "answer")
    yours = f"data.columns.prompt={asked} data.columns.completion={answered}"
    remedy = f"give {' or '.join(shapes)}, or name yours, such as {yours}"
    raise DataError(row.place, what, remedy)


def normalise(row: RawRow, format: Format, kind: Kind | None = None) -> NormalRow:
    """Return a row of a data set of the given format in the one shape; `kind` as for `detect`.

    Raises:
        DataError: a column is missing, empty or of another type than the format says, or the row is of another format.
    """
    normal = _normalised(row, format, kind)
    _check_whole(row)
    if isinstance(normal.prompt, str):
        check_history(row)
    system = system_of(row)
    if not system or (format.kind == "language-modeling" and not format.is_conversational):
        return normal
    if isinstance(normal.prompt, str):
        return msgspec.structs.replace(normal, system=system)
    if normal.prompt:
        return msgspec.structs.replace(normal, prompt=with_system(normal.prompt, system))
    responses: list[Text] = [with_system(cast("Conversation", each), system) for each in normal.responses]
    return msgspec.structs.replace(normal, responses=responses)


def _normalised(row: RawRow, format: Format, kind: Kind | None) -> NormalRow:
    found = detect(row, kind)
    if msgspec.structs.replace(found, has_tools=format.has_tools) != format:
        remedy = "write all rows of a data set alike, or split it in two"
        raise DataError(row.place, f"is {found}, the rows before it are {format}", remedy)
    common: dict[str, Any] = {
        "place": row.place,
        "tools": tools_of(row),
        "template_options": options_of(row),
        "finish": _finish(row),
    }
    if format.kind == "language-modeling":
        whole = _whole(row)
        if kind is None and str(row.columns.get("label")).casefold() in ("true", "false", "0", "1"):
            what = "has a label beside a text, and which part of it that judges cannot be told"
            remedy = "give prompt, completion and label, or set data.format=language-modeling to learn every text"
            raise DataError(row.place, what, remedy)
        _check_said(row, whole, "messages" if format.is_conversational else "text")
        return NormalRow(prompt=_empty(format), responses=[whole], **common)
    if format.kind == "prompt-only":
        return NormalRow(prompt=_text_or_messages(row, "prompt"), **common)
    if format.kind == "stepwise-supervision":
        steps, labels = _steps(row)
        return NormalRow(prompt=_text_or_messages(row, "prompt"), steps=steps, labels=labels, **common)
    if format.is_implicit:
        prompt, responses = _split_pair(row)
    elif "messages" in row.columns and row.columns.get("completion") is None and format.kind == "unpaired-preference":
        prompt, responses = _last_apart(row)
    else:
        names = ("chosen", "rejected") if format.kind == "preference" else ("completion",)
        prompt, responses = _explicit(row, names)
    for name, response in zip(
        ("chosen", "rejected") if len(responses) == 2 else ("completion",), responses, strict=True
    ):
        _check_said(row, response, name)
    if format.kind == "preference":
        if responses[0] == responses[1]:
            raise DataError(row.place, "chosen and rejected are the same", "drop the row, or set data.on_bad=skip")
        _check_scores(row)
        labels = [number_of(row, "margin", 0.0)] * 2
    else:
        labels = [_verdict(row)] if format.kind == "unpaired-preference" else []
    return NormalRow(prompt=prompt, responses=responses, labels=labels, **common)


def _check_whole(row: RawRow) -> None:
    """Refuse a row that says of itself that it is to be learned in part, or less than others."""
    for name in WEIGHING:
        value = row.columns.get(name)
        weight = _as_number(value)
        if (isinstance(value, list) and value) or (weight is not None and weight != 1):
            shown = f"{name}={value!r}" if weight is not None else f"a list in the column {name!r}"
            what = f"has {shown} for the row, which nothing here reads"
            remedy = "drop the row or the column; a message may have a weight (0 or 1), and a source in data.mix"
            raise DataError(row.place, what, remedy)


def _check_scores(row: RawRow) -> None:
    """Refuse a pair whose own scores, such as score_chosen and score_rejected, say that the worse one is chosen."""
    for name, better in row.columns.items():
        if "chosen" not in name or not re.search("score|rating|reward", name):
            continue
        other = name.replace("chosen", "rejected")
        worse = row.columns.get(other)
        scores = [_as_number(better), _as_number(worse)]
        if None not in scores and cast("float", scores[0]) < cast("float", scores[1]):
            what = f"has {name}={better} and {other}={worse}, so that the worse one is chosen"
            raise DataError(row.place, what, "swap them or drop the row; where less is better, rename the columns")


def _as_number(value: Any) -> float | None:
    """Return a number, also one that is written as a text, as in tables; None where it is none."""
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except ValueError:
        return None


def num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many elements two sequences begin with alike; "ab" and "ac" have 1."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def as_chat(row: NormalRow) -> NormalRow:
    """Return a row of strings as a conversation: the prompt is the user's, a response the assistant's.

    A text without a prompt is one where it says who speaks, as HH's do: "\\n\\nHuman: hi\\n\\nAssistant: hello".

    Raises:
        DataError: it has no prompt of its own, nor says who speaks.
    """
    if not row.prompt:
        dialogues = [_dialogue(cast("str", each)) for each in row.responses]
        if not all(dialogues):
            what = "has no prompt of its own nor says who speaks (Human:, Assistant:), but data.strings_as_chat is true"
            raise DataError(row.place, what, "write it as messages, or set data.strings_as_chat=false")
        dialogues = [with_system(each, row.system or None) for each in dialogues]
        if len(dialogues) < 2:
            return msgspec.structs.replace(row, prompt=[], responses=dialogues, system="")
        asked, answers = _shared_apart(row.place, dialogues[0], dialogues[1])
        return msgspec.structs.replace(row, prompt=asked, responses=answers, system="")
    responses: list[Text] = [[{"role": "assistant", "content": each}] for each in row.responses]
    prompt = with_system(asked_in(cast("str", row.prompt)), row.system or None)
    return msgspec.structs.replace(row, prompt=prompt, responses=responses, system="")


def asked_in(text: str) -> Conversation:
    """Return the messages of a prompt: the user's, or those of one that says who speaks and opens the answer (HH)."""
    said = _dialogue(text)
    if not any(message["role"] == "assistant" for message in said):
        return [{"role": "user", "content": text}]
    return said if said[-1]["content"] else said[:-1]


def _dialogue(text: str) -> Conversation:
    """Return the messages of a text that says who speaks; none of another text."""
    before, *turns = SPEAKS.split(text)
    said = zip(turns[::2], turns[1::2], strict=True)
    return [] if before.strip() else [{"role": SPEAKERS[who.casefold()], "content": what.strip()} for who, what in said]


def good_response(row: NormalRow, format: Format) -> NormalRow:
    """Return what is to be imitated of a row: of a pair the chosen response, of a response that is good itself.

    Raises:
        DataError: it cannot be told.
    """
    if row.steps:
        remedy = "set data.only_good=false, and take Process for labelled steps"
        raise DataError(row.place, f"is {format.kind} data, of which data.only_good takes none", remedy)
    if format.is_implicit and isinstance(row.responses[0], str):
        what = "has no prompt of its own, so what of the chosen text is the response cannot be told"
        raise DataError(row.place, what, "give a prompt column, or messages")
    return msgspec.structs.replace(row, responses=row.responses[:1], labels=[])


def _last_apart(row: RawRow) -> tuple[Text, list[Text]]:
    """Split the messages into the prompt and the last, which is what the label judges."""
    messages = _text_or_messages(row, "messages")
    if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        what = "column 'messages' does not end with an answer of the assistant's, which its label would judge"
        raise DataError(row.place, what, "end it with one, or set data.format=language-modeling")
    return messages[:-1], [messages[-1:]]


def _empty(format: Format) -> Text:
    return [] if format.is_conversational else ""


def _whole(row: RawRow) -> Text:
    name, expected = ("text", "a string") if row.columns.get("messages") is None else ("messages", "a list of messages")
    value = row.columns[name]
    if isinstance(value, str) != (name == "text"):
        raise DataError(row.place, f"column {name!r} holds {noun(value)}", f"{expected} was expected")
    return _text_or_messages(row, name)


def _explicit(row: RawRow, names: Sequence[str]) -> tuple[Text, list[Text]]:
    """Return prompt and responses; those that repeat their prompt give it up."""
    responses = [_text_or_messages(row, name) for name in names]
    is_conversational = isinstance(responses[0], list)
    prompt: Text = ""  # may be empty before a string: the response is then the whole text
    if is_conversational or row.columns["prompt"] != "":
        prompt = _text_or_messages(row, "prompt")
    if is_conversational and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    for name, response in zip(names, responses, strict=True):
        if isinstance(response, list) != is_conversational or isinstance(prompt, list) != is_conversational:
            what = f"prompt is {noun(row.columns['prompt'])}, {name} is {noun(row.columns[name])}"
            raise DataError(row.place, what, "write all of them as strings, or all as lists of messages")
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            what = f"column 'prompt': message {len(prompt) - 1}, the last, is the assistant's"
            raise DataError(row.place, what, "end it with the user's; what the assistant says is the response")
        for place, name in enumerate(names):
            answer = _without_head(cast("Conversation", responses[place]), prompt)
            _check_answers(row.place, name, answer, 0)
            responses[place] = answer
    elif len(prompt) >= LEAST_REPEATED and all(cast("str", each).startswith(prompt) for each in responses):
        rest: list[Text] = [cast("str", each)[len(prompt) :] for each in responses]
        if all(cast("str", each).strip() for each in rest):
            responses = rest
    return prompt, responses


def _without_head(messages: Conversation, head: Conversation) -> Conversation:
    return messages[len(head) :] if messages[: len(head)] == head else messages


def _split_pair(row: RawRow) -> tuple[Text, list[Text]]:
    """Split off the messages that chosen and rejected share; strings are split later, between tokens."""
    chosen, rejected = (_text_or_messages(row, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        _check_asked(row, num_shared(chosen, rejected))
        return "", [chosen, rejected]
    if isinstance(chosen, str) or isinstance(rejected, str):
        what = f"chosen is {noun(chosen)}, rejected is {noun(rejected)}"
        raise DataError(row.place, what, "write both as strings, or both as lists of messages")
    return _shared_apart(row.place, chosen, rejected)


def _check_asked(row: RawRow, shared: int) -> None:
    """Refuse two texts that begin with no prompt where another column may hold it."""
    texts = {name: value for name, value in row.columns.items() if isinstance(value, str) and len(value.split()) > 1}
    unread = [name for name in texts if name not in SYSTEMS and not re.match("chosen|rejected|label", name)]
    if shared < LEAST_REPEATED and unread:
        what = f"chosen and rejected begin with nothing that both answer, and nothing reads the column {unread[0]!r}"
        raise DataError(row.place, what, f"set data.columns.prompt={unread[0]}, or drop the column if it is no prompt")


def _shared_apart(place: str, chosen: Conversation, rejected: Conversation) -> tuple[Text, list[Text]]:
    num_before = num_shared(chosen, rejected)
    if chosen != rejected:
        if not num_before:
            what = "chosen and rejected share no message, so there is no prompt"
            raise DataError(place, what, "begin both with the same messages, or give a prompt column")
        _check_answers(place, "chosen", chosen[num_before:], num_before)
        _check_answers(place, "rejected", rejected[num_before:], num_before)
    return chosen[:num_before], [chosen[num_before:], rejected[num_before:]]


def _check_said(row: RawRow, response: Text, name: str) -> None:
    """Insist that there is something to learn in a text, or in each of the assistant's messages."""
    said = (
        [response]
        if isinstance(response, str)
        else [
            message.get("content") or message.keys() - {"role", "content", "weight", "name"}
            for message in response
            if message["role"] == "assistant" and message.get("weight") != 0
        ]
    )
    if said and all(not each or (isinstance(each, str) and not each.strip()) for each in said):
        what = f"column {name!r}: {'what the assistant says' if isinstance(response, list) else 'the text'} is blank"
        raise DataError(row.place, what, "there is nothing to learn in it: drop the row, or set data.on_bad=skip")


def _check_answers(place: str, name: str, messages: Conversation, num_before: int) -> None:
    if not messages or messages[0]["role"] != "assistant":
        found = f"the {messages[0]['role']}'s" if messages else "missing"
        what = f"column {name!r}: message {num_before}, the first after the prompt, is {found}"
        raise DataError(place, what, "the assistant's message was expected there")


def _text_or_messages(row: RawRow, name: str) -> Text:
    value = row.columns[name]
    if isinstance(value, str):
        if not value:
            raise DataError(row.place, f"column {name!r} is empty", "drop the row, or set data.on_bad=skip")
        return value
    return messages_of(row, name)


def _steps(row: RawRow) -> tuple[list[str], list[float]]:
    steps, labels = row.columns["completions"], row.columns["labels"]
    if not isinstance(steps, list) or not all(isinstance(step, str) and step for step in cast("list[Any]", steps)):
        what = f"column 'completions' holds {noun(steps)}"
        raise DataError(row.place, what, "a list of strings, none of them empty, was expected: one for each step")
    if not isinstance(labels, list) or len(cast("list[Any]", labels)) != len(cast("list[Any]", steps)):
        found = f"{len(cast('list[Any]', labels))}" if isinstance(labels, list) else noun(labels)
        what = f"column 'labels' holds {found} for {len(cast('list[Any]', steps))} steps"
        raise DataError(row.place, what, "one label for each step was expected")
    numbers: list[float] = []
    for number, label in enumerate(cast("list[Any]", labels)):
        if label is not None and not (isinstance(label, int | float) and 0 <= label <= 1):
            what = f"column 'labels': step {number} is labelled {label!r}"
            raise DataError(row.place, what, "true, false, a number from 0 to 1, or null was expected")
        numbers.append(math.nan if label is None else float(label))
    if all(math.isnan(number) for number in numbers):
        raise DataError(row.place, "no step has a label", "drop the row, or set data.on_bad=skip")
    return cast("list[str]", steps), numbers


def _finish(row: RawRow) -> Finish:
    """Return how sampling ended, as graphs/generate.py and serving engines write it."""
    name = "finish" if row.columns.get("finish") else "finish_reason"
    value = row.columns.get(name)
    if not isinstance(value, str) or not value:
        return ""
    word = value.rpartition(".")[2].casefold()  # FinishReason.MAX_TOKENS
    if word not in CUT | ENDED:
        remedy = "stop or length was expected, of a response that was sampled; else give the column another name"
        raise DataError(row.place, f"column {name!r} holds {value!r}", remedy)
    return "length" if word in CUT else "stop"


def _verdict(row: RawRow) -> float:
    label = row.columns["label"]
    label = WORDS.get(label.casefold(), label) if isinstance(label, str) else label  # tables in CSV have texts alone
    if isinstance(label, int | float) and label in (0, 1):
        return float(label)
    remedy = "true or false (or 1 or 0) was expected; for a score see data.condition_on"
    raise DataError(row.place, f"column 'label' holds {label!r}", remedy)


def number_of(row: RawRow, name: str, default: float | None = None) -> float:
    """Return the finite number in a column, or the default where there is none.

    Raises:
        DataError: the column holds something else, or nothing and there is no default.
    """
    value = row.columns.get(name)
    if value is None and default is not None:
        return default
    number = _as_number(value)
    if isinstance(value, bool) or number is None or not math.isfinite(number):
        found = "is missing" if value is None else f"holds {noun(value)}"
        raise DataError(row.place, f"column {name!r} {found}", "a finite number was expected")
    return number
