"""Compiled layers compute what layers compute."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import tiny_model
from tests.unit.engines.test_trainer import GROUPS, WeightedTokens, choose, gradients, opened


@pytest.mark.long
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks at it
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_losses_and_gradients_are_those_of_layers_that_are_not_compiled(tmp_path, settings, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    tiny_model(tmp_path)
    plain, compiled = opened(tmp_path, **settings), opened(tmp_path, compile=True, **settings)
    assert compiled.accumulate(GROUPS, choose(WeightedTokens)) == pytest.approx(
        plain.accumulate(GROUPS, choose(WeightedTokens)), abs=1e-5
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    found = gradients(compiled)
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
