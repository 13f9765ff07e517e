"""Tokens and masks, held against conversations put together by hand and against tokenizers that merge."""

from __future__ import annotations

import random
from typing import Any

import pytest

from flowrl.data.formats import NormalRow, detect, normalise
from flowrl.data.rendering import Encoded, Renderer
from flowrl.data.sources import RawRow
from flowrl.errors import DataError, ModelError
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As templates of thinking models do: what was thought is dropped from all turns but the last.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAN = float("nan")


def renderer(tokenizer: Any, *, template: str | None = None, learns_all: bool = True) -> Renderer:
    return Renderer(tokenizer, template=template, learns_all=learns_all, separator="\n")


def row(**columns: Any) -> NormalRow:
    raw = RawRow("a.jsonl:7", columns)
    return normalise(raw, detect(raw))


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def merging_tokenizer(merges: list[tuple[str, str]]):
    """The tiny tokenizer with some merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = tiny_tokenizer().get_vocab()
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def first_word_tokenizer():
    """As Llama's: a text's first word gets a space before it, so that it has the token it has inside a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "▁the", "▁sky", "▁", "sky", "-"]
    raw = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token="▁"))
    spaces, marks = pre_tokenizers.Metaspace(prepend_scheme="first", split=True), pre_tokenizers.Punctuation()
    raw.pre_tokenizer = pre_tokenizers.Sequence([spaces, marks])
    raw.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    raw.add_special_tokens(["<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>")


# Conversations


def by_hand(tokenizer: Any, messages: list[dict[str, Any]], *, learns_all: bool = True) -> Encoded:
    """Tokens and mask of the tiny template, one message after the other."""
    ids: list[int] = []
    mask: list[int] = []

    def add(text: str, learned: int) -> None:
        new = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(new)
        mask.extend([learned] * len(new))

    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    for place, message in enumerate(messages):
        is_learned = message["role"] == "assistant" and (learns_all or place == last)
        add(f"<|im_start|>{message['role']}\n", 0)
        add(f"{message['content']}<|im_end|>", int(is_learned))
        add("\n", 0)
    start, end = mask.index(1), len(mask) - mask[::-1].index(1)
    part = mask[start:end]
    return Encoded(prompt_ids=ids[:start], responses=[ids[start:end]], masks=None if all(part) else [part])


@pytest.mark.parametrize("template", [None, MARKED], ids=["unmarked", "marked"])
@pytest.mark.parametrize("learns_all", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_mask_is_that_of_a_conversation_put_together_by_hand(tokenizer, template, learns_all, seed):
    draw = random.Random(seed)
    roles = draw.choices(["system", "user", "assistant", "tool"], k=draw.randint(1, 7))
    words = ["a", "two words", "\nline\n", "émile", "\N{GRINNING FACE}", " "]
    messages = [said(role, draw.choice(words)) for role in ["user", *roles, "assistant", *roles[:1]]]
    found = renderer(tokenizer, template=template, learns_all=learns_all).encode(row(messages=messages))
    assert found == by_hand(tokenizer, messages, learns_all=learns_all)


@pytest.mark.parametrize("template", [None, MARKED], ids=["unmarked", "marked"])
def test_completion_is_what_follows_the_prompt_as_it_is_generated_from(tokenizer, template):
    prompt = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    found = renderer(tokenizer, template=template).encode(row(prompt=prompt, completion=[said("assistant", "d")]))
    generated_from = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(found.prompt_ids) == generated_from
    assert tokenizer.decode(found.responses[0]) == "d<|im_end|>"
    assert found.masks is None


def test_tools_answer_inside_a_response_is_not_learned(tokenizer):
    answer = [said("assistant", "look"), said("tool", "dark"), said("assistant", "It is dark.")]
    found = renderer(tokenizer).encode(row(prompt=[said("user", "a")], completion=answer))
    assert found.masks is not None
    learned = [token for token, keep in zip(found.responses[0], found.masks[0], strict=True) if keep]
    assert tokenizer.decode(learned) == "look<|im_end|>It is dark.<|im_end|>"
    last = renderer(tokenizer, learns_all=False).encode(row(prompt=[said("user", "a")], completion=answer))
    assert tokenizer.decode(last.responses[0]) == "It is dark.<|im_end|>"


def test_template_sees_tools_and_options(tokenizer):
    template = "{{ tools[0]['name'] }}{{ style }}" + CHAT_TEMPLATE
    messages = [said("user", "a"), said("assistant", "b")]
    with_tools = row(messages=messages, tools=[{"name": "look"}], chat_template_kwargs={"style": " terse"})
    found = renderer(tokenizer, template=template).encode(with_tools)
    assert tokenizer.decode(found.prompt_ids).startswith("look terse<|im_start|>user")


def test_template_that_renders_a_turn_otherwise_later_is_refused_unless_only_the_last_is_learned(tokenizer):
    messages = [said("user", "a"), said("assistant", "hm</think>b"), said("user", "c"), said("assistant", "d</think>e")]
    with pytest.raises(DataError, match=r"a\.jsonl:7: .*before message 2 otherwise once that .*\{% generation %\}"):
        renderer(tokenizer, template=FORGETFUL).encode(row(messages=messages))
    found = renderer(tokenizer, template=FORGETFUL, learns_all=False).encode(row(messages=messages))
    assert tokenizer.decode(found.prompt_ids).endswith(
        "assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(found.responses[0]) == "d</think>e<|im_end|>"


def test_pair_shares_its_prompt_and_has_one_rendering_each(tokenizer):
    ask, yes, no = [said("user", "a")], [said("assistant", "yes")], [said("assistant", "no")]
    explicit = renderer(tokenizer).encode(row(prompt=ask, chosen=yes, rejected=no))
    assert explicit == renderer(tokenizer).encode(row(chosen=ask + yes, rejected=ask + no))
    for response, answer in zip(explicit.responses, (yes, no), strict=True):
        whole = tokenizer.apply_chat_template(ask + answer, return_dict=False)
        assert [*explicit.prompt_ids, *response] == whole[:-1]  # the template's line break after the end of the turn


@pytest.mark.parametrize(
    ("messages", "template", "what"),
    [
        ([said("user", "a")], None, "no assistant's message to learn (roles: user)"),
        ([said("assistant", "a")], None, "message 0 is the assistant's, with nothing before it"),
        (
            [said("user", "a"), {"role": "assistant", "tool_calls": [1]}],
            None,
            "has tool_calls, which the chat template",
        ),
        ([said("user", "a"), {"role": "assistant", "tool_calls": [1]}], "{{ 1 + 'tool_calls' }}", "refuses the roles"),
        ([said("user", "a"), said("assistant", "b")], "{{ raise_exception('no!') }}", "refuses the roles"),
        ([said("user", "a"), said("assistant", "b")], "{% generation %}{% endgeneration %}x", "writes nothing"),
    ],
)
def test_conversation_that_cannot_be_masked_exactly_is_refused(tokenizer, messages, template, what):
    with pytest.raises(DataError) as caught:
        renderer(tokenizer, template=template).encode(row(messages=messages))
    assert str(caught.value).startswith("a.jsonl:7: ")
    assert what in str(caught.value)


def test_what_a_template_writes_before_the_marked_part_is_neither_prompt_nor_learned(tokenizer):
    noted = MARKED.replace("{% generation %}", "({{ m['note'] }}){% generation %}")
    pair = {"chosen": [{**said("assistant", "b"), "note": "x"}], "rejected": [{**said("assistant", "c"), "note": "yz"}]}
    found = renderer(tokenizer, template=noted).encode(row(prompt=[said("user", "a")], **pair))
    assert tokenizer.decode(found.prompt_ids).endswith("<|im_start|>assistant\n")
    assert [tokenizer.decode(response) for response in found.responses] == ["(x)b<|im_end|>", "(yz)c<|im_end|>"]
    assert found.masks == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]


def test_tools_need_a_template_that_writes_them(tokenizer):
    messages = [said("user", "a"), said("assistant", "b")]
    with pytest.raises(DataError, match=r"a\.jsonl:7: has tools, which the chat template does not write"):
        renderer(tokenizer).encode(row(messages=messages, tools=[{"name": "look"}]))


def test_marks_that_are_not_one_a_turn_cannot_tell_the_last(tokenizer):
    twice = MARKED.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
    )
    messages = [said("user", "a"), said("assistant", "b")]
    assert renderer(tokenizer, template=twice).encode(row(messages=messages)) == by_hand(tokenizer, messages)
    with pytest.raises(DataError, match=r"marks 2 parts for 1 turns.*data\.learn=all"):
        renderer(tokenizer, template=twice, learns_all=False).encode(row(messages=messages))


def test_conversation_needs_a_chat_template():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*data\.chat_template=FILE"):
        renderer(bare).encode(row(messages=[said("user", "a"), said("assistant", "b")]))


def test_token_that_would_span_the_end_of_the_prompt_is_split_and_said():
    tokenizer = merging_tokenizer([("Ċ", "b")])  # the line break after "assistant" and the answer's first letter
    ask, answer = [said("user", "a")], [said("assistant", "bc")]
    found = renderer(tokenizer).encode(row(prompt=ask, completion=answer))
    assert found.is_separate
    assert found.prompt_ids == tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(found.responses[0]) == "bc<|im_end|>"
    assert not renderer(tokenizer).encode(row(prompt=ask, completion=[said("assistant", "cb")])).is_separate


def test_pair_of_which_one_side_merges_still_shares_its_prompt():
    tokenizer = merging_tokenizer([("Ċ", "b")])
    found = renderer(tokenizer).encode(
        row(prompt=[said("user", "a")], chosen=[said("assistant", "bc")], rejected=[said("assistant", "d")])
    )
    assert found.is_separate
    assert [tokenizer.decode(response) for response in found.responses] == ["bc<|im_end|>", "d<|im_end|>"]
    assert tokenizer.decode(found.prompt_ids[-1:]) == "\n"


# Strings


def test_string_is_taken_as_it_is_and_ends_with_eos_once(tokenizer):
    found = renderer(tokenizer).encode(row(prompt="The sky is", completion=" blue."))
    assert tokenizer.decode(found.prompt_ids) == "The sky is"
    assert tokenizer.decode(found.responses[0]) == " blue.<|im_end|>"
    assert renderer(tokenizer).encode(row(prompt="The sky is", completion=" blue.<|im_end|>")) == found


def test_text_without_prompt_has_its_first_token_for_one(tokenizer):
    found = renderer(tokenizer).encode(row(text="Once"))
    assert tokenizer.decode(found.prompt_ids) == "O"
    assert tokenizer.decode(found.responses[0]) == "nce<|im_end|>"


def test_tokenizers_own_first_token_stands_before_a_text():
    tokenizer = first_word_tokenizer()
    found = renderer(tokenizer).encode(row(text="the sky"))
    assert found.prompt_ids == [0]
    assert found.responses == [[2, 3, 1]]


def test_response_inside_a_text_has_the_tokens_it_has_there():
    """Alone, the response would begin with the token that has a space before it."""
    tokenizer = first_word_tokenizer()
    assert tokenizer.encode("sky", add_special_tokens=False) == [3]
    found = renderer(tokenizer).encode(row(prompt="the</s>", completion="sky"))
    assert (found.prompt_ids, found.responses) == ([0, 2, 1], [[5, 1]])
    assert not found.is_separate


@pytest.mark.parametrize("is_chat", [False, True])
def test_pair_of_which_one_side_is_tokenized_alone_has_both_alone(is_chat):
    """The chosen response's word would be one with the prompt's last; the rejected one's mark would not."""
    tokenizer = first_word_tokenizer()
    columns: dict[str, Any] = {"prompt": "the s", "chosen": "ky", "rejected": "-sky"}
    if is_chat:
        columns = {name: [said("user" if name == "prompt" else "assistant", text)] for name, text in columns.items()}
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = renderer(tokenizer, template=template).encode(row(**columns))
    assert found.is_separate
    chosen, rejected = found.responses
    alone = tokenizer.encode("-sky", add_special_tokens=False)
    assert rejected[: len(alone)] == alone != tokenizer.encode("the s-sky", add_special_tokens=False)[2:]
    assert chosen[:1] == tokenizer.encode("ky", add_special_tokens=False)


def test_pair_of_strings_is_separate_where_one_side_merges():
    tokenizer = merging_tokenizer([("s", "Ġ")])
    found = renderer(tokenizer).encode(row(prompt="is", chosen=" a", rejected="b"))
    assert found.is_separate
    assert tokenizer.decode(found.prompt_ids) == "is"
    assert [tokenizer.decode(response) for response in found.responses] == [" a<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize("merges", [[], [("b", "l"), ("b", "r")]])
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("is blue.", "is brown."), ("is", "is blue."), ("is blue.", "is"), ("is", "is<|im_end|>so"), ("a", "b")],
)
def test_implicit_prompt_is_a_true_prefix_of_both_texts(merges, chosen, rejected):
    tokenizer = merging_tokenizer(merges)
    found = renderer(tokenizer).encode(row(chosen=chosen, rejected=rejected))
    for text, response in zip((chosen, rejected), found.responses, strict=True):
        assert [*found.prompt_ids, *response] == tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)
    first = [response[0] for response in found.responses]
    assert first[0] != first[1] or 1 in map(len, found.responses), "nothing that both share is left"


def test_step_label_stands_on_the_last_token_of_its_step(tokenizer):
    steps = {"completions": ["ab", "c", "def"], "labels": [True, None, 0.25]}
    plain = renderer(tokenizer).encode(row(prompt="q\n", **steps))
    chat = renderer(tokenizer).encode(row(prompt=[said("user", "q")], **steps))
    assert plain.responses == chat.responses
    assert tokenizer.decode(plain.responses[0]) == "ab\nc\ndef\n"
    expected = [NAN, NAN, 1.0, NAN, NAN, NAN, NAN, NAN, 0.25]
    assert plain.step_labels == chat.step_labels
    assert plain.step_labels == [pytest.approx(expected, nan_ok=True)]
    assert tokenizer.decode(chat.prompt_ids).endswith("<|im_start|>assistant\n")


def test_string_needs_an_eos_token():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        renderer(tokenizer).encode(row(text="a"))
