"""Turns as tokens: what is appended turn by turn is the whole; templates that break that are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import strategies as st

from flowrl.data.turns import TurnFormat
from flowrl.ending import DATE, render_options
from flowrl.errors import DataError, ModelError
from tests.support.templates import FAMILIES, tokenizer_of
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer

if TYPE_CHECKING:
    from flowrl.data.conversations import Conversation

TOKENIZER = tiny_tokenizer()
END: Any = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
texts = st.text("a0 \n.é中", max_size=6)


def whole(messages: Conversation, prefix: str = "") -> list[int]:
    """Return a conversation's tokens as the tokenizer renders it at once, with the next turn opened."""
    tokenizer: Any = TOKENIZER
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text + prefix, add_special_tokens=False)


def sampled(text: str) -> list[int]:
    end: Any = END
    return [*TOKENIZER.encode(text, add_special_tokens=False), end]


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    first=texts, turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), prefix=st.sampled_from(["", "It is"])
)
def test_turn_by_turn_gives_the_tokens_of_the_whole(first: str, turns: list[tuple[str, str]], prefix: str):
    form = TurnFormat(TOKENIZER, role="user", prefix=prefix)
    messages: Conversation = [{"role": "user", "content": first}]
    token_ids = form.first(first, where="here")
    assert token_ids == whole(messages, prefix)
    for said, heard in turns:
        turn = sampled(said)
        token_ids += [*turn, *form.between(turn, heard)]
        messages += [{"role": "assistant", "content": prefix + said}, {"role": "user", "content": heard}]
    assert token_ids == whole(messages, prefix)


def test_a_turn_that_was_cut_is_ended_by_the_environment_s_tokens():
    form = TurnFormat(TOKENIZER, role="user")
    ended, cut = form.between(sampled("7"), "higher"), form.between(sampled("7")[:-1], "higher")
    assert cut == [END, *ended]
    assert TOKENIZER.decode(ended) == "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "name", [name for name, each in FAMILIES.items() if each.learns == "all" and not each.before.strip()]
)
def test_turns_of_every_family_that_only_appends_are_those_of_the_whole(name: str):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    form = TurnFormat(tokenizer, role="user")
    turn = tokenizer.encode(family.before + "7" + family.behind + family.end, add_special_tokens=False)
    ids = [*form.first("go", where="here"), *turn, *form.between(turn, "up"), *turn]
    said = [("user", "go"), ("assistant", "7"), ("user", "up"), ("assistant", "7")]
    messages = [{"role": role, "content": text} for role, text in said]
    rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False, **render_options(DATE))
    shown: Any = tokenizer.decode(ids)
    assert shown == rendered[: len(shown)] or shown == rendered + family.end
    cut = turn[: len(turn) - len(tokenizer.encode(family.behind + family.end, add_special_tokens=False))]
    assert [*cut, *form.between(cut, "up")] == [*turn, *form.between(turn, "up")]


def test_a_conversation_may_begin_it_and_a_system_prompt_stands_before():
    form = TurnFormat(TOKENIZER, role="tool", system_prompt="Be brief.")
    messages: Conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
    assert form.first("go", where="here") == whole(messages)
    assert "tool" in TOKENIZER.decode(form.between(sampled("7"), "higher"))


def test_text_leaves_the_end_out():
    assert TurnFormat(TOKENIZER, role="user").text(sampled("7")) == "7"


STRIPS = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' }}")
COUNTS = CHAT_TEMPLATE.replace(
    "{{ m['role'] }}", "{{ m['role'] }}{{ loop.index if m['role'] == 'user' and loop.index > 1 }}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
PICKY = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "role", "error", "said"),
    [
        (None, "user", ModelError, "has no chat template"),
        (STRIPS, "user", ModelError, "renders a turn otherwise once another follows"),
        (COUNTS, "user", ModelError, "differently as the conversation grows"),
        (PLAIN, "user", ModelError, "no special token"),
        (PICKY + CHAT_TEMPLATE, "tool", DataError, "set agent.role to one that it takes, not 'tool'"),
    ],
)
def test_a_template_that_cannot_be_used_turn_by_turn_is_refused(template: Any, role: str, error: Any, said: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(error, match=said):
        TurnFormat(tokenizer, role=role)
