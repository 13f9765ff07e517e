"""What a data set holds and what a run would make of it: the body of `flowrl data check`.

Invariants:
- what is reported is what `load_examples` (for prompts, `load_prompts`) does with the same settings;
- every row is looked at, also where a run would stop at the first bad one, and the check then ends with that error.

Called by the CLI.

Tests: tests/unit/data/test_inspection.py
"""

from __future__ import annotations

import contextlib
import math
import shlex
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import Config, resolve
from flowrl.data.examples import BARE, ExampleData, ExampleRow, ExampleSet, load_examples, read_source, read_template
from flowrl.data.formats import detect
from flowrl.data.naming import ends_answered, prompt_column
from flowrl.data.prompts import PromptData, PromptRow, PromptSource, load_prompts
from flowrl.ending import ending_of
from flowrl.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    Say = Callable[[str], None]

NUM_BINS = 8  # widths of the histogram's bins that cover all lengths, at most
BAR = 40  # characters of its longest bar
NUM_REASONS = 3  # rows shown of those that are left out
LEVELS = ("difficulty", "level", "data_source", "source", "task", "subject")  # columns of which the values are counted
NUM_LEVELS = 12  # different values of one, at most
ANSWERS = (  # columns that hold what a prompt's answer is held against
    "answer", "solution", "ground_truth", "final_answer", "reference_answer", "expected_answer", "target", "label",
    "reward_model", "golden_answers", "answers",
)  # fmt: skip
ROOM = 256  # tokens of a prompt that the generators' default max_model_len has room for beside a response
LEARNED, PLAIN = "\x1b[32m", "\x1b[0m"  # green


class CheckSettings(Config):
    """The settings of a check: those of a graph's `data`, with nothing held out."""

    data: ExampleData = ExampleData(num_heldout=0)


class PromptSettings(Config):
    """The same for prompts, with nothing held out; all lengths are shown."""

    data: PromptData = PromptData(num_heldout=0, max_prompt_tokens=1 << 20)


def check_settings(path: str, *, format: str | None, overrides: Sequence[str]) -> ExampleData | PromptData:
    """Return the settings of a check; names are those of a graph (`data.max_tokens=512`).

    Those of prompts are taken where an override is one of theirs alone.

    Raises:
        ConfigError: an override is unknown or out of range.
    """
    source = [] if any(each.startswith("data.mix=") for each in overrides) else [f"data.source={path}"]
    given = [*source, *([f"data.format={format}"] if format else [])]
    try:
        return resolve(CheckSettings, overrides=[*given, *overrides]).data
    except ConfigError as error:
        if format:
            raise
        try:
            return resolve(PromptSettings, overrides=[*source, *overrides]).data
        except ConfigError as other:  # the one that knows a name like it
            raise max(error, other, key=lambda each: "did you mean" in str(each)) from None


def check_data(data: ExampleData | PromptData, tokenizer: PreTrainedTokenizerBase, say: Say, *, colour: bool) -> None:
    """Say what the data hold, a line at a time.

    Args:
        colour: mark what is learned by colour, not by brackets.

    Raises:
        DataError: nothing can be used, or a row would stop a run.
    """
    if isinstance(data, PromptData):
        _check_prompts(data, tokenizer, say)
        return
    if _are_prompts(data):
        word = data.chat_template.casefold()
        if word not in ("", "true", "false"):  # of a run on prompts it says whether there is one
            tokenizer.chat_template = read_template(data.chat_template)
        asked = {name: theirs for name, theirs in data.columns.items() if name != "prompt"}
        prompts = PromptData(
            source=data.source, split=data.split, subset=data.subset, seed=data.seed, on_bad=data.on_bad, columns=asked,
            num_heldout=data.num_heldout, max_prompt_tokens=1 << 20, prompt_column=data.columns.get("prompt", ""),
            chat_template=word != "false",
            mix=[PromptSource(source=each.source, weight=each.weight, split=each.split, subset=each.subset,
                              columns=each.columns) for each in data.mix],
        )  # fmt: skip
        _check_prompts(prompts, tokenizer, say)
        return
    on_long = "skip" if data.on_long == "stop" else data.on_long
    examples = load_examples(msgspec.structs.replace(data, on_bad="skip", on_long=on_long), tokenizer)
    for line in describe(examples, data):
        say(line)
    template = read_template(data.chat_template) if data.chat_template else None
    ending = ending_of(tokenizer, template=template)
    say(f"ends       {ending}")
    lasts = [each[-1] for row in (*examples.train, *examples.heldout) for each in row.responses if not row.step_labels]
    if num_cut := sum(last not in ending.stops for last in lasts):
        say(f"           {num_cut} of {len(lasts)} responses were cut, and are learned without an end")
    if examples.is_bare:
        say(BARE)
    if examples.train:
        row = min(examples.train, key=lambda row: row.index)
        how = "in green" if colour else "between ⟦ and ⟧"
        say(f"example    {row.place}, with what is learned {how}")
        say(shown(row, tokenizer, colour=colour))
    _stop_as_a_run_would(examples, data)


def describe(examples: ExampleSet, data: ExampleData) -> Iterator[str]:
    """Yield the report's lines, the example apart."""
    for source, format in zip(data.sources, examples.formats, strict=False):
        yield f"format     {format} ({'as set' if source.format else 'detected'}): {source.source}"
    yield f"rows       {len(examples)} to train on, {len(examples.heldout)} held out"
    counts = examples.counts
    left_out = {
        "bad": counts["bad"],
        f"longer than max_tokens={data.max_tokens}": counts["too long"],
        "labelled false": counts["labelled false"],
        "with the prompt of a held-out one": counts["prompt held out"],
    }
    yield f"left out   {', '.join(f'{count} {why}' for why, count in left_out.items() if count) or 'none'}"
    if counts["repeated"]:
        yield f"repeated   {counts['repeated']} rows are others once more, and are learned once more"
    if counts["truncated"]:
        yield f"cut        {counts['truncated']} to max_tokens={data.max_tokens}"
    if counts["token at a boundary"]:
        what = "with prompt and turns tokenized one by one: a token would span the end of one"
        yield f"boundaries {counts['token at a boundary']} {what}"
    for reason in examples.skipped[:NUM_REASONS]:
        yield f"           {reason}"
    if len(examples.skipped) > NUM_REASONS:
        yield f"           and {len(examples.skipped) - NUM_REASONS} more"
    for name, (low, high) in examples.ranges.items():
        yield f"condition  {name} from {low:g} to {high:g} as 0 to {data.condition_levels - 1}"
    rows = [*examples.train, *examples.heldout]
    learned = sum(sum(map(sum, row.masks)) if row.masks else sum(map(len, row.responses)) for row in rows)
    total = sum(len(row.prompt_ids) * len(row.responses) + sum(map(len, row.responses)) for row in rows)
    yield f"learned    {learned} of {total} tokens ({learned / max(total, 1):.0%})"
    yield from _lengths([row.num_tokens for row in rows], "prompt and the longest response")


def shown(row: ExampleRow, tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> str:
    """Return a row as text with its learned tokens marked; a step's label follows it as <1>."""
    text = printable(_text(tokenizer, row.prompt_ids))
    names = ["\nchosen: ", "\nrejected: "] if len(row.responses) == 2 else [""]
    for number, (name, response) in enumerate(zip(names, row.responses, strict=True)):
        mask = row.masks[number] if row.masks else [1] * len(response)
        labels = row.step_labels[number] if row.step_labels else [math.nan] * len(response)
        text += name
        for part in _parts(mask, labels):
            piece = printable(_text(tokenizer, [response[place] for place in part]))
            before, behind = (LEARNED, PLAIN) if colour else ("⟦", "⟧")
            text += f"{before}{piece}{behind}" if mask[part[0]] else piece
            label = labels[part[-1]]
            text += "" if math.isnan(label) else f"<{label:g}>"
    if row.labels and len(row.responses) == 1:
        return f"{text}\nlabel: {row.labels[0]:g}"
    return f"{text}\nmargin: {row.labels[0]:g}" if any(row.labels) else text


def _parts(mask: Sequence[int], labels: Sequence[float]) -> Iterator[list[int]]:
    """Yield the places of tokens that are shown as one: a part ends where the mask changes and behind a label."""
    part: list[int] = []
    for place, is_learned in enumerate(mask):
        if part and (mask[part[0]] != is_learned or not math.isnan(labels[part[-1]])):
            yield part
            part = []
        part.append(place)
    yield part


def histogram(lengths: Sequence[int]) -> Iterator[str]:
    """Yield a line for each bin; a bin's width is a power of two, and there are at most nine.

    >>> list(histogram([5, 6, 6]))
    ['      5 to 5            1  ####################', '      6 to 6            2  ########################################']
    """  # noqa: E501  # lines as they are printed
    width = 1
    while (max(lengths) - min(lengths)) // width >= NUM_BINS:
        width *= 2
    counts = Counter(length // width for length in lengths)
    for place in range(min(counts), max(counts) + 1):
        bar = "#" * math.ceil(BAR * counts[place] / max(counts.values()))
        yield f"{place * width:>7} to {(place + 1) * width - 1:<6} {counts[place]:>7}  {bar}".rstrip()


def _lengths(lengths: Sequence[int], what: str) -> Iterator[str]:
    if not lengths:
        return
    spread = f"least {min(lengths)}, median {statistics.median(lengths):g}, greatest {max(lengths)}"
    yield f"tokens     {spread} ({what})"
    yield from histogram(lengths)


def _are_prompts(data: ExampleData) -> bool:
    """Say whether there is something to ask in the rows that can be read, and nothing to learn.

    The first row decides; one with a prompt alone has lost what is learned if others have it.
    """
    source = data.sources[0]
    if source.format is not None:
        return source.format == "prompt-only"
    are_prompts = False
    for raw in read_source(data, source, lambda _: None):
        try:
            format = detect(raw)
        except DataError:
            with contextlib.suppress(DataError):
                return are_prompts or bool(prompt_column(raw))
            continue
        messages = raw.columns.get("messages") if format.kind == "language-modeling" else None
        if format.kind != "prompt-only":
            return _is_open(messages)
        are_prompts = True
    return are_prompts


def _is_open(messages: Any) -> bool:
    """Say whether these are messages of which the last is to be answered."""
    return isinstance(messages, list) and bool(messages) and not ends_answered(messages)


def _check_prompts(data: PromptData, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
    has_template = bool(tokenizer.chat_template) and data.chat_template
    prompts = load_prompts(msgspec.structs.replace(data, on_bad="skip", chat_template=has_template), tokenizer)
    rows = [*prompts.train, *prompts.heldout]
    for source, column in zip(data.sources, prompts.found_in, strict=True):
        how = "as set" if source.prompt_column else "detected"
        share = f", weight {source.weight:g}" if data.mix else ""
        say(f"format     prompts in the column {column!r} ({how}): {source.source}{share}")
    say(f"rows       {len(prompts.train)} prompts for online training, {len(prompts.heldout)} held out")
    if prompts.num_repeated:
        say(f"repeated   {prompts.num_repeated} rows are others once more, and are sampled once more")
    say(f"left out   {len(prompts.skipped)} bad, {prompts.num_left_out} that ask what a held-out one asks")
    for reason in prompts.skipped[:NUM_REASONS]:
        say(f"           {reason}")
    for name, counts in _levels(rows):
        say(f"{name:<10} {', '.join(f'{value} {count}' for value, count in sorted(counts.items()))}")
    for line in _lengths([len(row.token_ids) for row in rows], "prompt"):
        say(line)
    say(f"ends       {ending_of(tokenizer)}")
    if prompts.unopened:
        say(f"unopened   the chat template opens no turn, so the policy writes {prompts.unopened!r} before each answer")
    row = min(rows, key=lambda row: row.index)
    say(f"example    {row.place}, with nothing to learn in it\n{printable(row.text)}")
    say(f"run        flowrl run graphs/group_async.py {' '.join(_wanted(data, rows, has_template=has_template))}")
    if prompts.skipped and data.on_bad == "stop":
        raise _stopping(data, prompts.skipped)


def _levels(rows: Sequence[PromptRow]) -> Iterator[tuple[str, Counter[str]]]:
    """Yield each column that says how hard a prompt is, or where it is from, with how many rows are of which."""
    for name in LEVELS:
        values = [row.columns[name] for row in rows if isinstance(row.columns.get(name), str | int | float)]
        counts = Counter(printable(str(value)) for value in values)
        if 0 < len(counts) <= NUM_LEVELS:
            yield name, counts


def _wanted(data: PromptData, rows: Sequence[PromptRow], *, has_template: bool) -> Iterator[str]:
    """Yield the settings that a run on these prompts needs."""
    default = PromptData()
    longest = max(len(row.token_ids) for row in rows)
    changed: dict[str, Any] = {"source": data.source} if not data.mix else {"mix": msgspec.to_builtins(data.mix)}
    changed |= {
        name: getattr(data, name)
        for name in ("split", "subset", "prompt_column", "seed", "system_prompt")
        if getattr(data, name) != getattr(default, name)
    }
    if not has_template:
        changed["chat_template"] = False
    if longest > default.max_prompt_tokens:
        changed["max_prompt_tokens"] = longest
    if len(rows) <= default.num_heldout:
        changed["num_heldout"] = max(len(rows) // 8, min(1, len(rows) - 1))
    columns = dict(data.columns)
    answer = "answer" if "answer" in columns else next((name for name in ANSWERS if name in rows[0].columns), "")
    if answer and answer != "answer":
        columns["answer"] = answer
    settings = {f"data.{name}": value for name, value in changed.items()}
    settings |= {f"data.columns.{ours}": theirs for ours, theirs in columns.items()}
    if longest > ROOM:
        settings["generator.max_model_len"] = longest + 256
    settings["reward.function"] = "flowrl.rewards.verify:exact_answer" if answer else "my_rewards.py:score"
    for name, value in settings.items():
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        yield f"--set {shlex.quote(f'{name}={text}')}"


def _stop_as_a_run_would(examples: ExampleSet, data: ExampleData) -> None:
    stops_at_bad = data.on_bad == "stop" and examples.counts["bad"]
    if stops_at_bad or (data.on_long == "stop" and examples.counts["too long"]):
        raise _stopping(data, examples.skipped)


def _stopping(data: ExampleData | PromptData, skipped: Sequence[str]) -> DataError:
    where = "data.mix" if data.mix else f"data {data.source}"
    return DataError(where, f"{len(skipped)} of its rows would stop a run; the first: {skipped[0]}")


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast("str", tokenizer.decode(ids))
