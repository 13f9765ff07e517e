"""Prompts to train and to evaluate on: read, rendered, tokenized, checked and split before anything starts.

Invariants:
- `row_at(position)` is a pure function of the data, the settings and the position, so that a run can resume anywhere;
- rows are told apart by all their columns, and each is learned as often as it is there;
- no training prompt has the same text as a held-out one;
- a row that cannot be used stops the load or is counted in `skipped`, as the settings say.

Called by the prompts and evaluator stages and by `flowrl check`.

Tests: tests/unit/data/test_prompts.py
"""

from __future__ import annotations

import datetime  # settings are built from their annotations
import json
from collections import Counter
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec

from flowrl.config import Config, Meta, widen
from flowrl.data.conversations import (
    SYSTEM_ROLES,
    check_history,
    messages_of,
    noun,
    options_of,
    system_of,
    tools_of,
    with_system,
)
from flowrl.data.formats import NormalRow, asked_in
from flowrl.data.mixing import Mixture, split
from flowrl.data.naming import prompt_column, unread, with_names, with_prompt
from flowrl.data.rendering import OPENER, Renderer
from flowrl.data.sources import DataDigest, RawRow, read_rows
from flowrl.data.tasks import Task, make_rows
from flowrl.ending import DATE
from flowrl.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from flowrl.data.sources import Bad

REASONING_GYM = "reasoning-gym"
# Training prompts made when num_train is 0: with 64 held out they use up what the default tasks have at these weights.
GENERATED = 192

UNREAD = "prompts: the column {!r} is no part of what is asked, for a column 'prompt' is taken for all of it"
NUM_LOOKED_AT = 20_000  # rows of a source, for their kinds
MOST_KINDS = 8  # of rows in a source
OWN_ANSWER_TOKENS = 256  # a short chain of thought; half of the default max_model_len
# Tasks that SmolLM2-135M-Instruct answers right 12 to 14 % of the time at temperature 1: between never and always,
# so that the samples of a group differ and there is something to learn within a few dozen steps.
DEFAULT_TASKS = (
    Task(name="chain_sum", weight=5, config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    Task(name="products", weight=3, config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
)


class PromptSource(Config):
    """One of several sources."""

    source: str  # as data.source
    weight: Annotated[float, Meta(gt=0)] = 1.0  # its share of what is sampled, relative to the others
    split: str = "train"  # as data.split
    subset: str = ""  # as data.subset
    prompt_column: str = ""  # as data.prompt_column
    columns: dict[str, str] = {}  # as data.columns


class PromptData(Config):
    """Where prompts come from and how they are rendered."""

    source: str = REASONING_GYM  # or a file or directory (.jsonl, .json, .csv, .parquet, ...), a Hugging Face id
    num_train: Annotated[int, Meta(ge=0)] = 0  # training prompts; 0: all there are (reasoning-gym makes 192)
    num_heldout: Annotated[int, Meta(ge=0)] = 64  # prompts kept for evaluation
    seed: int = 0  # of the tasks and the order; what is held out is held out whatever the seed
    max_prompt_tokens: Annotated[int, Meta(ge=1)] = 256  # a longer rendered prompt is a bad row
    system_prompt: str | None = None  # for prompts without a system message; None: what the chat template puts there
    date: datetime.date = DATE  # told to a template that writes today's: a prompt is the same on every day
    chat_template: bool = True  # false: strings go to the model as they are
    prompt_column: str = ""  # holds a string, or a list of messages; "": found out (see flowrl.data.naming)
    columns: dict[str, str] = {}  # other names of columns, for reward functions: `answer: solution`
    split: str = "train"  # of a hub data set; of a directory, the files and folders whose names begin so
    subset: str = ""  # of a hub data set, where it has several; of a directory, the folder of this name
    mix: list[PromptSource] = []  # several sources in place of the one above
    tasks: list[Task] = msgspec.field(default_factory=lambda: list(DEFAULT_TASKS))  # reasoning-gym only
    on_bad: Literal["stop", "skip"] = "stop"  # a row that cannot be used

    def __post_init__(self) -> None:
        if self.system_prompt is not None and not self.chat_template:
            raise ConfigError("data.system_prompt", "is set but chat_template is false", "unset one of the two")
        if self.mix and self._alone != PromptSource(source=REASONING_GYM):
            what = "is set, and so is one of source, split, subset, prompt_column and columns"
            raise ConfigError("data.mix", what, "set these in each source of the mix")

    def implied(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return room for answers where the tasks are not those that come with flowrl, whose answers are numbers."""
        return {"sampling.max_tokens": OWN_ANSWER_TOKENS} if given.keys() & {"source", "mix", "tasks"} else {}

    @property
    def _alone(self) -> PromptSource:
        return widen(PromptSource, self)

    @property
    def sources(self) -> list[PromptSource]:
        """Return the sources, of which there is at least one."""
        return self.mix or [self._alone]


class PromptRow(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, ready to be sampled."""

    index: int  # its place among the source's rows
    place: str  # file and line, for errors
    token_ids: list[int]
    text: str  # as rendered
    begun: str = ""  # what it ends with of the answer
    columns: dict[str, Any]  # for reward functions; "prompt" is the prompt as it stood in the data


class RowsAlike(msgspec.Struct, frozen=True):
    """Rows of a source whose columns hold the same types of values: code that takes one of them takes the others."""

    place: str  # of the first of them
    columns: dict[str, Any]  # of the first, as reward functions get them
    num_rows: int

    def __str__(self) -> str:
        """Return it in words: `a row of the data (a.jsonl:3, one of 12 like it)`."""
        alike = f", one of {self.num_rows} like it" if self.num_rows > 1 else ""
        return f"a row of the data ({self.place}{alike})"


class PromptSet:
    """The training and held-out prompts of all sources."""

    def __init__(
        self, *, parts: list[list[PromptRow]], heldout: list[PromptRow], data: PromptData, report: PromptFindings
    ) -> None:
        self.train = [row for part in parts for row in part]
        self.heldout = heldout
        self.found_in = report.found_in  # the column of the prompts, of each source
        self.num_repeated = report.num_repeated  # rows that are others once more
        self.num_left_out = report.num_left_out  # rows that ask what a held-out one asks
        self.unopened = report.unopened  # what the policy writes before each answer, for want of an opened turn
        self.skipped = report.skipped  # why, one line for each bad row
        self.digest = str(report.digest)  # of the sources' rows, whatever befell them
        is_made = any(each.source == REASONING_GYM for each in data.sources)
        self._tasks_idle = not is_made and data.tasks != list(DEFAULT_TASKS)
        self._parts = parts
        self._mixture = Mixture([len(part) for part in parts], [each.weight for each in data.sources], data.seed)

    def told(self) -> Iterator[str]:
        """Yield what a run says of its prompts before it starts."""
        if self._tasks_idle:
            yield "data.tasks: no effect, for no source is reasoning-gym"
        columns = ", ".join(dict.fromkeys(map(repr, self.found_in)))
        yield f"prompts: {len(self.train)} to train on, {len(self.heldout)} held out, asked in the column {columns}"
        left_out = {
            "cannot be used": len(self.skipped),
            "ask what a held-out one asks": self.num_left_out,
        }
        if any(left_out.values()):
            yield f"prompts: left out {', '.join(f'{count} that {why}' for why, count in left_out.items() if count)}"
        for name in sorted({name for row in self.train for name in unread(row.columns)}):
            yield UNREAD.format(name)
        if self.num_repeated:
            yield f"prompts: {self.num_repeated} rows are others once more, and are sampled once more"
        if self.unopened:
            what = f"the chat template opens no turn for the assistant, so the policy writes {self.unopened!r} itself"
            yield f"warning: prompts: {what}; give the model a template with add_generation_prompt"

    def row_at(self, position: int) -> PromptRow:
        """Return the training prompt at `position` of the endless order: sources mixed, every epoch shuffled anew."""
        source, place = self._mixture.at(position)
        return self._parts[source][place]


class PromptFindings:
    """What is found out while loading."""

    def __init__(self, data: PromptData) -> None:
        self.found_in: list[str] = []
        self.num_repeated = 0
        self.num_left_out = 0
        self.unopened = ""
        self.skipped: list[str] = []
        self.digest = DataDigest()
        self._stops = data.on_bad == "stop"

    def bad(self, error: DataError) -> None:
        """Take note of a row that cannot be used, or raise."""
        if self._stops:
            raise error
        self.skipped.append(str(error))


class _Found(msgspec.Struct, frozen=True):
    source: int
    index: int
    row: RawRow
    text: str  # as rendered
    digest: bytes  # of all columns


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a prepared model.

    Raises:
        ModelError: the directory holds none that transformers can read.
    """
    kind = _tokenizer_class(directory)
    try:
        return cast("PreTrainedTokenizerBase", kind.from_pretrained(directory, local_files_only=True))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"tokenizer {directory}", f"cannot be loaded ({reason})", "save it there again") from error


def _tokenizer_class(directory: Path) -> Any:
    """Return the class of a tokenizer that is its tokenizer.json and nothing besides, else the one that finds out.

    AutoTokenizer imports torch: three seconds and 300 MB for each process that only tokenizes.
    """
    try:
        named = json.loads((directory / "tokenizer_config.json").read_bytes()).get("tokenizer_class")
    except (OSError, ValueError):
        named = None
    if named == "TokenizersBackend":
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_prompts(data: PromptData, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read, render, tokenize, check and split the prompts.

    The split goes by a digest of the prompt as the data have it: it does not depend on the order of the source, a
    template or the seed. So a prompt that one run was scored on is none that another, or its continuation, learns; rows
    appended later leave most of it as it was.

    Raises:
        DataError: the source or a row cannot be used, or too few prompts remain.
        ModelError: a chat template is wanted and the tokenizer has none.
    """
    if data.chat_template and not tokenizer.chat_template:
        remedy = "take an instruction-tuned model, or set data.chat_template=false to use prompts as they are"
        raise ModelError(f"tokenizer {tokenizer.name_or_path}", "has no chat template", remedy)
    report = PromptFindings(data)
    renderer = Renderer(tokenizer, day=data.date)
    report.unopened = renderer.unopened() if data.chat_template else ""
    found = list(_rendered(data, renderer, report))
    found.sort(key=lambda each: _digest(each.row.columns["prompt"]) + each.digest)
    report.num_repeated = len(found) - len({each.digest for each in found})
    rows = split(
        _tokenized(found, data, tokenizer, renderer, report.bad),
        num_sources=len(data.sources),
        num_heldout=data.num_heldout,
        num_train=data.num_train,
        prompt_of=lambda _, row: row.text,
    )
    report.num_left_out = rows.num_left_out
    _check_enough(data, len(rows.heldout), rows.num_train, report)
    return PromptSet(parts=rows.parts, heldout=rows.heldout, data=data, report=report)


def rows_alike(data: PromptData) -> list[list[RowsAlike]]:
    """Return the kinds of rows of each source, that of its first row and then the commonest: what code is tried on.

    Looks at the first `NUM_LOOKED_AT` rows of a source.

    Raises:
        DataError: a source cannot be read, or none of its rows has a prompt.
    """
    return [_rows_alike(data, number) for number in range(len(data.sources))]


def num_prompts(data: PromptData) -> int:
    """Return how many prompts there are to train on, bad rows and repeated questions among them.

    Raises:
        DataError: a source cannot be read.
    """
    if data.num_train:
        return data.num_train
    rows = (row for source in data.sources for row in _raw_rows(data, source, lambda error: None))
    return max(0, sum(1 for _ in rows) - data.num_heldout)


def _rows_alike(data: PromptData, number: int) -> list[RowsAlike]:
    found: dict[Any, RawRow] = {}
    counts: Counter[Any] = Counter()
    for row in islice(_asking(data, number, lambda error: None), NUM_LOOKED_AT):
        kind = _kind_of(row.columns)
        if kind not in found:
            try:
                prompt_of(data, row)
            except DataError:
                continue
            found[kind] = row
        counts[kind] += 1
    if not found:
        where = f"data {data.sources[number].source}"
        raise DataError(where, "no row has a prompt", "check data.source and data.prompt_column")
    first, *others = found
    others.sort(key=lambda kind: -counts[kind])
    return [RowsAlike(found[kind].place, found[kind].columns, counts[kind]) for kind in [first, *others][:MOST_KINDS]]


def _kind_of(value: Any) -> Any:
    """Return what a value is, and what the fields of an object and the first in a list are; None for what is empty."""
    if isinstance(value, dict):
        fields = sorted(cast("dict[str, Any]", value).items())
        return tuple((name, kind) for name, each in fields if (kind := _kind_of(each)) is not None) or None
    if isinstance(value, list):
        return ("list", _kind_of(value[0])) if value else None
    is_empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    return None if is_empty else "number" if isinstance(value, int | float) else type(value).__name__


def _asking(data: PromptData, number: int, bad: Bad, report: PromptFindings | None = None) -> Iterator[RawRow]:
    """Yield a source's rows with their prompts in the column `prompt`, as the data have them."""
    source = data.sources[number]
    column = source.prompt_column
    for row in _raw_rows(data, source, bad):
        if report is not None:
            report.digest.add(row.columns, number)
        try:
            named = with_names(row, source.columns)
            column = column or prompt_column(named)
            yield with_prompt(named, column)
        except DataError as error:
            bad(error)
    if report is not None:
        report.found_in.append(column)


def _raw_rows(data: PromptData, source: PromptSource, bad: Bad) -> Iterable[RawRow]:
    if source.source == REASONING_GYM:
        return make_rows(data.tasks, num_rows=(data.num_train or GENERATED) + data.num_heldout, seed=data.seed)
    return read_rows(source.source, split=source.split, subset=source.subset, bad=bad)


def _rendered(data: PromptData, renderer: Renderer, report: PromptFindings) -> Iterator[_Found]:
    for number in range(len(data.sources)):
        for index, row in enumerate(_asking(data, number, report.bad, report)):
            try:
                yield _Found(number, index, row, _render(data, renderer, row), _digest(row.columns))
            except DataError as error:
                report.bad(error)


def _digest(value: Any) -> bytes:
    return blake2b(msgspec.json.encode(value, order="deterministic"), digest_size=16).digest()


def _render(data: PromptData, renderer: Renderer, row: RawRow) -> str:
    """Return a row's prompt as the model reads it.

    A column `answer_prefix` begins the policy's turn; what is sampled continues it.
    """
    normal = prompt_of(data, row)
    prefix = row.columns.get("answer_prefix") or ""
    if not isinstance(prefix, str):
        raise DataError(row.place, f"column 'answer_prefix' holds {noun(prefix)}", "a string was expected")
    if not isinstance(normal.prompt, str):
        text = renderer.prompt_text(normal, prefix=prefix)
        renderer.check_history(normal, text)
        return text
    return f"{normal.prompt}\n{prefix}" if prefix else normal.prompt


def prompt_of(data: PromptData, row: RawRow) -> NormalRow:
    """Return a row's prompt: messages under a chat template, a string without one.

    Raises:
        DataError: there is none, or it is malformed.
    """
    prompt = row.columns["prompt"]
    if not isinstance(prompt, str | list):
        raise DataError(row.place, f"the prompt is {noun(prompt)}", "a prompt is a string or a list of messages")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise DataError(row.place, "the prompt is empty", "drop the row, or set data.on_bad=skip")
    if isinstance(prompt, str):
        check_history(row)
    system = system_of(row)
    if not data.chat_template:
        if system:
            what = "has a system prompt in a column of its own, which only a chat template has a place for"
            raise DataError(row.place, what, "set data.chat_template=true, or write it into the prompt")
        if isinstance(prompt, str):
            if given := "tools" if tools_of(row) else "chat_template_kwargs" if options_of(row) else "":
                what = f"has {given}, which only a chat template has a place for"
                raise DataError(row.place, what, "set data.chat_template=true, or drop the column")
            return NormalRow(place=row.place, prompt=prompt)
        remedy = "set data.chat_template=true, or write the prompt as one string"
        raise DataError(row.place, "is a conversation but data.chat_template is false", remedy)
    messages = asked_in(prompt) if isinstance(prompt, str) else messages_of(row, "prompt", "the prompt")
    asked = [each for each in messages if each["role"] not in SYSTEM_ROLES]
    if not asked or (asked[-1]["role"] == "user" and not asked[-1]["content"].strip()):
        what = "the last message of the prompt is blank" if asked else "the prompt holds nothing but a system message"
        raise DataError(row.place, what, "drop the row, or set data.on_bad=skip")
    messages = with_system(messages, system or data.system_prompt)
    return NormalRow(place=row.place, prompt=messages, tools=tools_of(row), template_options=options_of(row))


def _tokenized(
    rows: Iterable[_Found],
    data: PromptData,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    bad: Bad,
) -> Iterator[tuple[_Found, PromptRow]]:
    context = tokenizer.model_max_length  # about 1e30 where the tokenizer states none
    limit, name = min((data.max_prompt_tokens, "data.max_prompt_tokens"), (context, "the model's context"))
    for each in rows:
        token_ids = renderer.prompt_ids(each.text, is_rendered=data.chat_template)
        if len(token_ids) > limit:
            found = f"the prompt has {len(token_ids)} tokens, {name} is {limit}"
            bad(DataError(each.row.place, found, "raise it, shorten the row, or set data.on_bad=skip"))
            continue
        yield (
            each,
            PromptRow(
                index=each.index,
                place=each.row.place,
                token_ids=token_ids,
                text=each.text,
                begun=_begun(each.text, each.row.columns.get("answer_prefix") or ""),
                columns=each.row.columns,
            ),
        )


def _begun(text: str, prefix: str) -> str:
    """Return what a rendered prompt has of the answer: the template's opened thinking, and the row's own beginning."""
    opener = OPENER.search(text.removesuffix(prefix))
    return text[opener.start() :] if opener else prefix


def _where(data: PromptData) -> str:
    return "data.mix" if data.mix else f"data {data.source}"


def _check_enough(data: PromptData, num_heldout: int, num_train: int, report: PromptFindings) -> None:
    where, skipped = _where(data), report.skipped
    there = f"{num_heldout + num_train} usable prompts"
    also = f" ({report.num_left_out} more ask what one held out asks)" if report.num_left_out else ""
    if skipped and not num_heldout + num_train:
        raise DataError(where, f"all {len(skipped)} rows are bad; the first: {skipped[0]}")
    if not num_heldout + num_train:
        raise DataError(where, "holds no rows", "check data.source and data.split")
    if num_heldout < data.num_heldout or not num_train:
        what = f"{there}, of which num_heldout={data.num_heldout} leaves none to train on{also}"
        raise DataError(where, what, f"lower data.num_heldout below {num_heldout + num_train}")
    if num_train < data.num_train:
        remedy = f"lower num_train to {num_train}, or set 0 to take all"
        what = f"{there} are {num_heldout} held out and {num_train} to train on{also}, not {data.num_train}"
        raise DataError(where, what, remedy)
