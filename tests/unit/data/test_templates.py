"""Laws of rendering, for random conversations under every family's template and three kinds of tokenizer."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from flowrl.data.formats import NormalRow, detect, normalise
from flowrl.data.prompts import PromptData, prompt_of
from flowrl.data.rendering import Encoded, Renderer
from flowrl.data.sources import RawRow
from flowrl.data.written import asked_and_answered
from flowrl.ending import ending_of, render_options, sample_text
from tests.support.templates import FAMILIES, tokenizer_of

DAY = PromptData().date
texts = st.text("ab y\n.é中:]", min_size=1, max_size=8).filter(str.strip)
few = hypothesis.settings(max_examples=8, deadline=None)
each_family = pytest.mark.parametrize("name", FAMILIES)
spaces = st.sampled_from(["byte", "first"])


@st.composite
def conversations(draw: st.DrawFn, *, has_system: bool = True, max_turns: int = 3) -> list[dict[str, str]]:
    """Draw what a user and an assistant say in turn, the assistant last, perhaps behind a system's message."""
    messages = [{"role": "system", "content": draw(texts)}] if has_system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, max_turns))):
        messages += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
    return messages


def row(**columns: Any) -> NormalRow:
    raw = RawRow("a.jsonl:7", columns)
    return normalise(raw, detect(raw))


def rendered(tokenizer: Any, messages: list[Any], **how: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **render_options(DAY), **how)


def learned(tokenizer: Any, found: Encoded) -> str:
    mask = found.masks[0] if found.masks else [1] * len(found.responses[0])
    return decoded(tokenizer, [token for token, keep in zip(found.responses[0], mask, strict=True) if keep])


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def renderer_of(name: str, tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, learns_all=FAMILIES[name].learns == "all")


@each_family
def test_the_end_of_an_answer_is_found(name: str):
    ending = ending_of(tokenizer_of(name))
    assert ending.end == FAMILIES[name].end
    assert set(ending.stops.values()) >= {FAMILIES[name].end, FAMILIES[name].eos}


@pytest.mark.slow
@each_family
@few
@hypothesis.given(data=st.data())
def test_what_is_learned_is_what_the_assistant_says_with_its_end(name: str, data: st.DataObject):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    messages = data.draw(conversations(has_system=family.has_system))
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    said = said if family.learns == "all" else said[-1:]
    if family.learns == "thinking":  # the template has begun to think, and would drop what was thought
        messages[-1]["content"], said = "a\n</think>\n\n" + said[0], ["a\n</think>\n\n" + said[0]]
    said = [each.strip() for each in said] if family.strips else said
    found = renderer_of(name, tokenizer).encode(row(messages=messages))
    assert learned(tokenizer, found) == "".join(family.before + each + family.behind + family.end for each in said)


@pytest.mark.slow
@each_family
@few
@hypothesis.given(data=st.data(), spaces=spaces)
def test_prompt_and_answer_joined_are_the_rendering_of_the_whole(name: str, data: st.DataObject, spaces: str):
    family, tokenizer = FAMILIES[name], tokenizer_of(name, spaces=spaces)
    messages = data.draw(conversations(has_system=family.has_system))
    if family.learns == "thinking":
        return
    found = renderer_of(name, tokenizer).encode(row(messages=messages))
    ids, whole = [*found.prompt_ids, *found.responses[0]], rendered(tokenizer, messages)
    is_written = family.end != "<|user|>" and family.end in whole.rpartition(messages[-1]["content"].strip())[2]
    joined = whole[: whole.rindex(family.end) + len(family.end)] if is_written else whole + family.end
    assert decoded(tokenizer, ids) == joined
    if not found.is_separate:
        assert ids == tokenizer.encode(joined, add_special_tokens=False)


@pytest.mark.slow
@each_family
@few
@hypothesis.given(data=st.data(), spaces=st.sampled_from(["byte", "first", "always"]))
def test_a_prompt_is_the_same_tokens_online_and_offline(name: str, data: st.DataObject, spaces: str):
    family, tokenizer = FAMILIES[name], tokenizer_of(name, spaces=spaces)
    *prompt, answer = data.draw(conversations(has_system=family.has_system))
    renderer = renderer_of(name, tokenizer)
    text = renderer.prompt_text(prompt_of(PromptData(), RawRow("a", {"prompt": prompt})))
    online = renderer.prompt_ids(text, is_rendered=True)
    assert online == tokenizer.encode(rendered(tokenizer, prompt, add_generation_prompt=True), add_special_tokens=False)
    content = "b\n</think>\n" + answer["content"] if family.learns == "thinking" else answer["content"]
    answers = [[{"role": "assistant", "content": each}] for each in (content, content + "y")]
    rows = [row(prompt=prompt, completion=answers[0]), row(prompt=prompt, chosen=answers[0], rejected=answers[1])]
    rows.append(row(prompt=prompt, completion=answers[0], label=True))
    assert [renderer.encode(each).prompt_ids for each in rows] == [online] * 3


@pytest.mark.slow
@each_family
@few
@hypothesis.given(data=st.data(), wrote=texts, is_cut=st.booleans())
def test_what_was_sampled_is_learned_again_as_it_was(name: str, data: st.DataObject, wrote: str, is_cut: bool):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    *prompt, _ = data.draw(conversations(has_system=family.has_system))
    columns = json.loads(json.dumps({"prompt": prompt, "answer_prefix": data.draw(st.sampled_from([None, "It is"]))}))
    asked, answered = asked_and_answered(PromptData(), columns, wrote)
    renderer = renderer_of(name, tokenizer)
    normal = row(prompt=asked, completion=answered, finish="length" if is_cut else "stop")
    found = renderer.encode(normal)
    read = rendered(tokenizer, prompt, add_generation_prompt=True) + (columns["answer_prefix"] or "")
    ended = "" if is_cut else family.end
    assert decoded(tokenizer, [*found.prompt_ids, *found.responses[0]]) == read + wrote + ended
    assert sample_text(tokenizer, found.responses[0], renderer.ending.stops) == (columns["answer_prefix"] or "") + wrote


@pytest.mark.slow
@each_family
@few
@hypothesis.given(data=st.data())
def test_a_message_of_weight_0_is_read_and_not_learned(name: str, data: st.DataObject):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    if family.learns != "all":
        return
    messages: list[Any] = data.draw(conversations(has_system=family.has_system))
    turns = [message for message in messages if message["role"] == "assistant"]
    for turn in turns[:-1]:
        turn["weight"] = data.draw(st.sampled_from([0, 1, 0.0, False, None]))
    said = [turn["content"] for turn in turns if turn.get("weight") in (None, 1)]
    said = [each.strip() for each in said] if family.strips else said
    renderer = renderer_of(name, tokenizer)
    found, plain = renderer.encode(row(messages=messages)), [{**each} for each in messages]
    for message in plain:
        message.pop("weight", None)
    assert learned(tokenizer, found) == "".join(family.before + each + family.behind + family.end for each in said)
    unweighted = renderer.encode(row(messages=plain))
    assert [*found.prompt_ids, *found.responses[0]] == [*unweighted.prompt_ids, *unweighted.responses[0]]
