"""Conversations and texts as tokens: the one renderer of prompts to sample from and of examples to learn.

Invariants:
- a prompt has the same tokens wherever it stands;
- they depend on it, the settings and the template alone, not on the day nor on what follows.

Prompt and response joined are the tokens of the whole text, with the prompt's a true prefix. Where a token would span
the end of the prompt or of a turn, the parts are tokenized one by one, each as it stands behind the last. The encoding
says so. A mask is 1 on exactly the tokens that the assistant writes, up to and with the one that ends its turn
(flowrl/ending.py); a response ends with the last of them.

Which characters are the assistant's is what the chat template marks with {% generation %}, and without such marks what
each of its messages adds to the conversation before it; a template that renders a message otherwise once others follow
is refused. Where the template cannot give back what was said (it drops the thinking, or has begun it for the policy)
the last answer is its own words behind the prompt; so is every sampled one (a row with `finish`); one that was cut is
given no end. Strings are taken as they are, with the tokenizer's own first token before, unless they begin with it, and
EOS behind. Called by `load_prompts`, `load_examples` and the turn format.

Tests: tests/unit/data/test_rendering.py
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager, suppress
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.data.conversations import ROLES, THOUGHTS
from flowrl.data.formats import NormalRow, num_shared
from flowrl.ending import (
    ASKED,
    CALL_STYLES,
    CALLED,
    CLOSERS,
    DATE,
    HEARD,
    SAID,
    THINKS,
    AnswerEnd,
    ending_of,
    render_options,
    template_errors,
    tool_call,
)
from flowrl.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import date

    from transformers import PreTrainedTokenizerBase

    from flowrl.data.conversations import Conversation

NAN = float("nan")
PLAIN = {"role", "content", "weight"}  # what a message has that says its content and nothing besides
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PREFIX_REMEDY = "set data.learn=last, or give data.chat_template a template with {% generation %} marks"
LAST_REMEDY = "set data.learn=last, or give data.chat_template one that writes it"
# Prompts are asked with the model's own template alone.
BESIDE = "chat_template.jinja (for examples also with data.chat_template=FILE)"
OTHER_TEMPLATE = f"take a model that knows it, or give it another {BESIDE}"
OPENER = re.compile(rf"(?:{THINKS})\s*\Z")  # how a template begins to think for the policy
BLANK = rf"(?:{THINKS})\s*(?:{CLOSERS.pattern})\s*"  # what it writes for one that is not to think
NO_THOUGHT, BLANK_FIRST = re.compile(rf"{BLANK}\Z"), re.compile(rf"\A{BLANK}")
FOREIGN = "Quoll"  # what nobody says, for trying out a template
WORD = re.compile(r"[^\W_]+")
ANCHORS = ("\n", "a", ".", "0")  # texts behind which another can be tokenized as it stands within a text


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
        self, tokenizer: PreTrainedTokenizerBase, *, template: str | None = None, learns_all: bool = True,
        separator: str = "\n", day: date = DATE,
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._template = template  # None: the tokenizer's own
        self._learns_all = learns_all  # false: of several turns only the last
        self._separator = separator  # put after each step
        self._clock = render_options(day)
        self._first_ids: list[int] | None = None
        self._marks_checked: set[str] = set()  # templates whose marks were tried
        self._call_style: tuple[bool, str | None] | None = None
        self.ending: AnswerEnd = ending_of(tokenizer, template=template)

    # Prompts

    def prompt_text(self, row: NormalRow, *, prefix: str = "") -> str:
        """Return what the policy is to continue: the conversation with its turn opened, which `prefix` begins.

        Raises:
            DataError: the conversation ends with the assistant, or the template cannot render it.
            ModelError: there is no template.
        """
        messages = self._said(row, cast("Conversation", row.prompt))
        if messages[-1]["role"] == "assistant":
            remedy = "end it with the user's message; what begins the policy's answer goes into a column answer_prefix"
            raise DataError(row.place, f"message {len(messages) - 1}, the last, is the assistant's", remedy)
        return self._render(row, messages, is_open=True) + prefix

    def unopened(self) -> str:
        """Return what the policy must write itself before each answer, where the template opens no turn for it."""
        asked = {"role": "user", "content": ASKED}
        row = NormalRow(place=f"tokenizer {self._tokenizer.name_or_path}", prompt=[asked])
        said = {"role": "assistant", "content": SAID}
        try:
            opened, bare, whole = (
                self._render(row, [asked], is_open=True),
                self._render(row, [asked]),
                self._render(row, [asked, said]),
            )
        except DataError:  # it takes no such conversation
            return ""
        before = whole[len(opened) :].partition(SAID)[0]
        return before if opened == bare and whole.startswith(opened) and before.strip() else ""

    def prompt_ids(self, text: str, *, is_rendered: bool) -> list[int]:
        """Return a prompt's tokens; a template writes its own special tokens, plain text gets those it begins with."""
        return self._ids(text) if is_rendered else self._begun(text)

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
            return self._implicit(row, responses) if len(responses) == 2 and not row.prompt else self._plain(row)
        writings = [self._write(row, cast("Conversation", each)) for each in row.responses]
        encodings = [self._encode_written(each) for each in writings]
        if any(each.is_separate for each in encodings):  # what is compared is tokenized alike
            encodings = [self._encode_written(each, separately=True) for each in writings]
        return _joined(encodings)

    # Strings

    def _plain(self, row: NormalRow) -> Encoded:
        prompt = cast("str", row.prompt)
        for each in row.responses if prompt else ():
            self._check_end(row, cast("str", each), "an answer")
        texts = [(prompt + self._ended(row, cast("str", each)), [len(prompt)]) for each in row.responses]
        split = [self._pieces(*each) for each in texts]
        is_separate = any(separate for _, separate in split)
        if is_separate:
            split = [(self._alone(*each), True) for each in texts]
        prompt_ids = self._begun(prompt, split[0][0][0])
        responses = [pieces[1] for pieces, _ in split]
        if not prompt:  # the text may begin with the first token itself
            prompt_ids, responses = self._begun("", []), [self._begun("", each) for each in responses]
            responses = [each[len(prompt_ids) :] for each in responses]
        if not prompt_ids:  # nothing stands before the first token to predict it from
            prompt_ids, responses = responses[0][:1], [responses[0][1:]]
        return Encoded(prompt_ids=prompt_ids, responses=responses, is_separate=is_separate)

    def _implicit(self, row: NormalRow, texts: list[str]) -> Encoded:
        """Split off the tokens that both texts begin with."""
        chosen, rejected = (self._begun(text) for text in [self._ended(row, text) for text in texts])
        shortest = min(len(chosen), len(rejected)) - 1  # a response has at least one token
        end = min(num_shared(chosen, rejected), shortest)
        return Encoded(prompt_ids=chosen[:end], responses=[chosen[end:], rejected[end:]])

    def _stepwise(self, row: NormalRow) -> Encoded:
        text, is_rendered = row.prompt, not isinstance(row.prompt, str)
        if not isinstance(text, str):
            text = self.prompt_text(row)
        ends = [len(text)]
        for step in row.steps:
            text += step + self._separator
            ends.append(len(text))
        pieces, is_separate = self._pieces(text, ends[:-1])
        if not all(pieces[1:]):
            raise DataError(row.place, "a step has no token of its own", "join it to its neighbour")
        labels = [[*[NAN] * (len(each) - 1), label] for each, label in zip(pieces[1:], row.labels, strict=True)]
        return Encoded(
            prompt_ids=pieces[0] if is_rendered else self._begun("", pieces[0]),
            responses=[list(chain(*pieces[1:]))],
            step_labels=[list(chain(*labels))],
            is_separate=is_separate,
        )

    def _begun(self, text: str, ids: list[int] | None = None) -> list[int]:
        """Return a text's tokens behind the special ones that the tokenizer puts before a text, once."""
        if self._first_ids is None:
            with_specials, alone = cast("list[int]", self._tokenizer.encode("a")), self._ids("a")
            places = range(len(with_specials) - len(alone) + 1)
            start = next((k for k in places if with_specials[k : k + len(alone)] == alone), 0)
            self._first_ids = with_specials[:start]
        ids = self._ids(text) if ids is None else ids
        first = self._first_ids
        return ids if first and ids[: len(first)] == first else [*first, *ids]

    def _check_end(self, row: NormalRow, text: str, words: str) -> None:
        """Refuse an answer, in `words`, that goes on behind what ends one: generation would never get there."""
        head = self.ending.cut(text)
        if head is not None and text[len(head) :].strip():
            what = f"{words} goes on behind {self._end_of(head)}, which ends an answer"
            raise DataError(row.place, what, "write what follows as messages of their own, or take it out")

    def _ended(self, row: NormalRow, text: str) -> str:
        """Return a text with what ends it, and nothing behind that; one that was cut stays as it is."""
        ended = self._up_to_end(text)
        if row.finish == "length" or self._is_ended(ended):
            return ended
        eos = cast("str | None", self._tokenizer.eos_token)
        if eos is None:
            where = f"tokenizer {self._tokenizer.name_or_path}"
            raise ModelError(where, "has no EOS token to end a response with", "set eos_token in its configuration")
        return text + eos

    def _up_to_end(self, text: str) -> str:
        """Cut off the white space behind a token that ends an answer: the policy stops before it."""
        stripped = text.rstrip()
        return stripped if self._is_ended(stripped) else text

    def _is_ended(self, text: str) -> bool:
        return bool(self._end_of(text))

    # Conversations

    def _said(self, row: NormalRow, messages: Conversation) -> Conversation:
        """Return messages without the token that ends an answer where a data set has written it into the assistant's.

        Raises:
            DataError: there is more behind it, which generation would never come to.
        """
        found: Conversation = []
        for place, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "assistant" and not row.finish and (head := self.ending.cut(content)) is not None:
                self._check_end(row, content, f"message {place}")
                message = {**message, "content": head.removesuffix(self._end_of(head))}
            found.append(message)
        return found

    def _end_of(self, text: str) -> str:
        return next((stop for stop in self.ending.stops.values() if text.endswith(stop)), "")

    def _write(self, row: NormalRow, response: Conversation) -> Written:
        """Return a conversation's text with what the assistant writes in it, after the prompt if there is one."""
        prompt = cast("Conversation", row.prompt)
        messages = self._said(row, [*prompt, *response])
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant" and k >= len(prompt)]
        learned = [k for k in (turns if self._learns_all else turns[-1:]) if messages[k].get("weight") != 0]
        if not learned:
            roles = ", ".join(message["role"] for message in messages)
            some = "message to learn" if not turns else "message whose weight is not 0"
            raise DataError(row.place, f"has no assistant's {some} (roles: {roles})", "drop it")
        if blank := [k for k in learned if not messages[k]["content"].strip() and set(messages[k]) <= PLAIN]:
            what = f"message {blank[0]}, the assistant's, is blank: an empty answer would be learned"
            raise DataError(row.place, what, "drop the row, or give the message weight 0")
        if row.finish and learned == [len(messages) - 1] and set(messages[-1]) <= PLAIN:
            opened = self._render(row, messages[:-1], is_open=True) if learned[0] else ""
            content = self._continued(opened, messages[-1]["content"])
            # What was cut within a character was not sampled as the sign that stands for half of it.
            answer = content + self.ending.end if row.finish == "stop" else content.rstrip("\ufffd")
            return Written(opened + answer, len(opened), [(len(opened), len(opened) + len(answer))])
        if GENERATION.search(self._template_of(row)):
            written = self._marked(row, messages, len(prompt), learned)
        else:
            written = self._grown(row, messages, learned)
        if not written.spans or not any(begin < end for begin, end in written.spans):
            raise DataError(row.place, "the chat template writes nothing for the assistant", PREFIX_REMEDY)
        self.check_history(row, written.text)
        parts = [written.text[begin:end] for begin, end in written.spans]
        is_each = len(parts) == len(learned)  # marks may part a turn
        for place, turn in enumerate(learned):
            self._check_learned(row, messages, turn, parts[place] if is_each else "".join(parts))
        return written

    def _check_learned(self, row: NormalRow, messages: Conversation, turn: int, part: str) -> None:
        """Insist that what is learned of a message is all of it: what it thinks, says and calls."""
        message, is_last = messages[turn], turn == len(messages) - 1
        for name, thought in _thoughts(message).items():
            if not _is_within(thought, part):
                what = f"has {name}, which the chat template does not write"
                if name == "content" or not is_last:
                    raise DataError(row.place, f"the chat template leaves out what message {turn} thinks", LAST_REMEDY)
                raise DataError(row.place, what, OTHER_TEMPLATE)
        said = CLOSERS.split(message["content"])[-1].strip()  # thinking is brought to one form by some
        if not _is_within(said, part):
            what = f"the chat template writes what message {turn} says otherwise than it stands there"
            raise DataError(row.place, what, "give data.chat_template one that leaves it as it is")
        called = [call["function"]["name"] for call in message.get("tool_calls", [])]
        if lost := [name for name in called if part.count(name) < called.count(name)]:
            what = f"the chat template does not write all {len(called)} tool_calls of message {turn} ({lost[0]})"
            raise DataError(row.place, what, OTHER_TEMPLATE)

    def _marked(self, row: NormalRow, messages: Conversation, num_before: int, learned: list[int]) -> Written:
        """Find the assistant's parts by the template's {% generation %} marks."""
        text, spans = self._render_marked(row, messages)
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        num_here = sum(turn >= num_before for turn in turns)
        if len(learned) < num_here or len(spans) == len(turns):
            if len(spans) != len(turns):
                what = f"the chat template marks {len(spans)} parts for {len(turns)} turns"
                raise DataError(row.place, f"{what}, so the last is not known", "set data.learn=all, and no weight")
            spans = [span for span, turn in zip(spans, turns, strict=True) if turn in learned]
        start = self._start(row, text, messages[:num_before], num_before) if num_before else 0
        openings = list(self._openings(row, messages, turns, learned, text))
        spans = [(max(start, self._opened(row, openings, begin, end)), end) for begin, end in spans if end > start]
        if not spans:
            return Written(text, start, [])
        limits = [*(begin for begin, _ in spans[1:]), len(text)]
        spans = [
            (begin, self._end_of_marked(text[:limit], end)) for (begin, end), limit in zip(spans, limits, strict=True)
        ]
        if len(spans) == len(learned):
            for turn, (_, end) in zip(learned[:-1], spans[:-1], strict=True):
                if not self._is_ended(text[:end]):
                    raise self._no_end(row, turn)
        begin, end = spans[-1]
        if row.finish == "length":
            text = text[:begin] + self._finished(row, text[begin:end])
        elif not self._is_ended(text[:end]):
            if text[end:].strip():
                raise self._no_end(row, learned[-1])
            text = text[:end] + self._own_end(messages[learned[-1]])
        spans[-1] = (begin, end if self._is_ended(text[:end]) else len(text))
        if not num_before and (opened := self._render(row, messages[: learned[0]], is_open=True) if learned[0] else ""):
            start = len(opened) if text.startswith(opened) and len(opened) <= spans[0][0] else spans[0][0]
        self._check_marks(row, messages)
        return Written(text, start or spans[0][0], spans)

    def _check_marks(self, row: NormalRow, messages: Conversation) -> None:
        """Refuse a template that marks what the user says: a word in his mouth shows it, once."""
        template = self._template_of(row)
        others = [place for place, each in enumerate(messages) if each["role"] == "user"]
        if template in self._marks_checked or not others:
            return
        said = [{**each, "content": FOREIGN} if place in others else each for place, each in enumerate(messages)]
        text, spans = self._render_marked(row, said)
        if FOREIGN in text and any(FOREIGN in text[begin:end] for begin, end in spans):
            what = "the chat template marks what the user says as the assistant's ({% generation %})"
            raise DataError(row.place, what, "mark the assistant's turns alone")
        self._marks_checked.add(template)

    def _openings(
        self, row: NormalRow, messages: Conversation, turns: Sequence[int], learned: Sequence[int], text: str
    ) -> Iterator[int]:
        """Yield the characters at which turns are opened, as far as what stands before one stays as it is."""
        for turn in turns:
            opened = ""
            with suppress(DataError):  # a conversation that the template does not take up to there
                opened = self._render(row, messages[:turn], is_open=True) if turn else ""
            if text.startswith(opened):
                yield len(opened)
            elif turn in learned and (begun := _begun_thought(opened)) and text.startswith(opened[: begun.start()]):
                raise _no_thought(row, begun, turn)

    def _opened(self, row: NormalRow, openings: Sequence[int], begin: int, end: int) -> int:
        """Return where in a marked part the policy begins to write: behind what opens its turn."""
        within = [opening for opening in openings if begin < opening < end]
        if len(within) > 1:
            what = "the chat template marks what stands between two of the assistant's turns as the assistant's"
            raise DataError(row.place, what, "mend its {% generation %} marks, or take them out")
        return within[0] if within else begin

    def _end_of_marked(self, text: str, end: int) -> int:
        """Return where a marked part ends: with the token that ends the turn, though the marks leave it out."""
        marked = self._up_to_end(text[:end])
        if len(marked) < end or self._is_ended(marked):
            return len(marked)
        return end + len(self.ending.begins(text[end:]) or "")

    def _grown(self, row: NormalRow, messages: Conversation, learned: list[int]) -> Written:
        """Find the assistant's parts as what each of its messages adds to the conversation before it."""
        last = len(messages) - 1
        answers: dict[int, tuple[str, str]] = {}  # by turn: what stands before it, what it is
        for turn in learned:
            if not turn:
                what = "message 0 is the assistant's, with nothing before it to answer"
                raise DataError(row.place, what, f"begin with the user's, or {PREFIX_REMEDY}")
            opened = self._render(row, messages[:turn], is_open=True)
            answers[turn] = opened, self._answer(row, messages[: turn + 1], opened, is_last=turn == last)
        text = "".join(answers[last]) if last in answers else self._render(row, messages)
        spans: list[tuple[int, int]] = []
        for turn, (opened, answer) in answers.items():
            _check_prefix(row, text, opened, turn)
            _check_prefix(row, text, opened + answer, turn + 1)
            end = len(opened) + len(answer)
            if turn != last and not self._is_ended(answer):
                ending = self.ending.begins(text[end:])
                if ending is None:
                    raise self._no_end(row, turn)
                end += len(ending)
            spans.append((len(opened), end))
        return Written(text, spans[0][0], spans)

    def _answer(self, row: NormalRow, messages: Conversation, opened: str, *, is_last: bool) -> str:
        """Return what the assistant's last message adds to `opened`, up to what ends it.

        Where it is not the conversation's last and only the next message ends it, that is left out.
        """
        turn, message = len(messages) - 1, messages[-1]
        content, is_plain = str(message["content"]), set(message) <= PLAIN
        own_end = self._own_end(message) if is_last else ""
        mouth, is_hushed = OPENER.search(opened), bool(NO_THOUGHT.search(opened))
        if is_hushed and _thoughts(message):
            what = f"the chat template has the policy not think, and message {turn} thinks"
            raise DataError(row.place, what, "leave that out, or have the template let it think (chat_template_kwargs)")
        if is_last and is_plain and mouth and _closes(content, mouth):
            return self._finished(row, content + own_end)
        closed = self._render(row, messages)
        answer = self._added(opened, closed)
        closer = None if is_hushed else CLOSERS.search(content)
        if answer is not None and closer:
            is_left_out = closer.group() not in answer
            if is_left_out or (mouth and _thoughts(message) and not CLOSERS.split(answer)[0].strip()):
                answer = None  # it would be thought twice, or not at all
        if answer is not None:
            said = answer.find(content.strip())
            ended = self.ending.cut(answer, said + len(content.strip()) if said >= 0 else 0)
            ended = ended or answer.removesuffix(self.ending.gap_alone) + own_end
            return self._finished(row, ended) if is_last else ended
        if is_last and is_plain and closer:
            return self._finished(row, self._continued(opened, content) + own_end)
        if mouth and not closer:
            if field := next(iter(_thoughts(message)), ""):
                what = f"has {field}, which the chat template does not write behind {mouth.group().strip()}"
                raise DataError(row.place, what, f"begin content with it and what ends it, or {OTHER_TEMPLATE}")
            raise _no_thought(row, mouth, turn)
        if closer:
            raise DataError(row.place, f"the chat template leaves out what message {turn} thinks", PREFIX_REMEDY)
        _check_prefix(row, closed, opened, turn)
        return closed

    def _added(self, opened: str, closed: str) -> str | None:
        """Return what a turn adds to the opened one; None where that is rendered otherwise once it is closed.

        The thought that is begun there may stand in the closed one with other white space, and a blank one not at all.
        """
        if closed.startswith(opened):
            return closed[len(opened) :]
        begun = _begun_thought(opened)
        if begun is None or not closed.startswith(opened[: begun.start()]):
            return None
        rest = closed[begun.start() :]
        if NO_THOUGHT.search(opened):
            return BLANK_FIRST.sub("", rest)
        return self._continued(opened, rest) if rest.startswith(begun.group().rstrip()) else None

    def _finished(self, row: NormalRow, answer: str) -> str:
        """Return an answer, without its end where it is a sample that was cut."""
        if row.finish != "length":
            return answer
        return answer.removesuffix(self._end_of(answer)).removesuffix(self.ending.gap)

    def _own_end(self, message: dict[str, Any]) -> str:
        ending = self.ending
        return ending.call_end if message.get("tool_calls") and ending.call_end else ending.gap + ending.end

    def _continued(self, opened: str, content: str) -> str:
        """Return what is left to write of a content whose thinking `opened` has begun."""
        mouth = OPENER.search(opened)
        opener = mouth.group().rstrip() if mouth else ""
        if not mouth or not content.lstrip().startswith(opener):
            return content
        rest = content.lstrip().removeprefix(opener)
        return rest[num_shared(mouth.group().removeprefix(opener), rest) :]

    def _no_end(self, row: NormalRow, turn: int) -> DataError:
        what = f"the chat template writes no token that ends the turn of message {turn}, so no end would be learned"
        return DataError(row.place, what, "set data.learn=last, or give data.chat_template one that does")

    def _start(self, row: NormalRow, text: str, messages: Conversation, turn: int) -> int:
        """Return the character at which the assistant begins to write message `turn`."""
        before = self._render(row, messages, is_open=True)
        _check_prefix(row, text, before, turn)
        return len(before)

    # The template

    def _render(self, row: NormalRow, messages: Conversation, *, is_open: bool = False) -> str:
        return self._rendered(row, messages, add_generation_prompt=is_open)[0]

    def _render_marked(self, row: NormalRow, messages: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return a text and the parts marked in it, without those that are nothing but an end, or tokens behind one."""
        text, marks = self._rendered(row, messages, return_assistant_tokens_mask=True)
        parts: list[tuple[int, int]] = []
        for begin, end in marks:
            before = self._end_of_marked(text, parts[-1][1]) if parts else 0
            is_behind = self._is_ended(text[:before]) and not text[before:begin].strip()
            is_bare = set(self._ids(text[begin:end].strip())) <= self._tokenizer.added_tokens_decoder.keys()
            if not self.ending.begins(text[begin:end]) and not (is_behind and is_bare):
                parts.append((begin, end))
        return text, [(begin, end) for begin, end in parts if begin < end]

    def _rendered(self, row: NormalRow, messages: Conversation, **how: bool) -> tuple[str, Any]:
        """Return a text and the parts that the template marks in it, where they are asked for."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._template_of(row)
        _check_roles(row, messages, template)
        if unread := [name for name in row.template_options if not re.search(rf"\b{re.escape(name)}\b", template)]:
            what = f"column 'chat_template_kwargs' sets {unread[0]}, which the chat template does not read"
            raise DataError(row.place, what, "take it out, or check its name")
        given = {**self._tokenizer.special_tokens_map, **self._clock, **row.template_options}
        with _refusals(row.place, messages):
            texts, marks = render_jinja_template(
                [self._styled(row, messages)], tools=cast("Any", row.tools), chat_template=template, **how, **given
            )
        self._check_written(row, messages, texts[0])
        return texts[0], marks[0] if marks else []

    def _check_written(self, row: NormalRow, messages: Conversation, text: str) -> None:
        """Refuse what a template leaves out without a word."""
        tools = [tool.get("function", tool) for tool in row.tools or []]
        names = [tool["name"] for tool in tools if isinstance(tool, dict) and isinstance(tool.get("name"), str)]
        if lost := [name for name in names if name not in text]:
            raise DataError(row.place, f"has tools, which the chat template does not write ({lost[0]})", OTHER_TEMPLATE)
        calls = [call["function"]["name"] for message in messages for call in message.get("tool_calls", [])]
        if lost := [name for name in calls if name not in text]:
            raise DataError(
                row.place, f"has tool_calls, which the chat template does not write ({lost[0]})", OTHER_TEMPLATE
            )
        for place, message in enumerate(messages):
            is_written = _is_told if message["role"] == "tool" else _is_within
            if message["role"] != "assistant" and not is_written(message["content"].strip(), text):
                what = f"has a {message['role']} message ({place}), which the chat template does not write"
                raise DataError(row.place, what, OTHER_TEMPLATE)

    def check_history(self, row: NormalRow, text: str) -> None:
        """Insist that what the assistant has said in a prompt stands in its text.

        Templates leave out former thinking, and what is said beside a call.

        Raises:
            DataError: it does not.
        """
        for place, message in enumerate(cast("Conversation", row.prompt)):
            is_said = message["role"] == "assistant" and not message.get("tool_calls")
            if is_said and not _is_within(CLOSERS.split(message["content"])[-1].strip(), text):
                what = f"has an assistant message ({place}), which the chat template does not write"
                raise DataError(row.place, what, OTHER_TEMPLATE)

    def _styled(self, row: NormalRow, messages: Conversation) -> Conversation:
        """Return messages as this template wants them."""
        plain = [{name: each for name, each in message.items() if name != "weight"} for message in messages]
        if not any(message.get("tool_calls") for message in plain):
            return plain
        if self._call_style is None:
            self._call_style = self._find_call_style(row)
        as_json, content = self._call_style
        for message in plain:
            if calls := message.get("tool_calls"):
                message["content"] = message["content"] or content
                message["tool_calls"] = [_styled_call(call, as_json=as_json) for call in calls]
        return plain

    def _find_call_style(self, row: NormalRow) -> tuple[bool, str | None]:
        """Return how the template wants tool calls, by trying; an object that comes out as Python's is not wanted."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = {**self._tokenizer.special_tokens_map, **self._clock}
        written: list[tuple[bool, str | None]] = []
        num_rendered = 0
        for as_json, content in CALL_STYLES:
            call = tool_call(CALLED, json.dumps({ASKED: HEARD}) if as_json else {ASKED: HEARD})
            asking = {"role": "assistant", "content": content, "tool_calls": [call]}
            try:
                texts, _ = render_jinja_template(
                    [[{"role": "user", "content": "a"}, asking]],
                    tools=cast("Any", row.tools),
                    chat_template=self._template_of(row),
                    **given,
                )
            except template_errors():
                continue
            text, num_rendered = texts[0], num_rendered + 1
            written += [(as_json, content)] if CALLED in text else []
            if CALLED in text and HEARD in text and f"'{ASKED}'" not in text and '\\"' not in text:
                return as_json, content
        if num_rendered and not written:
            raise DataError(row.place, "has tool_calls, which the chat template does not write", OTHER_TEMPLATE)
        return written[0] if written else CALL_STYLES[0]

    def _template_of(self, row: NormalRow) -> str:
        if self._template is None and not self._tokenizer.chat_template:
            where = f"tokenizer {self._tokenizer.name_or_path}"
            remedy = "take an instruction-tuned model, or give data.chat_template=FILE"
            raise ModelError(where, "has no chat template", remedy)
        try:
            return self._template or cast("str", self._tokenizer.get_chat_template(tools=cast("Any", row.tools)))
        except ValueError as error:
            reason = str(error).partition("!")[0]
            raise ModelError(f"tokenizer {self._tokenizer.name_or_path}", reason, f"give it one {BESIDE}") from error

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

        Returns also whether a token spans one of them: the parts are then tokenized one by one.
        """
        parts = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
        pieces, whole = [self._ids(part) for part in parts], self._ids(text)
        if list(chain(*pieces)) == whole:
            return pieces, False
        # Some tokenizers write a text's first word otherwise than the same word later on: compare beginnings.
        heads = [self._ids(text[:end]) for end in ends]
        if any(whole[: len(head)] != head for head in heads):
            return self._alone(text, ends), True
        cuts = [0, *(len(head) for head in heads), len(whole)]
        return [whole[start:end] for start, end in pairwise(cuts)], False

    def _alone(self, text: str, ends: Sequence[int]) -> list[list[int]]:
        """Tokenize the parts of a text one by one, each as it stands behind the one before it."""
        parts = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
        pieces = [self._ids(part) for part in parts]
        if self._text(list(chain(*pieces))) == text:
            return pieces
        return [self.ids_behind(part) if any(parts[:k]) else pieces[k] for k, part in enumerate(parts)]

    def ids_behind(self, text: str) -> list[int]:
        """Return a text's tokens as they are behind another text: without the space that begins one."""
        for anchor in ANCHORS:
            head, both = self._ids(anchor), self._ids(anchor + text)
            if both[: len(head)] == head and self._text(both) == self._text(head) + text:
                return both[len(head) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _text(self, ids: list[int]) -> str:
        decoded: Any = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast("str", decoded)


def _check_roles(row: NormalRow, messages: Conversation, template: str) -> None:
    """Refuse a role that is none of the usual ones and that the template does not name: many write any as it is."""
    for place, role in enumerate(message["role"] for message in messages):
        if role not in ROLES and not re.search(rf"""(["']){re.escape(role)}\1""", template):
            what = f"message {place} has the role {role!r}, which the chat template does not name"
            raise DataError(row.place, what, f"give it one of {', '.join(ROLES)}")


def _is_within(content: str, text: str) -> bool:
    """Return whether a content stands in a text, what is between its words apart if need be."""
    return content in text or _words(content) in _words(text)


def _is_told(result: str, text: str) -> bool:
    """Return whether most words of a tool's result stand in a text: some templates write it in a form of their own."""
    if result in text:
        return True
    words, there = WORD.findall(result), set(WORD.findall(text))
    return not words or 2 * sum(word in there for word in words) > len(words)


def _words(text: str) -> str:
    return " ".join(["", *WORD.findall(text), ""])


def _closes(content: str, mouth: re.Match[str]) -> bool:
    """Return whether a content ends the thinking that the prompt has begun, without beginning it itself."""
    closer = CLOSERS.search(content)
    return closer is not None and mouth.group().rstrip() not in content[: closer.start()]


def _begun_thought(opened: str) -> re.Match[str] | None:
    """Return the thought that a template writes where a turn is opened: begun, or blank."""
    return OPENER.search(opened) or NO_THOUGHT.search(opened)


def _thoughts(message: dict[str, Any]) -> dict[str, str]:
    """Return what a message thinks, by the field that holds it."""
    closer = CLOSERS.search(message["content"])
    within = re.sub(rf"\A\s*(?:{THINKS})", "", message["content"][: closer.start()]) if closer else ""
    fields = {name: message[name] for name in sorted(THOUGHTS & message.keys()) if isinstance(message[name], str)}
    return {name: text.strip() for name, text in {"content": within, **fields}.items() if text.strip()}


def _no_thought(row: NormalRow, begun: re.Match[str], turn: int) -> DataError:
    what = f"the chat template begins the answer with {' '.join(begun.group().split())}, which message {turn}"
    if NO_THOUGHT.search(begun.group()):
        return DataError(row.place, f"{what} does not repeat", PREFIX_REMEDY)
    return DataError(row.place, f"{what} does not end", "write what it thinks, or have the template not begin it")


def _styled_call(call: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    written = json.dumps(arguments, ensure_ascii=False) if as_json else arguments
    return {**call, "function": {**function, "arguments": written}}


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
    try:
        yield
    except template_errors() as error:
        if line := getattr(error, "lineno", None):  # it does not parse
            what = f"the chat template cannot be read ({error}, line {line})"
            raise DataError(place, what, f"mend the template, or give the model another {BESIDE}") from error
        roles = ", ".join(message["role"] for message in messages)
        what = f"the chat template refuses the roles {roles} ({error})"
        raise DataError(place, what, "mend the row, or the template") from error
