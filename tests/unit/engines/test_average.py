"""The moving average of the weights: its values, its way through a checkpoint, the model it makes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from flowrl.errors import ConfigError
from tests.unit.engines.test_trainer import GROUPS, WeightedTokens, choose, opened

DECAY = 0.75


def step(engine) -> dict[str, torch.Tensor]:
    engine.accumulate(GROUPS, choose(WeightedTokens))
    engine.apply()
    return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_is_that_of_the_weights_after_each_step_in_float32(tiny_llama, tmp_path, dtype):
    engine = opened(tiny_llama, dtype=dtype, lr=1e-2, ema_decay=DECAY)
    seen = [{name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}]
    seen += [step(engine) for _ in range(2)]
    weights = [DECAY * DECAY, (1 - DECAY) * DECAY, 1 - DECAY]
    engine.save_model(tmp_path / "model", card="card")
    saved = load_file(tmp_path / "ema_model" / "model.safetensors")
    assert (tmp_path / "ema_model" / "tokenizer.json").is_file()
    for name, last in seen[-1].items():
        expected = sum(weight * each[name].double() for weight, each in zip(weights, seen, strict=True))
        assert engine._average is not None
        torch.testing.assert_close(engine._average.tensors[name].double(), expected, atol=1e-7, rtol=1e-6)
        assert saved[name].dtype == last.dtype
        assert torch.equal(saved[name], engine._average.tensors[name].to(last.dtype))


def test_an_average_continued_from_state_is_bit_equal(tiny_llama, tmp_path):
    straight = opened(tiny_llama, ema_decay=DECAY)
    step(straight)
    straight.save_state(tmp_path / "state")
    resumed = opened(tiny_llama, ema_decay=DECAY)
    resumed.load_state(tmp_path / "state")
    for engine in (straight, resumed):
        step(engine)
    assert straight._average is not None
    assert resumed._average is not None
    for name, tensor in straight._average.tensors.items():
        assert torch.equal(tensor, resumed._average.tensors[name])


def test_an_average_asked_for_on_resuming_starts_there_and_says_so(tiny_llama, tmp_path):
    first = opened(tiny_llama)
    weights = step(first)
    first.save_state(tmp_path / "state")
    said: list[str] = []
    second = opened(tiny_llama, ema_decay=DECAY)
    second._say = said.append
    second.load_state(tmp_path / "state")
    assert "has no average of the weights: it starts at step 1" in said[0]
    assert second._average is not None
    assert all(torch.equal(second._average.tensors[name], tensor) for name, tensor in weights.items())


def test_without_a_decay_there_is_no_average(tiny_llama, tmp_path):
    engine = opened(tiny_llama)
    step(engine)
    engine.save_model(tmp_path / "model", card="card")
    assert not (tmp_path / "ema_model").exists()


def test_a_decay_of_one_would_never_learn(tiny_llama):
    from flowrl.config import resolve
    from flowrl.stages.learner import Learner

    with pytest.raises(ConfigError, match="ema_decay"):
        resolve(Learner.Config, overrides=["ema_decay=1.0"])
