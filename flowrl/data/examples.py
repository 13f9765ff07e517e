"""Examples to learn from offline: read, brought to one shape, tokenized, checked, split and mixed before a run starts.

Invariants:
- `row_at(position)` is a pure function of the data, the settings and the position, so that a run can resume anywhere;
- no training example has the prompt of a held-out one;
- a row is learned as often as it is there;
- a row that cannot be used stops the load or is counted with its reason, as the settings say.

Called by the examples stages, `flowrl check` and `flowrl data check`.

Tests: tests/unit/data/test_examples.py
"""

from __future__ import annotations

import datetime  # settings are built from their annotations
import math
import re
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from flowrl.config import Config, Meta
from flowrl.data.conditioning import score_range, with_levels
from flowrl.data.formats import (
    Format,
    Kind,
    NormalRow,
    as_chat,
    detect,
    good_response,
    normalise,
    number_of,
)
from flowrl.data.made import is_made, made_examples
from flowrl.data.mixing import Mixture, split
from flowrl.data.naming import unread, with_answer, with_names
from flowrl.data.prompts import GENERATED, REASONING_GYM, UNREAD
from flowrl.data.rendering import Encoded, Renderer
from flowrl.data.sources import DataDigest, RawRow, read_rows
from flowrl.ending import DATE
from flowrl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from flowrl.data.sources import Bad

Reason = Literal["bad", "too long", "truncated", "repeated", "labelled false", "prompt held out", "token at a boundary"]
BARE = (
    "examples: strings are learned as they are, without the chat template that the model is asked with; "
    "data.strings_as_chat=true puts prompt and response under it"
)
DENIALS = ("false", "no", "0", "0.0")
VERDICT = re.compile(r"(?:^|_)(?:correct|right|valid|accept(?:ed)?|pass(?:ed)?|verified|success|solved|good)(?:$|_)")
MAX_LEVELS = 100  # finer ones would be told apart by a digit that means little


class ExampleSource(Config):
    """One of several sources."""

    source: str  # as data.source
    weight: Annotated[float, Meta(gt=0)] = 1.0  # its share of what is learned, relative to the others
    format: Kind | None = None  # None: found out
    split: str = "train"  # as data.split
    subset: str = ""  # as data.subset
    columns: dict[str, str] = {}  # as data.columns


class ExampleData(Config):
    """Where examples come from and how they become tokens."""

    # A file (.jsonl, .json, .csv, .tsv, each also .gz; .parquet, .arrow), a directory, a Hugging Face data set id, or
    # examples made on the spot: reasoning-gym, reasoning-gym:preference, reasoning-gym:unpaired-preference.
    source: str = REASONING_GYM
    format: Kind | None = None  # None: found out from the columns
    num_train: Annotated[int, Meta(ge=0)] = 0  # training examples; 0: all there are (reasoning-gym makes 192)
    num_heldout: Annotated[int, Meta(ge=0)] = 64  # examples kept for evaluation
    seed: int = 0  # of the order and what is made; what is held out is held out whatever the seed
    max_tokens: Annotated[int, Meta(ge=2)] = 1024  # of a prompt and one response
    on_long: Literal["stop", "skip", "truncate"] = "stop"  # a longer example; truncate cuts its responses' ends
    on_bad: Literal["stop", "skip"] = "stop"  # a row that cannot be used
    only_good: bool = False  # learn a pair's chosen response, and those labelled true, as demonstrations
    learn: Literal["all", "last"] = "all"  # the assistant's turns in a conversation
    chat_template: str = ""  # a Jinja file, saved with the model; "": the tokenizer's
    date: datetime.date = DATE  # that a chat template which writes today's date is told
    strings_as_chat: bool = False  # true: a string prompt is a user's message and a string response the assistant's
    condition_on: list[str] = []  # columns with scores, written before each prompt (SteerLM) as levels
    condition_levels: Annotated[int, Meta(ge=2, le=MAX_LEVELS)] = 10  # the least score is 0, the greatest levels - 1
    step_separator: str = "\n"  # put after each step of stepwise supervision
    columns: dict[str, str] = {}  # the names of the columns in the source, as completion: answer
    split: str = "train"  # of a hub data set; of a directory, the files whose names begin so
    subset: str = ""  # of a hub data set, where it has several; of a directory, the folder of this name
    mix: list[ExampleSource] = []  # several sources in place of the one above

    def __post_init__(self) -> None:
        alone = ExampleSource(source=self.source, format=self.format, split=self.split, subset=self.subset)
        if self.mix and (alone != ExampleSource(source=REASONING_GYM) or self.columns):
            what = "is set, and so is one of source, format, split, subset and columns"
            raise ConfigError("data.mix", what, "set these in each source of the mix")

    @property
    def sources(self) -> list[ExampleSource]:
        """Return the sources, of which there is at least one."""
        alone = ExampleSource(
            source=self.source, format=self.format, split=self.split, subset=self.subset, columns=self.columns
        )
        return self.mix or [alone]


class ExampleRow(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt with what is known of its responses."""

    prompt_ids: list[int]
    responses: list[list[int]]  # of a preference: chosen, rejected
    masks: list[list[int]] | None = None  # 1 on tokens to learn; None: all
    labels: list[float] = []  # one for each response: margin or desirability; empty: none
    step_labels: list[list[float]] | None = None  # one for each response token; nan but at the ends of labelled steps
    kind: Kind | None = None  # of data that it is; None: made up, to try an objective on
    index: int  # its place among the rows of its source
    place: str  # file and line, for errors

    @property
    def num_tokens(self) -> int:
        """Return the tokens of the prompt and the longest response."""
        return len(self.prompt_ids) + max(map(len, self.responses))


class ExampleSet:
    """The training and held-out examples of all sources."""

    def __init__(
        self, *, parts: list[list[ExampleRow]], heldout: list[ExampleRow], data: ExampleData, report: ExampleFindings
    ) -> None:
        self.train = [row for part in parts for row in part]
        self.heldout = heldout
        self.formats = report.formats  # of each source
        self.ranges = report.ranges  # least and greatest score by column of condition_on
        self.counts = report.counts  # rows by what befell them
        self.skipped = report.skipped  # why, one line for each row that is bad or too long
        self.digest = report.digest  # of the sources' rows, whatever befell them
        self.is_bare = report.is_bare  # strings are learned without the model's chat template
        self.denied = report.denied  # rows that a column of verdicts says no of, by its name
        self.unread = report.unread  # columns that a prompt is taken to say all of
        self._parts = parts
        self._mixture = Mixture([len(part) for part in parts], [each.weight for each in data.sources], data.seed)

    def __len__(self) -> int:
        """Return the number of training examples."""
        return len(self.train)

    def told(self) -> Iterator[str]:
        """Yield what a run says of its examples before it starts."""
        formats = "; ".join(dict.fromkeys(map(str, self.formats)))
        yield f"examples: {len(self.train)} to train on, {len(self.heldout)} held out ({formats})"
        reasons: tuple[Reason, ...] = ("bad", "too long", "labelled false", "prompt held out")
        left_out = [f"{self.counts[reason]} {reason}" for reason in reasons if self.counts[reason]]
        if left_out:
            yield f"examples: left out {', '.join(left_out)}"
        if self.counts["repeated"]:
            yield f"examples: {self.counts['repeated']} rows are others once more, and are learned once more"
        if self.is_bare:
            yield BARE
        for name in sorted(self.unread):
            yield UNREAD.format(name)
        for name, count in self.denied.items():
            yield (
                f"warning: rows that say {name}=false ({count} of them) are learned like the others: nothing reads "
                f"that column; data.columns.label={name} with data.only_good=true leaves them out"
            )

    def row_at(self, position: int) -> ExampleRow:
        """Return the training example at `position` of the endless order: sources mixed, every epoch shuffled anew."""
        source, place = self._mixture.at(position)
        return self._parts[source][place]


class ExampleFindings:
    """What is found out while loading."""

    def __init__(self) -> None:
        self.formats: list[Format] = []
        self.ranges: dict[str, tuple[float, float]] = {}
        self.counts: Counter[Reason] = Counter()
        self.skipped: list[str] = []
        self.digest = ""
        self.is_bare = False
        self.denied: Counter[str] = Counter()
        self.unread: set[str] = set()

    def look(self, raw: RawRow, kind: Kind) -> None:
        """Take note of what a prompt leaves unread, and of a demonstration that its row says is none."""
        self.unread.update(unread(raw.columns))
        if kind in ("prompt-completion", "language-modeling"):
            said = ((name, value) for name, value in raw.columns.items() if VERDICT.search(name))
            self.denied.update(name for name, value in said if str(value).casefold() in DENIALS)

    def skip(self, error: DataError, reason: Reason) -> None:
        """Count a row that is left out."""
        self.counts[reason] += 1
        self.skipped.append(str(error))


class _Found(msgspec.Struct, frozen=True):
    source: int
    index: int
    row: NormalRow
    kind: Kind
    digest: bytes


def load_examples(data: ExampleData, tokenizer: PreTrainedTokenizerBase) -> ExampleSet:
    """Read, normalise, tokenize, check and split the examples.

    The split goes by a digest of the prompt: it does not depend on the order of the source, a template or the seed. So
    what one run was scored on is nothing that another learns; rows appended later leave most of it as it was.

    Raises:
        DataError: a source or a row cannot be used, or too few examples remain.
        ModelError: the tokenizer lacks a chat template or an EOS token that is needed.
    """
    report = ExampleFindings()
    found = _read(data, report)
    are_strings = any(not each.is_conversational and each.kind != "language-modeling" for each in report.formats)
    report.is_bare = are_strings and not data.strings_as_chat and bool(data.chat_template or tokenizer.chat_template)
    for name in data.condition_on:
        report.ranges[name] = score_range(name, [each.row for each in found])
    found.sort(key=lambda each: _digest(each.row.asked) + each.digest)
    report.counts["repeated"] = len(found) - len({each.digest for each in found})
    rows = split(
        _tokenized(data, found, tokenizer, report),
        num_sources=len(data.sources),
        num_heldout=data.num_heldout,
        num_train=data.num_train,
        prompt_of=lambda each, _: _digest(each.row.asked),
    )
    report.counts["prompt held out"] += rows.num_left_out
    _check_enough(data, len(rows.heldout), rows.num_train, report)
    return ExampleSet(parts=rows.parts, heldout=rows.heldout, data=data, report=report)


def read_source(data: ExampleData, source: ExampleSource, bad: Bad) -> Iterable[RawRow]:
    """Yield a source's rows, with its columns under the names that formats know."""
    if is_made(source.source):
        num_rows = (data.num_train or GENERATED) + data.num_heldout
        yield from made_examples(source.source, num_rows=num_rows, seed=data.seed)
        return
    for row in read_rows(source.source, split=source.split, subset=source.subset, bad=bad):
        try:
            yield with_answer(with_names(row, source.columns))
        except DataError as error:
            bad(error)


def _read(data: ExampleData, report: ExampleFindings) -> list[_Found]:
    """Return the usable rows of all sources, and count the others."""
    found: list[_Found] = []
    seen = DataDigest()

    def bad(error: DataError) -> None:
        if data.on_bad == "stop":
            raise error
        report.skip(error, "bad")

    for number, source in enumerate(data.sources):
        format: Format | None = None
        for index, raw in enumerate(read_source(data, source, bad)):
            seen.add(raw.columns, number)
            try:
                format = format or detect(raw, source.format)
                report.look(raw, format.kind)
                row = _normal(data, raw, format, source.format)
            except DataError as error:
                bad(error)
                continue
            if data.only_good and format.kind == "unpaired-preference" and not row.labels[0]:
                report.counts["labelled false"] += 1
                continue
            kind: Kind = "prompt-completion" if data.only_good else format.kind
            row = good_response(row, format) if data.only_good else row
            found.append(_Found(number, index, row, kind, _digest(msgspec.structs.replace(row, place=""))))
        if format is not None:
            report.formats.append(format)
    report.digest = str(seen)
    return found


def _normal(data: ExampleData, raw: RawRow, format: Format, given: Kind | None) -> NormalRow:
    if format.kind == "prompt-only":
        what = f"is {format}: it has no response to learn"
        raise DataError(raw.place, what, "give a completion, or train online with graphs/ppo_async.py")
    row = normalise(raw, format, given)
    if data.condition_on:
        if format.kind not in ("prompt-completion", "language-modeling"):
            what = f"data.condition_on is set, but this is {format.kind} data"
            raise DataError(raw.place, what, "condition demonstrations: prompt-completion or language-modeling")
        scores = {name: number_of(raw, name) for name in data.condition_on}
        row = msgspec.structs.replace(row, scores=scores)
    row = as_chat(row) if data.strings_as_chat and not format.is_conversational else row
    if row.system:
        what = "has a system prompt in a column of its own, which only a conversation has a place for"
        raise DataError(raw.place, what, "set data.strings_as_chat=true, or write the row as messages")
    if isinstance(row.prompt, str) and row.prompt and (row.tools or row.template_options):
        what = f"has {'tools' if row.tools else 'chat_template_kwargs'}, which only a conversation has a place for"
        raise DataError(raw.place, what, "set data.strings_as_chat=true, write the row as messages, or drop the column")
    return row


def _digest(value: Any) -> bytes:
    return blake2b(msgspec.json.encode(value), digest_size=16).digest()


def _tokenized(
    data: ExampleData, rows: Sequence[_Found], tokenizer: PreTrainedTokenizerBase, report: ExampleFindings
) -> Iterator[tuple[_Found, ExampleRow]]:
    """Yield each row that can be learned with its tokens."""
    renderer = Renderer(
        tokenizer,
        template=read_template(data.chat_template) if data.chat_template else None,
        learns_all=data.learn == "all",
        separator=data.step_separator,
        day=data.date,
    )
    context = tokenizer.model_max_length  # about 1e30 where the tokenizer states none
    limit, name = min((data.max_tokens, "data.max_tokens"), (context, "the model's context"))
    for found in rows:
        conditioned = with_levels(found.row, report.ranges, num_levels=data.condition_levels)
        try:
            encoded = renderer.encode(conditioned)
            if flaw := _flaw(encoded):
                raise DataError(found.row.place, flaw, "drop the row, or set data.on_bad=skip")
        except DataError as error:
            if data.on_bad == "stop":
                raise
            report.skip(error, "bad")
            continue
        num_tokens = len(encoded.prompt_ids) + max(map(len, encoded.responses))
        if num_tokens > limit:
            encoded = _cut(encoded, limit) if data.on_long == "truncate" else None
            if encoded is None:
                what = f"prompt and response have {num_tokens} tokens, {name} is {limit}"
                error = DataError(found.row.place, what, "raise it, or set data.on_long=skip (or truncate)")
                if data.on_long == "stop":
                    raise error
                report.skip(error, "too long")
                continue
            report.counts["truncated"] += 1
        if encoded.is_separate:
            report.counts["token at a boundary"] += 1
        row = ExampleRow(
            prompt_ids=encoded.prompt_ids,
            responses=encoded.responses,
            masks=encoded.masks,
            labels=[] if found.row.steps else found.row.labels,
            step_labels=encoded.step_labels,
            kind=found.kind,
            index=found.index,
            place=found.row.place,
        )
        yield found, row


def _cut(encoded: Encoded, limit: int) -> Encoded | None:
    """Return the row with its responses' ends cut off, or None where nothing to learn would remain."""
    room = limit - len(encoded.prompt_ids)
    if room < 1:
        return None
    cut = msgspec.structs.replace(
        encoded,
        responses=[response[:room] for response in encoded.responses],
        masks=encoded.masks and [mask[:room] for mask in encoded.masks],
        step_labels=encoded.step_labels and [labels[:room] for labels in encoded.step_labels],
    )
    return None if _flaw(cut) else cut


def _flaw(encoded: Encoded) -> str:
    """Say why nothing can be learned from a row's tokens; "" where something can."""
    masks = encoded.masks or [[1] * len(response) for response in encoded.responses]
    if not all(any(mask) for mask in masks):
        return "a response has no token to learn"
    if encoded.step_labels and all(math.isnan(label) for label in encoded.step_labels[0]):
        return "no step with a label is left"
    if len(encoded.responses) == 2 and encoded.responses[0] == encoded.responses[1]:
        return "chosen and rejected are the same tokens"
    return ""


def read_template(file: str) -> str:
    """Return a chat template's text.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"data.chat_template {file}", f"cannot be read ({reason})", "give a Jinja file") from error


def _check_enough(data: ExampleData, num_heldout: int, num_train: int, report: ExampleFindings) -> None:
    where = "data.mix" if data.mix else f"data {data.source}"
    num_left_out = report.counts["prompt held out"]
    there = f"{num_heldout + num_train + num_left_out} different usable examples"
    if report.skipped and not num_heldout + num_train:
        raise DataError(where, f"none of {len(report.skipped)} rows is usable; the first: {report.skipped[0]}")
    if not num_heldout + num_train:
        raise DataError(where, "holds no rows", "check data.source and data.split")
    also = f" ({num_left_out} more have the prompt of one held out)" if num_left_out else ""
    if num_heldout < data.num_heldout or not num_train:
        what = f"{there}, of which num_heldout={data.num_heldout} leaves none to train on{also}"
        raise DataError(where, what, f"lower data.num_heldout below {num_heldout + num_train}")
    if num_train < data.num_train:
        what = f"{there} are {num_heldout} held out and {num_train} to train on{also}, not {data.num_train}"
        raise DataError(where, what, f"lower num_train to {num_train}, or set 0 to take all")
