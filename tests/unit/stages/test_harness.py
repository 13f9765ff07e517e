"""What lm-eval is given of a model."""

from __future__ import annotations

import pytest

from flowrl.ending import DATE
from tests.support.tiny import tiny_tokenizer


@pytest.mark.slow
def test_a_question_is_the_same_on_every_day():
    pytest.importorskip("lm_eval")
    from flowrl.stages.harness import EngineLM

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    model = EngineLM(None, tokenizer, None, seed=0, max_length=8, at_once=1)  # pyright: ignore[reportArgumentType]
    assert model.apply_chat_template([{"role": "user", "content": "hi"}]) == f"{DATE} hi"
