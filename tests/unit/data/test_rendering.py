"""Tokens and masks, held against conversations put together by hand and against tokenizers that merge."""

from __future__ import annotations

import json
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
    words = ["a", "two words", "\nline\n", "émile", "\N{GRINNING FACE}", " a "]
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
            [said("user", "a"), {"role": "assistant", "tool_calls": [{"name": "look"}]}],
            None,
            "has tool_calls, which the chat template",
        ),
        (
            [said("user", "a"), {"role": "assistant", "tool_calls": [{"name": "look"}]}],
            "{{ 1 + 'tool_calls' }}",
            "refuses the roles",
        ),
        ([said("user", "a"), said("assistant", "b")], "{{ raise_exception('no!') }}", "refuses the roles"),
        (
            [said("user", "a"), said("assistant", "b")],
            "a{% generation %}{% endgeneration %}x",
            "writes nothing",
        ),
        (
            [said("user", "a"), said("asistant", "b"), said("assistant", "c")],
            None,
            "message 1 has the role 'asistant', which the chat template does not name",
        ),
        (
            [said("user", "a"), said("developer", "b"), said("assistant", "c")],
            "{% for m in messages if m.role != 'developer' %}{{ m.role + m.content }}<|im_end|>{% endfor %}",
            "has a developer message (1), which the chat template does not write",
        ),
        (
            [said("user", "hi"), said("assistant", "b")],
            "{% for m in messages %}{{ m.role }}\n{{ m.content[:1] }}<|im_end|>\n{% endfor %}",
            "has a user message (0), which the chat template does not write",
        ),
        (
            [said("user", "a"), said("assistant", "an <b>")],
            "{% for m in messages %}{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}",
            "has a user message (0), which the chat template does not write",
        ),
        (
            [said("user", "A"), said("assistant", "an answer")],
            "{% for m in messages %}{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}",
            "the chat template writes what message 1 says otherwise than it stands there",
        ),
        ([said("user", "a"), said("assistant", "b")], "{{ messages[0]", "the chat template cannot be read (unexpected"),
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
    last = renderer(tokenizer, template=twice, learns_all=False).encode(row(messages=messages * 2))
    assert tokenizer.decode(last.responses[0]) == "b<|im_end|>"  # an end that is marked by itself is no part
    in_two = MARKED.replace(
        "{{ m['content'] }}<|im_end|>{% endg", "b{% endgeneration %}{% generation %}c<|im_end|>{% endg"
    )
    messages[1] = said("assistant", "bc")
    assert renderer(tokenizer, template=in_two).encode(row(messages=messages)) == by_hand(tokenizer, messages)
    with pytest.raises(DataError, match=r"marks 4 parts for 2 turns.*data\.learn=all"):
        renderer(tokenizer, template=in_two, learns_all=False).encode(row(messages=messages * 2))


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
    assert rejected == [6, 5, 1], "no space that the text does not have"
    assert chosen[0] != tokenizer.encode("the sky", add_special_tokens=False)[-1]


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


def test_a_blank_answer_is_not_learned(tokenizer):
    blank = [said("user", "a"), said("assistant", " \n"), said("user", "b"), said("assistant", "c")]
    with pytest.raises(DataError, match="message 1, the assistant's, is blank: an empty answer would be learned"):
        renderer(tokenizer).encode(row(messages=blank))
    unweighted = [blank[0], {**blank[1], "weight": 0}, *blank[2:]]
    for messages, learns_all in ((unweighted, True), (blank, False)):
        found = renderer(tokenizer, learns_all=learns_all).encode(row(messages=messages))
        (mask,) = found.masks or [[1] * len(found.responses[0])]
        assert tokenizer.decode([k for k, m in zip(found.responses[0], mask, strict=True) if m]) == "c<|im_end|>"


def test_string_needs_an_eos_token():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        renderer(tokenizer).encode(row(text="a"))


# Ends, boundaries and what templates want


def bos_tokenizer(*, ends: bool = False) -> Any:
    """The tiny tokenizer, putting <|im_start|> before every text, and perhaps <|endoftext|> behind."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    single = "<|im_start|>:0 $A:0" + (" <|endoftext|>:0" if ends else "")
    tokens = [("<|im_start|>", 1), ("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("begins", ["", "<|im_start|>"])
def test_a_text_begins_with_the_tokenizer_s_own_token_once(ends, begins):
    tokenizer = bos_tokenizer(ends=ends)
    prompt, answer = [1, *tokenizer.encode("Ab", add_special_tokens=False)], [*tokenizer.encode("c")[1:2], 2]
    made = renderer(tokenizer)
    assert made.prompt_ids(begins + "Ab", is_rendered=False) == prompt
    found = made.encode(row(prompt=begins + "Ab", completion="c"))
    assert (found.prompt_ids, found.responses) == (prompt, [answer])
    found = made.encode(row(text=begins + "Abc"))
    assert [*found.prompt_ids, *found.responses[0]] == [*prompt, *answer]
    pair = made.encode(row(chosen=begins + "Abc", rejected=begins + "Abd"))
    assert (pair.prompt_ids, pair.responses[0]) == (prompt, answer)
    steps = made.encode(row(prompt=begins + "Ab", completions=["c"], labels=[True]))
    assert steps.prompt_ids == prompt


HEADED = MARKED.replace("<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}",
    "{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n").replace(
    "{% else %}", "{% else %}<|im_start|>{{ m['role'] }}\n")  # fmt: skip


def test_marks_around_what_opens_a_turn_do_not_make_it_learned(tokenizer):
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    found, plain = (renderer(tokenizer, template=each).encode(row(messages=messages)) for each in (HEADED, MARKED))
    assert found == plain
    whole = f"{{% generation %}}{CHAT_TEMPLATE}{{% endgeneration %}}"
    with pytest.raises(DataError, match="marks what stands between two of the assistant's turns as the assistant's"):
        renderer(tokenizer, template=whole).encode(row(messages=messages))


def test_marks_around_every_turn_are_refused_and_those_around_the_assistants_are_not(tokenizer):
    every = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    assert every != CHAT_TEMPLATE
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    for asked in (messages, messages[:2]):
        with pytest.raises(DataError, match="marks what the user says as the assistant's"):
            renderer(tokenizer, template=every).encode(row(messages=asked))
        renderer(tokenizer, template=MARKED).encode(row(messages=asked))


def test_an_answer_that_goes_on_behind_its_end_is_refused_and_a_text_of_several_is_not(tokenizer):
    with pytest.raises(DataError, match="an answer goes on behind"):
        renderer(tokenizer).encode(row(prompt="a", completion="b<|im_end|> and c"))
    renderer(tokenizer).encode(row(prompt="a", completion="b<|im_end|>\n"))
    renderer(tokenizer).encode(row(text="a<|im_end|> b<|im_end|>"))


def test_a_prompt_of_which_the_template_would_leave_something_out_is_refused(tokenizer):
    asked = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    deaf = CHAT_TEMPLATE.replace("messages %}", "messages if m.role != 'assistant' %}", 1)
    silent, normal = renderer(tokenizer, template=deaf), NormalRow(place="a", prompt=asked)
    with pytest.raises(DataError, match=r"has an assistant message \(1\), which the chat template does not write"):
        silent.check_history(normal, silent.prompt_text(normal))
    misspelt = NormalRow(place="a", prompt=asked, template_options={"enable_thinkin": False})
    with pytest.raises(DataError, match="sets enable_thinkin, which the chat template does not read"):
        renderer(tokenizer).prompt_text(misspelt)


def test_an_end_that_the_data_have_written_into_an_answer_is_learned_once(tokenizer):
    ask, answer = said("user", "a"), said("assistant", "yo<|im_end|>\n")
    again = [said("user", "b"), said("assistant", "bye")]
    found = renderer(tokenizer).encode(row(messages=[ask, answer, *again]))
    plain = renderer(tokenizer).encode(row(messages=[ask, said("assistant", "yo"), *again]))
    assert found == plain
    asked = renderer(tokenizer).prompt_text(NormalRow(place="a", prompt=[ask, answer, again[0]]))
    assert asked.count("<|im_end|>") == 3
    with pytest.raises(DataError, match=r"message 1 goes on behind <\|im_end\|>, which ends an answer"):
        renderer(tokenizer).encode(row(messages=[ask, said("assistant", "yo<|im_end|> and more")]))


@pytest.mark.parametrize(
    ("template", "written"),
    [(CHAT_TEMPLATE, ""), (CHAT_TEMPLATE.partition("{% if add")[0], "<|im_start|>assistant\n"),
     ("{% for m in messages %}{{ m.content }} {{ '[/INST]' if m.role == 'user' else eos_token }}{% endfor %}", "")],
)  # fmt: skip
def test_what_a_policy_must_write_itself_for_want_of_an_opened_turn_is_known(tokenizer, template, written):
    assert renderer(tokenizer, template=template).unopened() == written


@pytest.mark.parametrize("finish", ["length", "stop", "eos", None])
@pytest.mark.parametrize("template", [None, MARKED])
def test_a_sample_that_was_cut_is_not_taught_to_end(tokenizer, template, finish):
    made, end = renderer(tokenizer, template=template), "" if finish == "length" else "<|im_end|>"
    ask, answer = [said("user", "a")], [said("assistant", "Once upon a ti")]
    columns = [{"prompt": ask, "completion": answer}, {"prompt": "a", "completion": "Once upon a ti"}]
    columns += [{"messages": ask + answer}, {"text": "aOnce upon a ti"}]
    for each in columns:
        found = made.encode(row(**each, finish=finish))
        assert tokenizer.decode([*found.prompt_ids, *found.responses[0]]).endswith(f"Once upon a ti{end}")


def test_marks_that_leave_the_end_of_a_turn_out_learn_it_all_the_same(tokenizer):
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    without = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with_more = MARKED.replace("{{ '\n' }}", "").replace("{% endgeneration %}", "{{ '\n' }}{% endgeneration %}")
    with_more = with_more.replace("<|im_end|>{% endif %}", "<|im_end|>{{ '\n' }}{% endif %}")
    for template in (without, with_more):
        assert renderer(tokenizer, template=template).encode(row(messages=messages)) == by_hand(tokenizer, messages)


def test_a_template_that_ends_no_turn_learns_eos_behind_the_last_and_refuses_to_learn_others(tokenizer):
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    found = renderer(tokenizer, template=plain, learns_all=False).encode(row(messages=messages))
    assert tokenizer.decode(found.responses[0]) == "d<|im_end|>"
    with pytest.raises(DataError, match=r"no token that ends the turn of message 1.*data\.learn=last"):
        renderer(tokenizer, template=plain).encode(row(messages=messages))


CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} ARGUMENTS</call>{% endfor %}<|im_end|>"


@pytest.mark.parametrize(
    ("arguments", "content"),
    [
        ("{{ c.function.arguments | tojson }}", "{{ m['content'] }}"),
        ("{{ c.function.arguments }}", "{{ m['content'] }}"),  # Python's own writing of an object is not JSON
        ("{{ '' + c.function.arguments }}", "{{ m['content'] or '' }}"),
        ("{{ c.function.arguments | tojson }}", "{% if m.content is not none %}{{ m.content }}{% endif %}"),
    ],
)
@pytest.mark.parametrize("given", ['{"at": "é", "unit": null}', {"at": "é", "unit": None}])
def test_a_call_s_arguments_are_learned_as_json(tokenizer, arguments, content, given):
    template = CHAT_TEMPLATE.replace("{{ m['content'] }}", content)
    template = template.replace("<|im_end|>", CALLS.replace("ARGUMENTS", arguments))
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": given}}]}
    found = renderer(tokenizer, template=template).encode(row(messages=[said("user", "a"), call]))
    text = tokenizer.decode(found.responses[0]).removesuffix("</call><|im_end|>").removeprefix("<call>look ")
    assert json.loads(text) == {"at": "é", "unit": None}


def test_a_call_is_written_though_the_template_asks_for_no_content(tokenizer):
    """DeepSeek's writes calls only where the content is null."""
    calls = "{% if m.content is none %}{% for c in m.tool_calls %}<call>{{ c.function.name }}{% endfor %}{% endif %}"
    template = CHAT_TEMPLATE.replace("{{ m['content'] }}", calls + "{{ m.content or '' }}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    found = renderer(tokenizer, template=template).encode(row(messages=[said("user", "a"), call]))
    assert tokenizer.decode(found.responses[0]) == "<call>look<|im_end|>"


def test_what_a_template_leaves_out_is_refused(tokenizer):
    made = renderer(
        tokenizer, template="{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    thought = {**said("assistant", "b"), "reasoning_content": "hm"}
    for messages, what in (
        ([said("system", "be kind"), said("user", "a"), said("assistant", "b")], "has a system message"),
        ([said("user", "a"), thought], "has reasoning_content"),
    ):
        with pytest.raises(DataError, match=f"{what}.* which the chat template does not write"):
            made.encode(row(messages=messages))


def test_what_an_assistant_thought_is_learned_though_the_template_drops_it_from_history(tokenizer):
    """As DeepSeek-R1's: it begins to think in the policy's place, and writes answers without their thinking."""
    template = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    ask = [said("user", "a")]
    for mouth in ("", "<think>\n"):
        made = renderer(tokenizer, template=template.replace("assistant\n", f"assistant\n{mouth}"))
        for content in (f"{mouth}hm</think>b", "hm</think>b"):
            found = made.encode(row(prompt=ask, completion=[said("assistant", content)]))
            assert tokenizer.decode(found.prompt_ids).endswith(f"assistant\n{mouth}")
            assert tokenizer.decode(found.responses[0]) == "hm</think>b<|im_end|>"
        earlier = [*ask, said("assistant", "hm</think>b"), *ask, said("assistant", "c</think>d")]
        with pytest.raises(DataError, match=r"leaves out what message 1 thinks|begins the answer with <think>"):
            made.encode(row(messages=earlier))
    with pytest.raises(DataError, match=r"begins the answer with <think>, which message 1 does not end; write what"):
        made.encode(row(prompt=ask, completion=[said("assistant", "b")]))
    with pytest.raises(DataError, match="has thinking, which the chat template does not write behind <think>; begin"):
        made.encode(row(prompt=ask, completion=[{**said("assistant", "b"), "thinking": "hm"}]))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_prompt_that_says_not_to_think_is_the_same_whether_the_answer_repeats_that_or_not(tokenizer, keeps):
    nothing = "<think>\n\n</think>\n\n"
    template = CHAT_TEMPLATE.replace(
        "assistant\n{% endif", "assistant\n{% if not think %}" + nothing + "{% endif %}{% endif"
    )
    if keeps:
        template = template.replace(
            "{{ m['content'] }}", "{% if loop.last and loop.length > 1 %}" + nothing + "{% endif %}{{ m['content'] }}"
        )
    columns: Any = {"prompt": [said("user", "a")], "chat_template_kwargs": {"think": False}}
    found = renderer(tokenizer, template=template).encode(row(**columns, completion=[said("assistant", "b")]))
    assert tokenizer.decode(found.prompt_ids).endswith("assistant\n" + nothing)
    assert tokenizer.decode(found.responses[0]) == "b<|im_end|>"


def test_marks_learn_no_other_answer_than_the_policy_is_asked_for(tokenizer):
    """As TRL's templates for training: marks tell the assistant's part, and drop, add or open as other templates do."""
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    behind = MARKED + "{% if not add_generation_prompt %}{% generation %}<|endoftext|>{% endgeneration %}{% endif %}"
    assert renderer(tokenizer, template=behind).encode(row(messages=messages)) == by_hand(tokenizer, messages)
    thought = [messages[0], {**messages[1], "reasoning_content": "hm"}]
    tagged = [messages[0], said("assistant", "<think>hm</think>b")]
    forgets = MARKED.replace(
        "{{ m['content'] }}<|im_end|>{% endg", "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endg"
    )
    mouth = MARKED.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    other_end = MARKED.replace("<|im_end|>{% endg", "{{ '<|im_end|>' if loop.last else '<|endoftext|>' }}{% endg")
    for template, given, what in (
        (MARKED, thought, "has reasoning_content, which the chat template does not write"),
        (forgets, thought + messages[2:], "leaves out what message 1 thinks; set data.learn=last"),
        (forgets, tagged, "leaves out what message 1 thinks"),
        (mouth, messages, "begins the answer with <think>, which message 1 does not end"),
        (other_end, messages, "no token that ends the turn of message 1"),
    ):
        with pytest.raises(DataError, match=what):
            renderer(tokenizer, template=template).encode(row(messages=given))


@pytest.mark.parametrize("blank", ["<think>\n\n</think>\n\n", "<|channel>thought\n<channel|>"])
def test_a_prompt_that_says_not_to_think_stays_though_a_closed_turn_leaves_that_out(tokenizer, blank):
    """As Gemma 4's larger models: only prompts have the blank thought."""
    made = renderer(tokenizer, template=CHAT_TEMPLATE.replace("assistant\n{% endif", f"assistant\n{blank}{{% endif"))
    for content in ("b", f"{blank}b"):
        found = made.encode(row(prompt=[said("user", "a")], completion=[said("assistant", content)]))
        assert tokenizer.decode(found.prompt_ids).endswith(f"assistant\n{blank}")
        assert tokenizer.decode(found.responses[0]) == "b<|im_end|>"
    with pytest.raises(DataError, match="has the policy not think, and message 1 thinks"):
        made.encode(row(messages=[said("user", "a"), said("assistant", blank.replace("\n", "hm", 1) + "b")]))


def test_what_the_template_begins_to_think_is_not_thought_twice(tokenizer):
    begins = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n\n{% endif")
    always = begins.replace(
        "{{ m['content'] }}", "{{ '<think>\n\n</think>' if m.role == 'assistant' }}{{ m['content'] }}"
    )
    writes = begins.replace(
        "{{ m['content'] }}", "{% if m.thinking %}<think>\n{{ m.thinking }}</think>{% endif %}{{ m.content }}"
    )
    ask, inline = [said("user", "a")], said("assistant", "<think>\nhm</think>b")
    apart = {**said("assistant", "b"), "thinking": "hm"}
    for template, answer in ((begins, inline), (always, inline), (writes, apart)):
        found = renderer(tokenizer, template=template).encode(row(messages=[*ask, answer]))
        assert tokenizer.decode(found.prompt_ids).endswith("assistant\n<think>\n\n")
        assert tokenizer.decode(found.responses[0]) == "hm</think>b<|im_end|>"


def test_calls_and_results_that_a_template_leaves_out_are_refused_though_it_writes_the_tools(tokenizer):
    tools = [{"name": "look"}]
    silent = "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + CHAT_TEMPLATE
    first = silent.replace("<|im_end|>", CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    deaf = silent.replace("<|im_end|>", CALLS).replace("in messages", "in messages if m.role != 'tool'")
    call, result = {"name": "look", "arguments": {}}, said("tool", '{"temperature": 20}')
    once, twice = ({**said("assistant", ""), "tool_calls": calls} for calls in ([call], [call, call]))
    for template, messages, what in (
        (silent, [once], "has tool_calls, which the chat template does not write"),
        (first, [twice], r"does not write all 2 tool_calls of message 1 \(look\)"),
        (deaf, [once, result, said("assistant", "b")], r"has a tool message \(2\), which the chat template does not"),
    ):
        with pytest.raises(DataError, match=what):
            renderer(tokenizer, template=template).encode(row(messages=[said("user", "a"), *messages], tools=tools))
