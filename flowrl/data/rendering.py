"""Examples as tokens: what the model reads, what it is to write, and which tokens of that are its own.

Invariants: prompt and response joined are the tokens of the whole rendering, with the prompt's a true prefix. Where a
token would span the end of the prompt or of a turn, the parts are tokenized separately, as in generation, and the
encoding says so; either way the prompt's tokens depend on the prompt alone, so that a pair shares them. A mask is 1 on
exactly the tokens that the assistant writes, its end-of-turn token included; a response ends with the last of them.

Which characters are the assistant's is what the chat template marks with {% generation %}, and without such marks what
each of its messages adds to the conversation before it; a template that renders a message otherwise once others follow
is refused. Strings are taken as they are, with the tokenizer's own first token before and EOS behind. Called by
`load_examples`.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.data.formats import num_shared
from flowrl.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from flowrl.data.formats import Conversation, NormalRow

NAN = float("nan")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PREFIX_REMEDY = "give data.chat_template a template with {% generation %} marks"


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """A row as tokens."""

    prompt_ids: list[int]
    responses: list[list[int]]
    masks: list[list[int]] | None = None  # None: every response token is learned
    step_labels: list[list[float]] | None = None  # nan but on the last token of each labelled step
    is_separate: bool = False  # a token would have spanned the end of the prompt or of a turn


class Written(msgspec.Struct, frozen=True):
    """A rendered text and where in it the assistant writes."""

    text: str
    start: int  # character with which the response begins
    spans: list[tuple[int, int]]  # characters, in order


class Renderer:
    """A tokenizer with the template and the rules by which rows become tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, template: str | None, learns_all: bool, separator: str
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template  # None: the tokenizer's own
        self._learns_all = learns_all  # false: of several turns only the last
        self._separator = separator  # put after each step
        self._first_ids: list[int] | None = None

    def encode(self, row: NormalRow) -> Encoded:
        """Return a row's tokens.

        Raises:
            DataError: the template cannot render the row, or there is nothing for the assistant to write.
            ModelError: the tokenizer lacks a chat template or an EOS token that the row needs.
        """
        if row.steps:
            return self._stepwise(row)
        if all(isinstance(each, str) for each in row.responses):
            responses = cast("list[str]", row.responses)
            return self._implicit(responses) if len(responses) == 2 and not row.prompt else self._plain(row)
        writings = [self._write(row, cast("Conversation", each)) for each in row.responses]
        encodings = [self._encode_written(each) for each in writings]
        if any(each.is_separate for each in encodings):  # what is compared is tokenized alike
            encodings = [self._encode_written(each, separately=True) for each in writings]
        return _joined(encodings)

    # Strings

    def _plain(self, row: NormalRow) -> Encoded:
        texts = [(cast("str", row.prompt) + cast("str", each), [len(row.prompt)]) for each in row.responses]
        split = [self._pieces(*each) for each in texts]
        is_separate = any(separate for _, separate in split)
        if is_separate:
            split = [(self._alone(*each), True) for each in texts]
        prompt_ids = [*self._first(), *split[0][0][0]]
        responses = [self._ended(pieces[1]) for pieces, _ in split]
        if not prompt_ids:  # nothing stands before the first token to predict it from
            prompt_ids, responses = responses[0][:1], [responses[0][1:]]
        return Encoded(prompt_ids=prompt_ids, responses=responses, is_separate=is_separate)

    def _implicit(self, texts: list[str]) -> Encoded:
        """Split off the tokens that both texts begin with."""
        chosen, rejected = (self._ended(self._ids(text)) for text in texts)
        shortest = min(len(chosen), len(rejected)) - 1  # a response has at least one token
        end = min(num_shared(chosen, rejected), shortest)
        return Encoded(prompt_ids=[*self._first(), *chosen[:end]], responses=[chosen[end:], rejected[end:]])

    def _stepwise(self, row: NormalRow) -> Encoded:
        text, first = row.prompt, self._first
        if not isinstance(text, str):
            self._check_tools(row, text)
            text, first = self._render(row, text, is_open=True), list[int]
        ends = [len(text)]
        for step in row.steps:
            text += step + self._separator
            ends.append(len(text))
        pieces, is_separate = self._pieces(text, ends[:-1])
        if not all(pieces[1:]):
            raise DataError(row.place, "a step has no token of its own", "join it to its neighbour")
        labels = [[*[NAN] * (len(each) - 1), label] for each, label in zip(pieces[1:], row.labels, strict=True)]
        return Encoded(
            prompt_ids=[*first(), *pieces[0]],
            responses=[list(chain(*pieces[1:]))],
            step_labels=[list(chain(*labels))],
            is_separate=is_separate,
        )

    def _first(self) -> list[int]:
        """Return the special tokens that the tokenizer puts before a text."""
        if self._first_ids is None:
            with_specials = cast("list[int]", self._tokenizer.encode("a"))
            self._first_ids = with_specials[: with_specials.index(self._ids("a")[0])]
        return self._first_ids

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            where = f"tokenizer {self._tokenizer.name_or_path}"
            raise ModelError(where, "has no EOS token to end a response with", "set eos_token in its configuration")
        return ids if ids and ids[-1] == eos else [*ids, cast("int", eos)]

    # Conversations

    def _write(self, row: NormalRow, response: Conversation) -> Written:
        """Return a conversation's text with what the assistant writes in it, after the prompt if there is one."""
        prompt = cast("Conversation", row.prompt)
        messages = [*prompt, *response]
        self._check_tools(row, messages)
        roles = [message["role"] for message in messages]
        if "assistant" not in roles[len(prompt) :]:
            raise DataError(row.place, f"has no assistant's message to learn (roles: {', '.join(roles)})", "drop it")
        if GENERATION.search(self._template_of(row)):
            written = self._marked(row, messages, len(prompt))
        else:
            written = self._grown(row, messages, len(prompt))
        if not written.spans:
            raise DataError(row.place, "the chat template writes nothing for the assistant", PREFIX_REMEDY)
        return written

    def _check_tools(self, row: NormalRow, messages: Conversation) -> None:
        """Refuse what a template would leave out without a word."""
        template = self._template_of(row)
        has_calls = any("tool_calls" in message for message in messages)
        for name, is_there in (("tools", row.tools), ("tool_calls", has_calls)):
            if is_there and name not in template:
                remedy = "take a model that knows tools, or give data.chat_template=FILE"
                raise DataError(row.place, f"has {name}, which the chat template does not write", remedy)

    def _marked(self, row: NormalRow, messages: Conversation, num_before: int) -> Written:
        """Find the assistant's parts by the template's {% generation %} marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self._tokenizer.special_tokens_map, **row.template_options}
        with _refusals(row.place, messages):
            texts, marks = render_jinja_template(
                [messages],
                tools=cast("Any", row.tools),
                chat_template=self._template_of(row),
                return_assistant_tokens_mask=True,
                **options,
            )
        text, spans = texts[0], [(begin, end) for begin, end in cast("list[tuple[int, int]]", marks[0]) if begin < end]
        if not self._learns_all:
            num_turns = sum(message["role"] == "assistant" for message in messages)
            if len(spans) != num_turns:
                what = f"the chat template marks {len(spans)} parts for {num_turns} turns, so the last is not known"
                raise DataError(row.place, what, "set data.learn=all")
            spans = spans[-1:]
        if not num_before:
            return Written(text, spans[0][0] if spans else 0, spans)
        start = self._start(row, text, messages[:num_before], num_before)
        return Written(text, start, [(max(start, begin), end) for begin, end in spans if end > start])

    def _grown(self, row: NormalRow, messages: Conversation, num_before: int) -> Written:
        """Find the assistant's parts as what each of its messages adds to the conversation before it."""
        text = self._render(row, messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= num_before]
        spans: list[tuple[int, int]] = []
        for turn in turns if self._learns_all else turns[-1:]:
            if not turn:
                what = "message 0 is the assistant's, with nothing before it to answer"
                raise DataError(row.place, what, f"begin with the user's, or {PREFIX_REMEDY}")
            start = self._start(row, text, messages[:turn], turn)
            end = len(text)
            if turn + 1 < len(messages):
                before = self._render(row, messages[: turn + 1])
                _check_prefix(row, text, before, turn + 1)
                end = len(before)
            spans.append((start, start + len(self._turn_of(text[start:end]))))
        return Written(text, spans[0][0], spans)

    def _start(self, row: NormalRow, text: str, messages: Conversation, turn: int) -> int:
        """Return the character at which the assistant begins to write message `turn`."""
        before = self._render(row, messages, is_open=True)
        _check_prefix(row, text, before, turn)
        return len(before)

    def _turn_of(self, text: str) -> str:
        """Cut off the white space behind an end-of-turn token: the template's, the policy stops before it."""
        stripped = text.rstrip()
        return stripped if any(stripped.endswith(token) for token in self._tokenizer.all_special_tokens) else text

    def _render(self, row: NormalRow, messages: Conversation, *, is_open: bool = False) -> str:
        with _refusals(row.place, messages):
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=cast("Any", row.tools),
                chat_template=self._template_of(row),
                add_generation_prompt=is_open,
                tokenize=False,
                **row.template_options,
            )
        return cast("str", rendered)

    def _template_of(self, row: NormalRow) -> str:
        if self._template is None and not self._tokenizer.chat_template:
            remedy = "take an instruction-tuned model, or give data.chat_template=FILE"
            raise ModelError(f"tokenizer {self._tokenizer.name_or_path}", "has no chat template", remedy)
        return self._template or cast("str", self._tokenizer.get_chat_template(tools=cast("Any", row.tools)))

    def _encode_written(self, written: Written, *, separately: bool = False) -> Encoded:
        ends = [written.start, *(place for span in written.spans for place in span)]
        text, ends = written.text[: ends[-1]], ends[:-1]
        pieces, is_separate = (self._alone(text, ends), True) if separately else self._pieces(text, ends)
        mask = [number % 2 for number, piece in enumerate(pieces[1:]) for _ in piece]
        prompt_ids, response = pieces[0], list(chain(*pieces[1:]))
        if not prompt_ids:  # nothing stands before the first token to predict it from
            prompt_ids, response, mask = response[:1], response[1:], mask[1:]
        return Encoded(prompt_ids=prompt_ids, responses=[response], masks=[mask], is_separate=is_separate)

    # Tokens

    def _pieces(self, text: str, ends: Sequence[int]) -> tuple[list[list[int]], bool]:
        """Tokenize a text and cut its tokens after the given characters.

        Returns also whether a token spans one of them: the parts are then tokenized separately.
        """
        pieces, whole = self._alone(text, ends), self._ids(text)
        if list(chain(*pieces)) == whole:
            return pieces, False
        # Some tokenizers write a text's first word otherwise than the same word later on: compare beginnings.
        heads = [self._ids(text[:end]) for end in ends]
        if any(whole[: len(head)] != head for head in heads):
            return pieces, True
        cuts = [0, *(len(head) for head in heads), len(whole)]
        return [whole[start:end] for start, end in pairwise(cuts)], False

    def _alone(self, text: str, ends: Sequence[int]) -> list[list[int]]:
        return [self._ids(text[start:end]) for start, end in pairwise([0, *ends, len(text)])]

    def _ids(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False)) if text else []


def _joined(encodings: list[Encoded]) -> Encoded:
    """Return encodings of one prompt as one, without masks where all is learned."""
    masks = [mask for each in encodings for mask in each.masks or []]
    return Encoded(
        prompt_ids=encodings[0].prompt_ids,
        responses=[response for each in encodings for response in each.responses],
        masks=None if all(all(mask) for mask in masks) else masks,
        is_separate=any(each.is_separate for each in encodings),
    )


def _check_prefix(row: NormalRow, text: str, before: str, turn: int) -> None:
    if not text.startswith(before):
        what = f"the chat template renders what stands before message {turn} otherwise once that message follows"
        raise DataError(row.place, f"{what}, so which tokens are the assistant's cannot be told", PREFIX_REMEDY)


@contextmanager
def _refusals(place: str, messages: Conversation) -> Iterator[None]:
    """Turn what a template raises into a `DataError`."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError) as error:  # TypeError: it adds a string and another thing
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(place, f"the chat template refuses the roles {roles} ({error})", "mend the row") from error
