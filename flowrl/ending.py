"""Where an answer ends: one definition, for what is rendered, learned, sampled, scored and saved.

`ending_of` asks the tokenizer, the chat template and the model's files once. An answer ends with the first of `stops`
in it: the token that the template puts behind what the assistant says, the tokenizer's EOS, and what
generation_config.json names. The first is found by rendering a probe, whether or not any map of special tokens names
it. Where the template leaves it to the next message, as GLM's does, it is that message's mark.

Invariants:
- generation stops at every token that is taught as an end, and a saved model says so;
- what a template writes behind that token is nobody's answer.

Called by the renderer, the turn format, generation engines and whoever saves a model.

Tests: tests/unit/test_ending.py
"""

from __future__ import annotations

import json
import re
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from transformers import PreTrainedTokenizerBase

# Long enough to be found again, and nothing a template would treat in its own way.
ASKED, SAID, HEARD, CALLED = "xqzask", "xqzsay", "xqzhear", "xqzcall"
# How templates want a tool call: the arguments as an object or as JSON, beside an empty content or none.
CALL_STYLES = [(as_json, content) for as_json in (False, True) for content in ("", None)]
# What begins the thinking before an answer, and what ends it: as tags, as marks, as a channel of its own.
THINKS = r"<[\w:]*think\w*>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought|<\|channel\|>analysis<\|message\|>"
CLOSERS = re.compile(r"</[\w:]*think\w*>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>|<\|channel\|>final<\|message\|>")
DATE = date(2026, 1, 1)  # what a template that asks for today's date is told, unless `data.date` says another


class AnswerEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Where the answers of one model end."""

    stops: dict[int, str]  # the tokens that end an answer, each with its text
    end: str  # of them, the one that is taught; "" where there is none at all
    is_written: bool  # whether the chat template writes it; if not, it is the tokenizer's EOS
    gap: str = ""  # what the template writes between what is said and its end
    gap_alone: str = ""  # the same where no message follows and the template writes no end
    call_end: str = ""  # the end of an answer that calls a tool

    @property
    def end_id(self) -> int | None:
        """Return the token that is taught."""
        return next((index for index, text in self.stops.items() if text == self.end), None)

    def cut(self, text: str, start: int = 0) -> str | None:
        """Return a text up to the first token from `start` on that ends an answer, that included; None without one."""
        found = [(place, place + len(stop)) for stop in self.stops.values() if (place := text.find(stop, start)) >= 0]
        return text[: max(end for place, end in found if place == min(found)[0])] if found else None

    def begins(self, text: str) -> str | None:
        """Return the white space and the token that ends an answer, if a text begins so."""
        head = self.cut(text)
        return head if head and any(head.strip() == stop.strip() for stop in self.stops.values()) else None

    def __str__(self) -> str:
        others = ", ".join(text for text in self.stops.values() if text != self.end)
        whose = "the chat template's" if self.is_written else "the tokenizer's EOS"
        return f"{self.end or 'no token'} ({whose}){f'; generation also stops at {others}' if others else ''}"


def ending_of(
    tokenizer: PreTrainedTokenizerBase, *, template: str | None = None, directory: Path | str | None = None
) -> AnswerEnd:
    """Return where a model's answers end.

    Args:
        template: a chat template in place of the tokenizer's own.
        directory: where the model's generation_config.json and config.json lie; that of the tokenizer by default.
    """
    added = {text: index for index, text in _added(tokenizer).items()}
    eos = cast("int | None", tokenizer.eos_token_id)
    known = [] if eos is None else [eos]
    known += _configured(Path(directory or tokenizer.name_or_path or "."))
    stops = {index: _text_of(tokenizer, index) for index in dict.fromkeys(known) if 0 <= index < len(tokenizer)}
    ends = _written_ends(tokenizer, template, sorted(added, key=len, reverse=True), set(stops.values()))
    stops = {added[end]: end for end in (ends.get("end"), ends.get("call_end")) if end} | stops
    eos_text = "" if eos is None else stops[eos]
    return AnswerEnd(stops=stops, is_written="end" in ends, **{"end": eos_text, **ends})


def sample_text(tokenizer: Any, token_ids: Sequence[int], stops: Container[int], *, keeps_special: bool = True) -> str:
    """Return a sample as text: all of it, special tokens too (`<tool_call>`), but not the token that ended it."""
    ids = list(token_ids[:-1] if len(token_ids) and token_ids[-1] in stops else token_ids)
    text = tokenizer.decode(ids, skip_special_tokens=not keeps_special, clean_up_tokenization_spaces=False)
    return cast("str", text)


def write_stops(directory: Path) -> None:
    """Name every token that ends an answer in a saved model's generation_config.json, for whoever serves it."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError):  # the model came without one that can be read here, so nothing was tokenized by it
        return
    path = directory / "generation_config.json"
    try:
        settings: Any = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} holds no object")
    stops = list(ending_of(tokenizer, directory=directory).stops)
    if stops:
        settings["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def render_options(day: date) -> dict[str, Any]:
    """Return what every rendering is given, so that it does not depend on the day: the clock of the template."""
    return {"strftime_now": day.strftime}


def tool_call(name: str, arguments: Any) -> dict[str, Any]:
    """Return a tool call as OpenAI has it; the id is one that Mistral's templates take."""
    return {"type": "function", "id": "xqzcall00", "function": {"name": name, "arguments": arguments}}


def template_errors() -> tuple[type[Exception], ...]:
    """Return what a template may raise: its own refusals, and errors of Python from within."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError, LookupError, AttributeError)


def _written_ends(tokenizer: Any, template: str | None, added: list[str], known: set[str]) -> dict[str, Any]:
    """Return what the chat template writes behind an answer, as fields of `AnswerEnd`; nothing where it ends none."""
    if not (template or tokenizer.chat_template):
        return {}

    def written(*messages: dict[str, Any]) -> str:
        """Return a conversation's text up to what is heard in it; nothing where it cannot be rendered."""
        asked = {"role": "user", "content": ASKED}
        for first in ([asked], [{"role": "system", "content": ASKED}, asked]):
            try:
                text: Any = tokenizer.apply_chat_template(
                    [*first, *messages], chat_template=template, tokenize=False, **render_options(DATE)
                )
            except template_errors():
                continue
            return text.split(HEARD)[0] if SAID in text else ""
        return ""

    said, heard = {"role": "assistant", "content": SAID}, {"role": "user", "content": HEARD}
    alone, followed = (written(*messages).rpartition(SAID)[2] for messages in ([said], [said, heard]))
    shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, followed, strict=False)))
    found = _end_in(shared, added, known) or _end_in(alone, added, known)
    fields: dict[str, Any] = {}
    if not found:
        fields, found = {"gap_alone": alone if not alone.strip() else ""}, _end_in(followed, added, known)
        if not found or found[0].strip():
            return fields
    fields |= {"gap": found[0], "end": found[1]}
    call_end = _call_end(written, added, known | {found[1]})
    return fields | ({"call_end": call_end} if call_end else {})


def _call_end(written: Callable[..., str], added: list[str], ends: set[str]) -> str:
    """Return what ends an answer that calls a tool, where it is none of the other ends.

    It is the token that stands last in it, unless it only ends the one call of several, or that of the tool's answer.
    """
    result = {"role": "tool", "content": HEARD, "name": CALLED, "tool_call_id": "xqzcall00"}
    for as_json, content in CALL_STYLES:
        call = tool_call(CALLED, json.dumps({CALLED: SAID}) if as_json else {CALLED: SAID})
        asking = {"role": "assistant", "content": content, "tool_calls": [call]}
        closed, followed = written(asking), written(asking, result)
        if not closed:
            continue
        several = written({**asking, "tool_calls": [call, call]}).split(SAID)
        tail, between = closed.rpartition(SAID)[2], several[1:-1]
        if any(end in each for end in ends for each in (tail, several[-1])):
            return ""
        last = next((token for token in added if tail.rstrip().endswith(token)), "")
        if last and not any(last in each for each in between):
            return last
        found = _end_in(followed[len(closed) :], added, ends) if followed.startswith(closed) else None
        return found[1] if found and not found[0].strip() else ""
    return ""


def _end_in(text: str, added: list[str], known: set[str]) -> tuple[str, str] | None:
    """Return the token that ends an answer in what follows it, behind what stands before that token.

    It is the first added token; of several without anything between them, the first that is known to end answers.
    """
    found = re.search("|".join(map(re.escape, added)), text) if added else None
    if not found:
        return None
    first, place = found, found.end()
    while found and found.group() not in known:
        found = re.compile("|".join(map(re.escape, added))).match(text, place)
        place = found.end() if found else place
    found = found or first
    return text[: found.start()], found.group()


def _added(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that are never part of a word, each with its text; maps of special tokens name only some."""
    added = {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
    return {index: text for index, text in added.items() if text.strip()}


def _text_of(tokenizer: Any, index: int) -> str:
    return str(tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _configured(directory: Path) -> list[int]:
    """Return the tokens at which the model's own files have generation stop."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((directory / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        given = found if isinstance(found, list) else [found]
        return [each for each in cast("list[Any]", given) if type(each) is int]
    return []
