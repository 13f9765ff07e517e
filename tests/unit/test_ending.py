"""Where an answer ends, held against what families write and what their files name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.ending import ending_of, sample_text, write_stops
from tests.support.templates import PLAIN_TURN, tokenizer_of
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


def saved(tokenizer: Any, directory: Path, **configured: Any) -> Any:
    from flowrl.data.prompts import load_tokenizer

    tokenizer.save_pretrained(directory)
    for name, settings in configured.items():
        (directory / f"{name}.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


@pytest.mark.parametrize(
    ("template", "end", "gap", "gap_alone"),
    [
        (None, "<|endoftext|>", "", ""),
        ("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}", "<|endoftext|>", "", "\n\n"),
        ("{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}\n{% endfor %}", "<|im_start|>", "\n", "\n"),
        ("{% for m in messages %}{{ m.content }} <|im_end|><|endoftext|>{% endfor %}", "<|endoftext|>", None, ""),
        ("{{ messages[0].content }}", "<|endoftext|>", "", ""),
        ("{{ raise_exception('no') }}", "<|endoftext|>", "", ""),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system') }}{% endif %}" + PLAIN_TURN,
            "<|im_end|>",
            "",
            "",
        ),
    ],
)
def test_an_end_is_what_the_template_writes_behind_an_answer_and_else_eos(template, end, gap, gap_alone):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = template, "<|endoftext|>"
    ending = ending_of(tokenizer)
    assert (ending.end, ending.gap_alone) == (end, gap_alone)
    assert ending.gap == (" <|im_end|>" if gap is None else gap)
    assert ending.stops[ending.end_id or 0] == end


def test_generation_stops_at_what_the_model_s_files_name(tmp_path):
    names = {"generation_config": {"eos_token_id": [0, 2, 9_999]}, "config": {"eos_token_id": 1}}
    assert set(ending_of(saved(tiny_tokenizer(), tmp_path, **names)).stops) == {0, 2}
    (tmp_path / "generation_config.json").write_text('{"temperature": 1.0}')
    assert set(ending_of(tiny_tokenizer(), directory=tmp_path).stops) == {2}
    (tmp_path / "generation_config.json").unlink()
    assert set(ending_of(tiny_tokenizer(), directory=tmp_path).stops) == {1, 2}


def test_a_saved_model_names_every_token_that_ends_an_answer(tmp_path):
    tokenizer = saved(tokenizer_of("chatml-base"), tmp_path, generation_config={"eos_token_id": 0, "top_k": 3})
    write_stops(tmp_path)
    found = json.loads((tmp_path / "generation_config.json").read_text())
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert found == {"eos_token_id": [*ends, 0], "top_k": 3}
    write_stops(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == found


@pytest.mark.parametrize("held", ["[1, 2]", "{not json", ""])
def test_settings_of_generation_that_are_none_are_named(tmp_path, held):
    saved(tiny_tokenizer(), tmp_path)
    (tmp_path / "generation_config.json").write_text(held)
    with pytest.raises(ValueError, match=r"^generation_config\.json"):
        write_stops(tmp_path)


def test_a_sample_s_text_has_its_special_tokens_but_not_its_end():
    tokenizer = tokenizer_of("qwen2.5")
    stops = ending_of(tokenizer).stops
    text = '<tool_call>\n{"name": "w"}\n</tool_call>'
    ids = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    assert sample_text(tokenizer, ids, stops) == text
    assert sample_text(tokenizer, ids[:-1], stops) == text
    assert sample_text(tokenizer, [*ids, *ids], stops) == f"{text}<|im_end|>{text}"
    assert sample_text(tokenizer, ids, stops, keeps_special=False) == '\n{"name": "w"}\n'
    assert sample_text(tokenizer, [], stops) == ""


def test_a_model_without_a_tokenizer_is_saved_all_the_same(tmp_path):
    write_stops(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("calls", "results", "end"),
    [
        ("<call>ARGS</call>", "<result>", ""),  # the answer's own end stands behind it
        ("<call>ARGS<|call|>", "<result>", "<|call|>"),  # as gpt-oss': a token in its place, of one call
        ("<call>ARGS</call>", "<tool>", "<tool>"),  # as GLM's: the mark of the one who answers
    ],
)
def test_a_call_ends_with_its_own_token_where_the_answer_s_end_does_not_follow(calls, results, end):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<call>", "</call>", "<|call|>", "<result>", "<tool>"])
    written = calls.replace("ARGS", "{{ c.function.name }} {{ c.function.arguments | tojson }}")
    closed, most = "" if end else "<|im_end|>", "1" if end == "<|call|>" else "9"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}" + results + "{{ m.content }}{% elif m.tool_calls %}"
        "{% for c in m.tool_calls[:"
        + most
        + "] %}"
        + written
        + "{% endfor %}"
        + closed
        + "{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    ending = ending_of(tokenizer)
    assert (ending.end, ending.call_end) == ("<|im_end|>", end)
    assert set(ending.stops.values()) == {"<|im_end|>", end} - {""}
    if end == "<tool>":  # as DeepSeek-R1's: it forgets the end of a single call
        ends_several = "{% if m.tool_calls|length > 1 %}<|im_end|>{% endif %}{% else %}{{ m.content }}"
        tokenizer.chat_template = tokenizer.chat_template.replace("{% else %}{{ m.content }}", ends_several)
        assert ending_of(tokenizer).call_end == ""
