"""Prompts to train and to evaluate on: read, rendered, tokenized, checked and split before anything starts.

Invariants: `row_at(position)` is a pure function of the data, the settings and the position, so that a run can resume
anywhere; no training prompt has the same text as a held-out one; a row that cannot be used stops the load or is
counted in `skipped`, as the settings say. Called by the prompts and evaluator stages and by `flowrl check`.
"""

from __future__ import annotations

import contextlib
import datetime  # settings are built from their annotations
import difflib
import functools
import json
import random
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec

from flowrl.config import Config, Meta
from flowrl.data.conversations import messages_of, options_of, tools_of, with_system
from flowrl.data.formats import NormalRow
from flowrl.data.rendering import Renderer
from flowrl.data.sources import RawRow, read_rows
from flowrl.data.tasks import Task, make_rows
from flowrl.ending import DATE
from flowrl.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from flowrl.data.sources import Bad

REASONING_GYM = "reasoning-gym"
# Training prompts made when num_train is 0: with 64 held out they use up what the default tasks have at these weights.
GENERATED = 192

# Tasks that SmolLM2-135M-Instruct answers right 12 to 14 % of the time at temperature 1: between never and always,
# so that the samples of a group differ and there is something to learn within a few dozen steps.
DEFAULT_TASKS = (
    Task(name="chain_sum", weight=5, config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    Task(name="products", weight=3, config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
)


class PromptData(Config):
    """Where prompts come from and how they are rendered."""

    source: str = REASONING_GYM  # or a file or directory (.jsonl, .json, .csv, .parquet, ...), a Hugging Face id
    num_train: Annotated[int, Meta(ge=0)] = 0  # training prompts; 0: all there are (reasoning-gym makes 192)
    num_heldout: Annotated[int, Meta(ge=0)] = 64  # prompts kept for evaluation
    seed: int = 0  # of the tasks, the split and the order
    max_prompt_tokens: Annotated[int, Meta(ge=1)] = 256  # a longer rendered prompt is a bad row
    system_prompt: str | None = None  # for prompts without a system message; None: what the chat template puts there
    date: datetime.date = (
        DATE  # that a chat template which writes today's date is told: a prompt is the same on every day
    )
    chat_template: bool = True  # false: strings go to the model as they are
    prompt_column: str = "prompt"  # holds a string, or a list of messages
    split: str = "train"  # of a hub data set; of a directory, the files whose names begin so
    subset: str = ""  # of a hub data set, where it has several
    tasks: list[Task] = msgspec.field(default_factory=lambda: list(DEFAULT_TASKS))  # reasoning-gym only
    on_bad: Literal["stop", "skip"] = "stop"  # a row that cannot be used

    def __post_init__(self) -> None:
        if self.system_prompt is not None and not self.chat_template:
            raise ConfigError("data.system_prompt", "is set but chat_template is false", "unset one of the two")


class PromptRow(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, ready to be sampled."""

    index: int  # its place among the source's rows
    token_ids: list[int]
    text: str  # as rendered
    columns: dict[str, Any]  # for reward functions; "prompt" is the prompt as it stood in the data


class PromptSet:
    """The training and held-out prompts of one source."""

    def __init__(
        self, *, train: list[PromptRow], heldout: list[PromptRow], seed: int, num_duplicates: int, skipped: list[str]
    ) -> None:
        self.train = train
        self.heldout = heldout
        self.num_duplicates = num_duplicates  # rows whose rendered text was there already
        self.skipped = skipped  # why, one line for each bad row
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)  # a run only ever touches two epochs at a time

    def row_at(self, position: int) -> PromptRow:
        """Return the training prompt at `position` of the endless order: every epoch is shuffled anew."""
        epoch, place = divmod(position, len(self.train))
        return self.train[self._order(epoch)[place]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.train)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


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

    The split goes by a keyed digest of the rendered text: it does not depend on the order of the source, and rows
    appended later leave most of it as it was.

    Raises:
        DataError: the source or a row cannot be used, or too few prompts remain.
        ModelError: a chat template is wanted and the tokenizer has none.
    """
    if data.chat_template and not tokenizer.chat_template:
        remedy = "take an instruction-tuned model, or set data.chat_template=false to use prompts as they are"
        raise ModelError(f"tokenizer {tokenizer.name_or_path}", "has no chat template", remedy)
    renderer = Renderer(tokenizer, day=data.date)
    skipped: list[str] = []

    def bad(error: DataError) -> None:
        if data.on_bad == "stop":
            raise error
        skipped.append(str(error))

    texts, num_duplicates = _distinct_texts(data, renderer, bad)
    key = str(data.seed).encode()
    shuffled = sorted(texts, key=lambda text: blake2b(text.encode(), key=key, digest_size=8).digest())
    usable = _tokenized(((text, *texts[text]) for text in shuffled), data, tokenizer, renderer, bad)
    heldout = list(islice(usable, data.num_heldout))
    train = list(islice(usable, data.num_train or None))
    _check_enough(data, len(heldout), len(train), skipped)
    return PromptSet(train=train, heldout=heldout, seed=data.seed, num_duplicates=num_duplicates, skipped=skipped)


def first_columns(data: PromptData) -> dict[str, Any]:
    """Return the columns of the first row with a prompt, as reward functions are given them; reads no further.

    Raises:
        DataError: the source cannot be read, or no row has a prompt.
    """
    for row in _raw_rows(data, lambda error: None):
        with contextlib.suppress(DataError):
            prompt_of(data, row)
            return {**row.columns, "prompt": row.columns[data.prompt_column]}
    raise DataError(f"data {data.source}", "no row has a prompt", "check data.source and data.prompt_column")


def _distinct_texts(data: PromptData, renderer: Renderer, bad: Bad) -> tuple[dict[str, tuple[int, RawRow]], int]:
    """Return the rows by rendered text, the first of equal ones, and how many others there were."""
    texts: dict[str, tuple[int, RawRow]] = {}
    num_duplicates = 0
    for index, row in enumerate(_raw_rows(data, bad)):
        try:
            text = _render(data, renderer, row)
        except DataError as error:
            bad(error)
            continue
        num_duplicates += text in texts
        texts.setdefault(text, (index, row))
    return texts, num_duplicates


def _raw_rows(data: PromptData, bad: Bad) -> Iterable[RawRow]:
    if data.source == REASONING_GYM:
        return make_rows(data.tasks, num_rows=(data.num_train or GENERATED) + data.num_heldout, seed=data.seed)
    return read_rows(data.source, split=data.split, subset=data.subset, bad=bad)


def _render(data: PromptData, renderer: Renderer, row: RawRow) -> str:
    """Return a row's prompt as the model reads it.

    A column `answer_prefix` begins the policy's turn; what is sampled continues it.
    """
    normal = prompt_of(data, row)
    prefix = row.columns.get("answer_prefix") or ""
    if not isinstance(normal.prompt, str):
        return renderer.prompt_text(normal, prefix=prefix)
    return f"{normal.prompt}\n{prefix}" if prefix else normal.prompt


def prompt_of(data: PromptData, row: RawRow) -> NormalRow:
    """Return a row's prompt: messages under a chat template, a string without one.

    Raises:
        DataError: there is none, or it is malformed.
    """
    column = data.prompt_column
    if column not in row.columns:
        close = difflib.get_close_matches(column, row.columns, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "set data.prompt_column"
        raise DataError(row.place, f"no column {column!r} (columns: {', '.join(row.columns) or 'none'})", hint)
    prompt = row.columns[column]
    if not isinstance(prompt, str | list):
        found = f"column {column!r} holds a {type(prompt).__name__}"
        raise DataError(row.place, found, "a prompt is a string or a list of messages")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise DataError(row.place, f"column {column!r} is empty", "drop the row, or set data.on_bad=skip")
    if not data.chat_template:
        if isinstance(prompt, str):
            return NormalRow(place=row.place, prompt=prompt)
        remedy = "set data.chat_template=true, or write the prompt as one string"
        raise DataError(row.place, "is a conversation but data.chat_template is false", remedy)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_of(row, column)
    messages = with_system(messages, data.system_prompt)
    return NormalRow(place=row.place, prompt=messages, tools=tools_of(row), template_options=options_of(row))


def _tokenized(
    rows: Iterable[tuple[str, int, RawRow]],
    data: PromptData,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    bad: Bad,
) -> Iterator[PromptRow]:
    context = tokenizer.model_max_length  # about 1e30 where the tokenizer states none
    limit, name = min((data.max_prompt_tokens, "data.max_prompt_tokens"), (context, "the model's context"))
    for text, index, row in rows:
        token_ids = renderer.prompt_ids(text, is_rendered=data.chat_template)
        if len(token_ids) > limit:
            found = f"the prompt has {len(token_ids)} tokens, {name} is {limit}"
            bad(DataError(row.place, found, "raise it, shorten the row, or set data.on_bad=skip"))
            continue
        columns = {**row.columns, "prompt": row.columns[data.prompt_column]}
        yield PromptRow(index=index, token_ids=token_ids, text=text, columns=columns)


def _check_enough(data: PromptData, num_heldout: int, num_train: int, skipped: list[str]) -> None:
    where = f"data {data.source}"
    there = f"{num_heldout + num_train} different usable prompts"
    if skipped and not num_heldout + num_train:
        raise DataError(where, f"all {len(skipped)} rows are bad; the first: {skipped[0]}")
    if not num_heldout + num_train:
        raise DataError(where, "holds no rows", "check data.source and data.split")
    if num_heldout < data.num_heldout or not num_train:
        what = f"{there}, of which num_heldout={data.num_heldout} leaves none to train on"
        raise DataError(where, what, f"lower data.num_heldout below {num_heldout + num_train}")
    if num_train < data.num_train:
        remedy = f"lower num_train to {num_train}, or set 0 to take all"
        raise DataError(
            where, f"{there} are {num_heldout} held out and {num_train} to train on, not {data.num_train}", remedy
        )
