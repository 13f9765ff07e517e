"""The head's logits are made, in forward and in backward, a part at a time, and none of them are kept."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.engines.test_trainer import GROUPS, WeightedTokens, choose, gradients, opened

VOCAB, MOST_TOKENS = 320, 7


class Widest(TorchDispatchMode):
    """Notes the most rows that any tensor [rows, vocabulary] has that an operation makes; the head's weight aside."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCAB:
                rows = tensor.numel() // VOCAB
                self.num_rows = max(self.num_rows, rows if rows != 64 else 0)  # 64: the weight, transposed
        return made


@pytest.mark.slow
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_logits_of_more_tokens_than_the_bound_never_exist_and_gradients_are_those_of_the_whole(tiny_llama, entropy):
    num_tokens = sum(len(response) for item in GROUPS for response in item.responses)
    assert num_tokens > 8 * MOST_TOKENS
    assert num_tokens != 64
    found = []
    for max_logits in (VOCAB * num_tokens, VOCAB * MOST_TOKENS):
        engine = opened(tiny_llama)
        engine.reader.max_logits = max_logits
        kept: list[int] = []

        def pack(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept += [tensor.numel() // VOCAB] if tensor.shape[-1:] == (VOCAB,) and tensor.shape[0] != 64 else []
            return tensor

        with Widest() as widest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = engine.accumulate(GROUPS, choose(WeightedTokens, entropy=entropy))["loss"]
        found.append((loss, gradients(engine), widest.num_rows, max(kept, default=0)))
    whole, parts = found
    assert whole[2] == whole[3] == num_tokens
    assert 0 < parts[2] <= MOST_TOKENS
    assert parts[3] <= MOST_TOKENS  # a part's own, while its backward runs
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    for name, expected in whole[1].items():
        torch.testing.assert_close(parts[1][name], expected, atol=1e-6, rtol=1e-5)
