"""What compiling lacks is said before the start; tests/contracts/test_compiled.py compiles."""

from __future__ import annotations

import pytest

from flowrl.engines.base import Training
from flowrl.engines.compiled import check_compile
from flowrl.errors import ConfigError
from tests.unit.engines.test_trainer import opened


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "there is no C\\+\\+ compiler \\(g\\+\\+\\); install g\\+\\+, or leave it false"),
        ({"zero_stage": 3}, "layers cannot be compiled with zero_stage=3; leave it false"),
        ({"sequence_parallel": 2}, "layers cannot be compiled with sequence_parallel; leave it false"),
    ],
)
def test_what_compiling_lacks_is_said_before_the_start(monkeypatch, settings, words):
    monkeypatch.setattr("shutil.which", lambda name: None if not settings else f"/usr/bin/{name}")
    check_compile(Training(**settings), "learner", has_gpu=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=f"learner.compile: {words}"):
        check_compile(Training(compile=True, **settings), "learner", has_gpu=False)


def test_a_process_in_which_nothing_would_be_compiled_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ConfigError, match=r"learner.compile: TORCHDYNAMO_DISABLE=1, as vLLM has it .*runtime=ray"):
        opened(tiny_llama, compile=True)
